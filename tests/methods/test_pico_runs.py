"""PiCo in a run: where its encoder comes from, what its checkpoint gives, what its data must bring."""

import copy
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from tiny_models import tiny_encoder, tiny_sdm
from tiny_pico import PLACES, QUEUE, tiny, tracked, two_crops, untracked
from torch.utils.data import DataLoader

from poodle_lightning.cli import build
from poodle_lightning.hub import from_pretrained, load_encoder, save_pretrained
from poodle_lightning.methods.moco import MoCo
from poodle_lightning.methods.pico import PiCo, _is_fresh
from poodle_lightning.nn.encoder import DecodedEncoder
from poodle_lightning.nn.fpn import SemanticFPN
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.types import UserError

CONFIG = Path(__file__).parents[2] / "configs" / "method" / "pico_tiny.yaml"


# ---- where the encoder comes from
def test_a_checkpoint_gives_the_semantic_map_and_needs_no_other_file(tmp_path):
    """The encoder from an exported folder, which is gone when the method is made again."""
    folder = tmp_path / "moco"
    torch.manual_seed(3)
    given = tiny_encoder()
    save_pretrained(given, folder)
    method = tiny_from(str(folder))
    for one, other in zip(given.parameters(), method.online.encoder.parameters(), strict=True):
        assert torch.equal(one, other)
    save(method, tmp_path / "run" / "checkpoints" / "last.ckpt")
    for file in folder.iterdir():
        file.unlink()
    images = torch.rand(2, 3, 64, 32)
    wanted = method.online.decoder(method.online.encoder(images)).last
    for found in (from_pretrained(tmp_path / "run"), load_encoder(str(tmp_path / "run"))):
        assert isinstance(found, DecodedEncoder)
        assert (list(found.channels)[-1], found.strides["semantic"]) == ("semantic", 4)
        assert torch.equal(found(images).last, wanted)
        assert found(images).last.shape == (2, 32, 16, 8)
    again = PiCo.load_from_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in method.state_dict().items())
    assert method.target.module.backbone()(images).last.shape == wanted.shape  # what a probe of it reads


def tiny_from(encoder):
    small = {"hidden": 16, "out": 8, "queue": QUEUE, "crops": two_crops(), "places": PLACES}
    channels = {"layer1": 8, "layer2": 16, "layer3": 32, "layer4": 64}
    return PiCo(encoder, SemanticFPN(channels, dims=32, pyramid=16), **small)


def save(method, path):
    path.parent.mkdir(parents=True)
    checkpoint = {"state_dict": method.state_dict()}
    method.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)


def test_the_encoder_may_be_that_of_a_run_or_a_file(tmp_path):
    moco = MoCo(tiny_encoder(), hidden=16, out=8, queue=4, crops=two_crops())
    save(moco, tmp_path / "run" / "checkpoints" / "last.ckpt")
    theirs = {f"module.encoder_q.{k}": x for k, x in moco.online.encoder.state_dict().items()}
    torch.save({"state_dict": theirs, "arch": "resnet10"}, tmp_path / "moco.pth")
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"):
        found = tiny_from(str(place)).online.encoder
        assert not any(p.requires_grad for p in found.parameters())
        assert all(torch.equal(x, found.state_dict()[k]) for k, x in moco.online.encoder.state_dict().items())
    decoded = DecodedEncoder(moco.online.encoder, tiny_sdm(moco.online.encoder))
    save_pretrained(decoded, tmp_path / "decoded")
    alone = tiny_from(str(tmp_path / "decoded")).online.encoder
    assert list(alone.channels) == ["layer1", "layer2", "layer3", "layer4"]
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        PiCo(str(tmp_path / "nowhere"))


def test_the_command_line_takes_an_encoder_by_its_place(tmp_path):
    save_pretrained(tiny_encoder(), tmp_path / "moco")
    words = ["--data=VideoDataModule", "--data.source=synthetic", f"--model={CONFIG}"]
    method, _ = build([], [*words, f"--model.encoder={tmp_path / 'moco'}"])
    assert isinstance(method, PiCo)
    assert method.init_args["encoder"].init_args["depth"] == 10
    method, _ = build([], [*words, "--model.encoder.depth=18"])
    assert method.online.encoder.init_args["depth"] == 18


# ---- the run
class Data(L.LightningDataModule):
    batch_size = 2

    def __init__(self, frames, points, bring=True):
        super().__init__()
        self.frames, self.bring = frames, bring
        self.sampler = SimpleNamespace(frames=frames, **({"points": points} if points else {}))

    def train_dataloader(self):
        made = [
            tracked(batch=2, frames=self.frames, seed=seed)
            if self.frames > 1 and self.bring
            else untracked(frames=self.frames, seed=seed)
            for seed in range(2)
        ]
        return DataLoader(made, batch_size=None, collate_fn=lambda clip: clip)


def fit(method, data):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = {**quiet, "enable_model_summary": False, "accelerator": "cpu", "max_steps": 2}
    L.Trainer(**settings).fit(method, data)
    return method


@pytest.mark.filterwarnings("ignore")
def test_a_run_trains_and_its_queue_is_compared_with_an_epochs_keys():
    """Two batches of two clips: of one frame 28 keys, of tracked pairs of 7 points 28, of triples 56."""
    for frames, keys in ((1, 28), (2, 28), (3, 56)):
        method = tiny(double=False, queue=keys)
        before = copy.deepcopy(method.online.state_dict())
        rows = method.queue.rows.clone()
        fit(method, Data(frames, PLACES if frames > 1 else None))
        moved = {name for name, x in method.online.state_dict().items() if not torch.equal(x, before[name])}
        assert {name.partition(".")[0] for name in moved} == {"decoder", "projector"}
        assert (method.queue.rows != rows).any(dim=1).all()
        with pytest.raises(UserError, match=rf"model\.queue={keys + 1} keys"):
            fit(tiny(double=False, queue=keys + 1), Data(frames, PLACES if frames > 1 else None))


@pytest.mark.filterwarnings("ignore")
def test_frames_without_points_name_the_sampler():
    with pytest.raises(
        UserError, match=r"set data\.sampler to poodle_lightning\.data\.tracked\.TrackedFrames"
    ) as told:
        fit(tiny(double=False, queue=2), Data(2, None, bring=False))
    assert "\n" not in str(told.value)


def test_a_decoder_of_another_encoder_is_refused():
    with pytest.raises(UserError, match=r"decoder is for maps of .*: 16.* leave model.decoder out"):
        PiCo(tiny_encoder(), SemanticFPN(ResNet(10, width=16).channels, 32, 16), crops=two_crops())


def test_a_frozen_encoder_that_learnt_nothing_is_told_of():
    learnt = tiny_encoder()
    learnt.bn1.running_mean.add_(0.5)
    assert [_is_fresh(encoder) for encoder in (tiny_encoder(), learnt)] == [True, False]
