"""Every shipped YAML file parses, builds, and says in its header where its numbers come from."""

import functools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from poodle_lightning.cli import build
from poodle_lightning.configured import spec
from poodle_lightning.data.sampling import ClipSampler, WindowSampler
from poodle_lightning.data.tracked import TrackedFrames
from poodle_lightning.data.video import VideoDataModule
from poodle_lightning.methods.base import Method
from poodle_lightning.methods.poodle import PooDLe
from poodle_lightning.methods.trace import Trace

ROOT = Path(__file__).parents[1] / "configs"
TRACES = sorted(path.stem for path in (ROOT / "experiment").glob("trace_*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiment").glob("*.yaml") if path.stem not in TRACES)
# these change the trainer alone; tests/callbacks/test_probes.py and test_compiled.py run them
OF_TRAINERS = ("probes", "compile")
PATCHES = sorted(path.stem for path in (ROOT / "patch").glob("*.yaml") if path.stem not in OF_TRAINERS)
TRAINERS = sorted(path.stem for path in (ROOT / "trainer").glob("*.yaml"))
# the experiment that a patch goes on top of, by the beginning of its name; else PooDLe's ablation
BASES = {
    "byol_": "byol_bdd100k",
    "dora_": "dora_wt_venice",
    "tour_": "dora_wt_venice",
    "cuts_": "dora_film",
    "dino_": "dino_wt_venice",
    "attmask_": "attmask_wt_venice",
    "epochs_": "ibot_wt_venice",
    "vito_": "vito_videonet",
    "moclr_": "moclr_videonet",
    "pico_": "pico_kinetics400",
}
HEADER = ("command", "hardware", "hours", "expected", "obtained")


def made(*configs: str, words=()):
    """Model and data of a config, on the meta device, without weights that would be downloaded."""
    text = (ROOT / f"{configs[0]}.yaml").read_text()
    method = yaml.safe_load((ROOT / configs[0]).parent.joinpath(yaml.safe_load(text)["model"]).read_text())
    words = ["--data.root=videos", *words]
    if "RAFT" in str(method) and not any(config.startswith("patch/flow_") for config in configs):
        words.append("--model.flow={class_path: poodle_lightning.flow.raft.RAFT, init_args: {weights: null}}")
    if "IMAGENET" in str(method):
        words.append(
            "--model.encoder={class_path: poodle_lightning.nn.resnet.ResNet, init_args: {weights: null}}"
        )
    with torch.device("meta"):
        return build([f"{config}.yaml" for config in configs], words)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("folder_clips", ClipSampler), ("folder_window", WindowSampler), ("folder_tracks", TrackedFrames)],
)
def test_a_setting_of_a_sampler_is_of_the_one_that_is_named(name, kind):
    """All three have ``frames``."""
    configs = ["--model=method/byol_tiny.yaml", f"--data=data/{name}.yaml", "--data.root=videos"]
    before, after = (build([], [*configs, *words])[1].sampler for words in ([], ["--data.sampler.frames=3"]))
    assert type(before) is kind
    assert after == replace(before, frames=3)


def test_a_sampler_without_a_name_is_known_by_its_settings(tmp_path):
    """As earlier versions wrote it into ``config.yaml``."""
    settings = {"folder": "tracks", "frames": 3, "by": "random", "motion": "tracks", "points": 32}
    data = {"source": "folder", "root": "videos", "sampler": settings}
    content = {"data": {"class_path": "poodle_lightning.VideoDataModule", "init_args": data}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    _, data = build([tmp_path / "config.yaml"], ["--model=method/byol_tiny.yaml"])
    assert data.sampler == TrackedFrames("tracks", 3, "random", points=32)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_build(name):
    method, data = made(f"experiment/{name}")
    assert isinstance(method, Method)
    assert isinstance(data, VideoDataModule)


@pytest.mark.parametrize("name", TRACES)
def test_what_tracks_points_builds(name):
    method, data = made(f"experiment/{name}")
    assert isinstance(method, Trace)
    assert isinstance(data, VideoDataModule)


@pytest.mark.parametrize("name", EXPERIMENTS + TRACES)
def test_experiments_have_a_header(name):
    lines = (ROOT / "experiment" / f"{name}.yaml").read_text().splitlines()
    head = [line for line in lines if line.startswith("#")]
    for key in HEADER:
        assert any(re.match(rf"# {key}\s+\S", line) for line in head), f"{name}.yaml says no {key!r}"
    assert f"experiment/{name}.yaml" in "\n".join(head)


def said(*configs: str) -> list[str]:
    """All that a configuration settles of model and data."""
    method, data = made(*configs)
    parts = (data.rule, data.sampler, data.origin, data.division)
    return [str(spec(method)), data.pixels, *(str(vars(part)) for part in parts)]


unpatched = functools.cache(said)


@pytest.mark.parametrize("name", PATCHES)
def test_patches_change_what_they_say(name):
    base = next((base for start, base in BASES.items() if name.startswith(start)), "poodle_ablation")
    assert unpatched(f"experiment/{base}") != said(f"experiment/{base}", f"patch/{name}")


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_are_arguments_of_the_trainer(name):
    import inspect

    import lightning as L

    known = set(inspect.signature(L.Trainer.__init__).parameters)
    given = yaml.safe_load((ROOT / "trainer" / f"{name}.yaml").read_text())
    assert set(given) <= known
    if "nodes" in name or "gpu8" in name:
        assert given["sync_batchnorm"] is True
        assert given["strategy"]["init_args"]["broadcast_buffers"] is False
        assert given["use_distributed_sampler"] is False


def test_the_papers_numbers():
    """specs: the authors' configuration for BDD100K."""
    method, data = made("experiment/poodle_bdd100k")
    assert isinstance(method, PooDLe)
    trainable = sum(p.numel() for p in method.parameters() if p.requires_grad) / 1e6
    assert abs(trainable - 53.1) < 0.05
    assert (method.alpha1, method.alpha2, method.loss_stride) == (0.1, 0.5, 1)
    subcrops = method.subcrops
    assert (subcrops.count, tuple(subcrops.size), tuple(subcrops.area)) == (6, (192, 192), (0.05, 0.3))
    assert (method.view.degrees, tuple(method.view.scale), method.view.flip) == (10.0, (0.9, 1.1), 0.5)
    recipe = method.recipe
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.eps) == ("adamw", 5e-4, 1e-2, 1e-6)
    assert data.size == (512, 1024)
    assert (tuple(data.rule.scale), tuple(data.rule.reference)) == ((0.75, 1.25), (1080, 1920))
    # one pass here is two pairs per video: two epochs of the authors', whose schedule has 300, 2 of warm-up
    assert data.clips_per_video * recipe.horizon_epochs == 300
    assert data.clips_per_video * recipe.warmup_epochs == 2


def test_the_ablation_recipe():
    method, data = made("experiment/poodle_ablation")
    assert method.view is None
    assert (method.recipe.lr, method.recipe.weight_decay) == (1e-3, 1e-6)
    assert data.size == (256, 512)
    assert data.clips_per_video * method.recipe.horizon_epochs == 40
    assert data.clips_per_video * method.recipe.warmup_epochs == pytest.approx(3)


def test_flowe_of_its_own_paper():
    method, _ = made("experiment/flowe_bdd100k_paper")
    assert (method.recipe.optimizer, method.recipe.lr, method.recipe.weight_decay) == ("lars", 0.1, 1e-6)
    assert (method.view.degrees, tuple(method.view.scale)) == (30.0, (0.5, 2.0))


@pytest.mark.parametrize("name", [name for name in PATCHES if name.startswith("crop_area")])
def test_crop_areas_are_those_of_their_law(name):
    """A window of another aspect than the frame's would be cut down where it does not fit."""
    from scipy.stats import truncnorm

    from poodle_lightning.ops.random import key_of

    _, data = made("experiment/poodle_ablation", f"patch/{name}")
    (low, high), (mean, std) = data.rule.area, data.rule.area_normal
    assert mean == int(name.rsplit("_", 1)[1]) / 1000
    windows = [data.rule.draw(1280, 720, key_of(0, number)).inner for number in range(400)]
    shares = torch.tensor([(x1 - x0) * (y1 - y0) / (1280 * 720) for x0, y0, x1, y1 in windows])
    law = truncnorm((low - mean) / std, (high - mean) / std, loc=mean, scale=std)
    assert abs(float(shares.mean()) - law.mean()) < 4 * law.std() / 20
