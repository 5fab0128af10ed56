"""Compiled training is the same training. Backends that need no compiler of the machine's."""

import copy
import pickle

import lightning as L
import pytest
import torch
from tiny_models import make_clip, tiny_encoder, tiny_recipe, tiny_sdm
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from poodle_lightning import cli
from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.callbacks.compiled import Compile, modules_of
from poodle_lightning.configured import Configured
from poodle_lightning.flow.given import Given
from poodle_lightning.methods.byol import BYOL
from poodle_lightning.methods.flowe import FlowE
from poodle_lightning.methods.poodle import PooDLe
from poodle_lightning.nn.frozen import Frozen
from poodle_lightning.ops.crops import SubcropRecipe
from poodle_lightning.ops.geometry import Flow
from poodle_lightning.types import UserError


class Learned(nn.Module, Configured):
    """A flow estimator with a frozen network of two parts, which it calls one by one."""

    def __init__(self):
        super().__init__()
        self.net = Frozen(nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)))

    def forward(self, clip, clean):
        pairs = torch.cat([clean.flatten(1, 2), clean.flip(1).flatten(1, 2)])
        for part in self.net.module.children():
            pairs = part(pairs)
        return Flow.from_pixels(pairs.float())


def poodle(**kwargs):
    torch.manual_seed(0)
    encoder = tiny_encoder()
    heads = {"hidden": 16, "out": 8, "subcrops": SubcropRecipe(count=2, size=(16, 16))}
    return PooDLe(encoder, tiny_sdm(encoder), **{"flow": Given(), **heads, "recipe": tiny_recipe(), **kwargs})


def byol():
    torch.manual_seed(0)
    return BYOL(tiny_encoder(), hidden=16, out=8, crop=ResizedCrop((32, 32)), recipe=tiny_recipe())


class Watch(L.Callback):
    """The loss of every step, and whether something was compiled in it."""

    def __init__(self):
        self.losses, self.compiled = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.compiled.append(any(part._compiled_call_impl is not None for part in module.modules()))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def fit(method, *callbacks, steps=3, first=0, ckpt_path=None):
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[watch, *callbacks],
    )  # fmt: skip
    clips = [make_clip(seed=i) for i in range(first, first + 4)]
    trainer.fit(method, DataLoader(clips, batch_size=None, collate_fn=lambda clip: clip), ckpt_path=ckpt_path)
    return watch, trainer


@pytest.mark.parametrize(
    ("make", "backend", "parts"),
    [
        (poodle, "eager", ("encoder", "decoder", "heads", "flow")),
        (byol, "aot_eager", ("encoder", "flow")),
    ],
)
def test_losses_and_names_are_those_of_plain_training(make, backend, parts):
    plain, compiled = make(), make()
    names = list(plain.state_dict())
    expected, _ = fit(plain)
    assert counters["frames"]["ok"] == 0
    callback, limit = Compile(parts, backend=backend), torch._dynamo.config.recompile_limit
    found, _ = fit(compiled, callback)
    assert found.compiled == [False, True, True]
    assert counters["frames"]["ok"] > 2
    assert not counters["graph_break"]
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert list(compiled.state_dict()) == names
    for mine, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert all(module._compiled_call_impl is None for module in compiled.modules())
    assert callback.compiled == []
    assert torch._dynamo.config.recompile_limit == limit


class Counted(L.Callback):
    """How often each compiled module is called as such; behind Compile in the list of callbacks."""

    def __init__(self):
        self.calls = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for name, part in module.named_modules():
            if part._compiled_call_impl is not None and name not in self.calls:
                self.calls[name] = 0
                part._compiled_call_impl = self.counting(name, part._compiled_call_impl)

    def counting(self, name, call):
        def counted(*args, **kwargs):
            self.calls[name] += 1
            return call(*args, **kwargs)

        return counted


def family(name):
    torch.manual_seed(0)
    data = ["--data=VideoDataModule", "--data.source=synthetic"]
    return cli.build([], [f"--model=method/{name}.yaml", *data])[0]


STUDENT = {"online.encoder.blocks.0", "online.encoder.blocks.1"}
TEACHER = {"target.module.encoder.blocks.0", "target.module.encoder.blocks.1"}
HEADS = {"online.head", "target.module.head"}
LAST = "target.module.encoder.blocks.1"


@pytest.mark.parametrize(
    ("name", "backend", "compiled", "idle", "versions"),
    [
        # versions of a block: two sizes of crops with gradients, one without; of a head: with and without
        ("dino_tiny", "eager", STUDENT | TEACHER | HEADS, set(), 3 + 2),
        # the last block whose attention is looked at is computed by hand
        ("dora_tiny", "aot_eager", STUDENT | TEACHER | HEADS, {LAST}, 3 + 2),
        # one version in the encoder, one in the decoder
        ("mae_tiny", "aot_eager", STUDENT | {"decoder.blocks.0"}, set(), 2),
    ],
)
def test_every_way_through_a_transformer_is_compiled(name, backend, compiled, idle, versions):
    expected, _ = fit(family(name))
    assert counters["frames"]["ok"] == 0
    callback, counted = Compile(["encoder", "decoder", "heads"], backend=backend), Counted()
    found, _ = fit(family(name), callback, counted, steps=3)
    assert found.compiled == [False, True, True]
    assert counted.calls.keys() == compiled
    assert {part for part, calls in counted.calls.items() if calls == 0} == idle
    assert counters["frames"]["ok"] == 1 + versions  # the trial's
    assert counters["frames"]["total"] == counters["frames"]["ok"]
    assert not counters["graph_break"]
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


TWO = ("online", "target.module")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("moco_tiny", {"projector"}),
        ("vicreg_tiny", {"projector"}),
        ("pixpro_fpn_tiny", {"projector", "decoder.fpn", "decoder.head"}),
    ],
)
def test_projectors_and_pyramids_are_called_as_they_were_compiled(name, parts):
    counted = Counted()
    fit(family(name), Compile(["decoder", "heads"], backend="eager"), counted, steps=2)
    networks = TWO[:1] if name == "vicreg_tiny" else TWO
    assert {part for part in counted.calls if not part.startswith("propagation")} == {
        f"{network}.{part}" for network in networks for part in parts
    }
    assert all(counted.calls.values())


class Copies(L.Callback):
    """What is copied and written while compiled modules are there."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.online.encoder._compiled_call_impl is not None:
            self.copied = copy.deepcopy(module.online)
            self.unpickled = pickle.loads(pickle.dumps(module.online))
            frames = counters["frames"]["total"]
            module.eval()
            module.embed(torch.rand(3, 3, 16, 24))  # another size, another mode
            module.train()
            self.compiled_for_evaluation = counters["frames"]["total"] - frames


def test_copies_are_plain_and_evaluation_is_not_compiled():
    copies = Copies()
    fit(byol(), Compile(["encoder"], backend="eager"), copies, steps=2)
    for made in (copies.copied, copies.unpickled):
        assert made.encoder._compiled_call_impl is None
        assert made.encoder(torch.rand(2, 3, 32, 32)).vector.shape == (2, 64)
    assert copies.compiled_for_evaluation == 0


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole, _ = fit(byol(), steps=4)
    _, trainer = fit(byol(), steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    compiled = Compile(["encoder"], backend="eager")
    rest, _ = fit(byol(), compiled, steps=4, first=2, ckpt_path=tmp_path / "two.ckpt")
    assert rest.compiled == [False, True]
    assert rest.losses == pytest.approx(whole.losses[2:], rel=1e-5)


def test_which_modules_are_compiled():
    method = poodle(flow=Learned())
    online, target = method.online, method.target.module
    assert modules_of("encoder", method) == [online.encoder, target.encoder]
    assert modules_of("decoder", method) == [online.decoder, target.decoder]
    assert modules_of("flow", method) == list(method.flow.net.module.children())
    assert len(modules_of("heads", method)) == 6  # two projectors twice, two predictors
    assert modules_of("flow", poodle()) == modules_of("flow", byol()) == modules_of("decoder", byol()) == []


def test_frozen_flow_network_is_compiled_though_it_never_trains():
    method = poodle(flow=Learned())
    seen = []

    class See(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append([p._compiled_call_impl is not None for p in module.flow.net.module.children()])

    fit(method, Compile(["flow"], backend="eager"), See(), steps=2)
    assert seen == [[False, False], [True, True]]
    assert counters["frames"]["ok"] == 1 + 2  # the trial and the two parts
    assert all(part._compiled_call_impl is None for part in method.flow.net.module.children())


def test_no_compiler_is_a_warning_and_training_goes_on():
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler\nwas found")

    torch._dynamo.register_backend(broken, name="broken_here")
    with pytest.warns(UserWarning, match=r"goes on without torch\.compile.*no C\+\+ compiler was found"):
        watch, _ = fit(byol(), Compile(backend="broken_here"), steps=2)
    assert watch.compiled == [False, False]
    assert len(watch.losses) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": ["encoder", "encodr"]}, "parts encodr: choose from encoder, decoder, heads, flow"),
        ({"parts": []}, r"parts \(none\): choose from"),
        ({"backend": "indctor"}, "Compile: .*indctor"),
        ({"mode": "fastest"}, "Compile: .*fastest"),
        ({"parts": ["decoder", "flow"], "backend": "eager"}, "FlowE has no decoder, no flow to compile"),
    ],
)
def test_what_cannot_be_compiled_is_said_in_one_line(arguments, message):
    method = FlowE(tiny_encoder(output_stride=8), Given(), hidden=8, out=4, recipe=tiny_recipe())
    with pytest.raises(UserError, match=message) as caught:
        Compile(**arguments).on_fit_start(L.Trainer(logger=False, accelerator="cpu"), method)
    assert "\n" not in str(caught.value)


def test_the_shipped_patch_is_taken(tmp_path, capsys):
    """As far as its values are read: a backend that does not exist is refused by the callback itself."""
    configs = ["--config", "experiment/demo_byol.yaml", "--config", "patch/compile.yaml"]
    tiny = ["--data.source=synthetic", "--data.root=null", "--data.num_workers=0", "--trainer.max_steps=1"]
    wrong = ["--trainer.callbacks.backend=nothing", f"--trainer.default_root_dir={tmp_path}"]
    assert cli.main(["fit", *configs, *tiny, *wrong]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "Compile" in line
    assert "nothing" in line
