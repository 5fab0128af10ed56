import argparse
import collections

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from poodle_lightning.nn.weights import LeftOut, load_state, read_file, read_state
from poodle_lightning.types import UserError


def net(width=3):
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))


def test_both_formats_and_wrappers_give_the_same_state(tmp_path):
    state = net().state_dict()
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"model": state, "epoch": 1}, tmp_path / "wrapped.pt")
    save_file(state, tmp_path / "w.safetensors")
    for name in ("bare.pth", "wrapped.pt", "w.safetensors"):
        found = read_state(tmp_path / name)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[k], state[k]) for k in state)


def test_old_files_without_the_batch_counter_load():
    source, module = net(), net()
    source[1].running_mean.fill_(2.0)
    load_state(module, {k: v for k, v in source.state_dict().items() if "num_batches" not in k}, "old.pth")
    assert torch.equal(module[0].weight, source[0].weight)
    assert torch.equal(module[1].running_mean, source[1].running_mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update({"0.weight": torch.ones(2, 3, 1, 1)}),
            r"'0.weight' should have the shape \(3, 3, 1, 1\).*\(2, 3, 1, 1\)",
        ),
        (lambda s: s.pop("1.running_var"), "lacks 1 keys, first '1.running_var'"),
        (lambda s: s.update({"more": torch.ones(1)}), "in excess 1 keys, first 'more'"),
        (lambda s: s.clear(), "no key matches"),
    ],
)
def test_what_does_not_fit_leaves_the_module_untouched(change, message):
    module = net()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = {k: v + 1 for k, v in module.state_dict().items()}
    change(state)
    with pytest.raises(UserError, match=message) as caught:
        load_state(module, state, "some.pth")
    assert str(caught.value).startswith("some.pth")
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "x.pth").write_text("not at all a checkpoint")
    with pytest.raises(UserError, match=r"x\.pth is truncated"):
        read_file(tmp_path / "x.pth")


class Settings:
    """A class of another project: it must never be made again from a file."""

    made = 0

    def __setstate__(self, state):
        Settings.made += 1
        self.__dict__.update(state)


class Runs:
    """What an attacker would write: loading it with pickle runs code."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (exec, (f"open({str(self.target)!r}, 'w').close()",))


@pytest.mark.parametrize("old_format", [False, True])
def test_settings_beside_the_weights_are_left_out(tmp_path, old_format):
    args = argparse.Namespace(arch="vit_small", lr=0.1)
    if not old_format:
        args.scale = np.float64(2.0)
    content = {"model": net().state_dict(), "args": args, "epoch": 3}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(UserError, match="could run code"):
        read_file(tmp_path / "w.pth")
    found = read_file(tmp_path / "w.pth", leave_out_objects=True)
    assert found["epoch"] == 3
    assert all(torch.equal(found["model"][k], v) for k, v in content["model"].items())
    assert type(found["args"]) is LeftOut
    assert vars(found["args"]) == {}


def test_nothing_of_the_file_is_imported_called_or_filled(tmp_path):
    settings = Settings()
    settings.inner = {"rate": np.float32(0.5), "table": np.arange(3), "kind": Settings}
    content = {
        "settings": settings,
        "more": [collections.defaultdict(dict), Runs(tmp_path / "proof")],
        "w": torch.ones(2),
    }
    torch.save(content, tmp_path / "w.pth")
    found = read_file(tmp_path / "w.pth", leave_out_objects=True)
    assert torch.equal(found["w"], torch.ones(2))
    assert type(found["settings"]) is LeftOut
    assert [type(item) for item in found["more"]] == [LeftOut, LeftOut]
    assert Settings.made == 0
    assert not (tmp_path / "proof").exists()
    with pytest.raises(UserError, match="could run code"):  # what is known is forgotten again
        read_file(tmp_path / "w.pth")


def test_a_file_that_wants_the_shell_is_refused(tmp_path):
    import os

    torch.save({"w": torch.ones(2), "f": os.system}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="could run code"):
        read_file(tmp_path / "w.pth", leave_out_objects=True)


@pytest.mark.parametrize("keep", [0.0, 0.4, 0.95])
def test_truncated_files_of_others(tmp_path, keep):
    torch.save({"model": net(40).state_dict(), "args": argparse.Namespace()}, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UserError, match=r"w\.pth is truncated") as caught:
        read_file(tmp_path / "w.pth", leave_out_objects=True)
    assert "\n" not in str(caught.value)
