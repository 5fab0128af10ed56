import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from poodle_lightning.nn.weights import load_state, read_file, read_state
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
