"""RAFT around torchvision's network: same flow as torchvision's own forward, frozen, float32, hidden."""

import contextlib
import copy
import urllib.error
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.optical_flow import raft_large, raft_small

from poodle_lightning.configured import build, spec
from poodle_lightning.flow import raft as raft_file
from poodle_lightning.flow.raft import RAFT
from poodle_lightning.ops import geometry
from poodle_lightning.ops.geometry import Affine, Flow
from poodle_lightning.types import Clip, FlowEstimator, UserError

SIZE = (128, 144)  # multiples of 8 and large enough: torchvision takes them as they are


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The file of a random raft_small."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(raft_small(weights=None).state_dict(), path)
    return path


def small(weights, **changes):
    return RAFT("small", weights=str(weights), **{"iterations": 2, **changes})


def stock(weights):
    net = raft_small(weights=None)
    net.load_state_dict(torch.load(weights, weights_only=True))
    return net.eval()


def frames(count=2, size=SIZE):
    return torch.rand(count, 2, 3, *size, generator=torch.Generator().manual_seed(0))


def clip_of(clean, flow=None):
    count, size = len(clean), tuple(clean.shape[-2:])
    return Clip(
        frames=(clean * 255).byte(),
        window=Affine.identity(count),
        size=size,
        times=torch.zeros(count, 2, dtype=torch.float64),
        index=torch.arange(count),
        key=torch.arange(count),
        flow=flow,
    )


@torch.no_grad()
def reference(net, first, second, iterations=2):
    return net(first * 2 - 1, second * 2 - 1, num_flow_updates=iterations)[-1]


def test_equals_torchvisions_forward_in_both_directions(weights):
    clean = frames()
    flow = small(weights)(clip_of(clean), clean)
    net = stock(weights)
    expected = [reference(net, clean[:, a], clean[:, b]) for a, b in ((0, 1), (1, 0))]
    assert flow.displacement.dtype == torch.float32
    assert torch.cat(expected).abs().mean() > 0.1  # not a comparison of zeros
    torch.testing.assert_close(flow.to_pixels(), torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_large_equals_torchvisions_forward_and_keeps_batchnorm_in_eval(tmp_path):
    """The context encoder of ``large`` has BatchNorm: buffers far from 0 and 1 tell eval from train."""
    torch.manual_seed(5)
    net = raft_large(weights=None)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "large.pth")
    clean = frames(1, (128, 128))
    ours = RAFT("large", weights=str(tmp_path / "large.pth"), iterations=1).train()
    expected = reference(net.eval(), clean[:, 0], clean[:, 1], 1)
    torch.testing.assert_close(ours.estimate(clean).to_pixels()[:1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(130, 141), (40, 150), (12, 12)])
def test_pads_with_the_border_and_cuts_back(weights, size):
    clean = frames(1, size)
    flow = small(weights).estimate(clean).to_pixels()
    assert flow.shape == (2, 2, *size)

    def padded(x):
        height, width = (max(128, -(-n // 8) * 8) for n in size)
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        ys = (torch.arange(height) - top).clamp(0, size[0] - 1)
        xs = (torch.arange(width) - left).clamp(0, size[1] - 1)
        return x[..., ys[:, None], xs], (slice(top, top + size[0]), slice(left, left + size[1]))

    (first, inner), (second, _) = padded(clean[:, 0]), padded(clean[:, 1])
    expected = reference(stock(weights), first, second)[..., inner[0], inner[1]]
    torch.testing.assert_close(flow[:1], expected, atol=1e-4, rtol=1e-4)


def test_same_under_autocast(weights):
    clean, raft = frames(1), small(weights)
    expected = raft(clip_of(clean), clean)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
        flow = raft(clip_of(clean), clean)
    assert torch.equal(flow.displacement, expected.displacement)


def test_the_split_of_a_batch_changes_nothing(weights):
    clean = frames(3)
    whole = small(weights, pairs_at_once=3).estimate(clean).displacement
    for split in (1, 2):
        parts = small(weights, pairs_at_once=split).estimate(clean).displacement
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    halves = [small(weights).estimate(part).displacement.unflatten(0, (2, -1)) for part in clean.split(2)]
    torch.testing.assert_close(torch.cat(halves, dim=1).flatten(0, 1), whole, atol=1e-5, rtol=0)


class Owner(nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.flow = flow


def test_owner_neither_trains_nor_saves_it(weights):
    owner = Owner(small(weights))
    assert set(owner.state_dict()) == {"layer.weight", "layer.bias"}
    assert len(list(owner.parameters())) == 2
    owner.load_state_dict(Owner(small(weights)).state_dict(), strict=True)
    owner.train()
    net = owner.flow.net.module
    assert not any(module.training for module in net.modules())
    assert not any(p.requires_grad for p in net.parameters())
    clean = frames(1).requires_grad_()
    assert not owner.flow.estimate(clean).displacement.requires_grad


def test_half_precision_of_the_owner_does_not_reach_it(weights):
    clean = frames(1)
    expected = small(weights).estimate(clean).displacement
    owner = Owner(small(weights)).to(torch.bfloat16)
    assert owner.layer.weight.dtype == torch.bfloat16
    assert torch.equal(owner.flow.estimate(clean).displacement, expected)
    assert next(owner.to("meta").flow.net.module.parameters()).device.type == "meta"


def test_holds_no_correlation_volume_after_the_call(weights, monkeypatch):
    made = []
    monkeypatch.setattr(
        raft_file, "_Correlation", lambda *args: made.append(weakref.ref(x := Kept(*args))) or x
    )
    raft = small(weights)
    raft.estimate(frames(1))
    assert [volume() for volume in made] == [None]
    assert [volume.numel() for volume in raft.net.module.corr_block.corr_pyramid] == [1]


class Kept(raft_file._Correlation):
    """One that can be watched."""


# ---- what it costs
class Ops(TorchDispatchMode):
    """Counts operations by name, and those whose result is not on the device of the network."""

    def __init__(self, device):
        super().__init__()
        self.device, self.count, self.elsewhere = device, Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count[str(func)] += 1
        if isinstance(out, torch.Tensor) and out.device.type != self.device:
            self.elsewhere[str(func)] += 1
        return out


READS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal.default", "is_nonzero")


@pytest.mark.parametrize("size", ["small", "large"])
def test_nothing_is_read_from_the_device_and_nothing_is_copied_to_it(monkeypatch, size):
    """On ``meta`` a read is an error, and whatever is made on the host shows by its device."""
    for place in (raft_file, geometry):  # autocast does not know this device
        monkeypatch.setattr(place, "island", lambda device_type: contextlib.nullcontext())
    raft, counts = RAFT(size, weights=None).to("meta"), {}
    clean = frames(3).to("meta")
    for raft.iterations in (1, 2):
        with Ops("meta") as ops:
            flow = raft.estimate(clean)
        assert flow.displacement.shape == (6, 2, *SIZE)
        assert not {name: n for name, n in ops.count.items() if any(read in name for read in READS)}
        assert not ops.elsewhere
        counts[raft.iterations] = ops.count
    iteration = counts[2] - counts[1]
    assert iteration["aten.grid_sampler_2d.default"] == 4
    made = ("copy", "arange", "linspace", "full", "empty", "zeros", "ones", "lift_fresh", "scalar_tensor")
    assert not [name for name in iteration if any(word in name for word in made)]


def multiply_adds(act):
    """Half of the operations that PyTorch's own counter finds."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        act()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("size", "iterations"), [("small", 3), ("large", 3)])
def test_saves_two_feature_encodings_one_product_and_all_masks_but_the_last(size, iterations):
    """Per pair, against torchvision's forward in both directions."""
    raft, clean = RAFT(size, None, iterations), frames(1)
    net, (height, width) = raft.net.module, (side // 8 for side in SIZE)
    first, second = clean[:, 0], clean[:, 1]
    ours = multiply_adds(lambda: raft.estimate(clean))
    theirs = multiply_adds(lambda: [net(*pair, iterations) for pair in ((first, second), (second, first))])
    encoding = multiply_adds(lambda: net.feature_encoder(first))
    channels = net.feature_encoder(first).shape[1]
    hidden = torch.zeros(1, net.update_block.hidden_state_size, height, width)
    mask = 0 if net.mask_predictor is None else multiply_adds(lambda: net.mask_predictor(hidden))
    assert theirs - ours == 2 * encoding + channels * (height * width) ** 2 + 2 * (iterations - 1) * mask
    assert min(encoding, channels) > 0


def test_look_up_equals_torchvisions_also_outside_of_the_image(weights):
    """Far out, on the border, between pixels: zeros beyond the image, as the weights know it."""
    block = stock(weights).corr_block
    draw = torch.Generator().manual_seed(2)
    features = torch.randn(2, 8, 16, 19, generator=draw)  # odd: the coarser levels leave a column out
    centres = torch.rand(2, 2, 16, 19, generator=draw) * 60 - 20
    centres[:, :, :4] = centres[:, :, :4].round()
    block.build_pyramid(features, features.roll(1, dims=0))
    expected = block.index_pyramid(centres)
    found = raft_file._Correlation(features, block)(centres)
    assert (expected == 0).float().mean() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_lower_precision_is_near_and_says_so(weights):
    clean = frames(1)
    exact, lower = small(weights), small(weights, precision="bfloat16")
    expected, flow = exact.estimate(clean).to_pixels(), lower.estimate(clean).to_pixels()
    assert flow.dtype == torch.float32
    off = (flow - expected).norm() / expected.norm()
    assert 1e-4 < off < 0.05  # 8 bits of mantissa, not the same numbers
    assert lower.fingerprint.endswith("bfloat16")
    assert "float" not in exact.fingerprint
    owner = Owner(lower).to(torch.float32)
    assert torch.equal(owner.flow.estimate(clean).to_pixels(), flow)
    with pytest.raises(UserError, match="no precision 'half'"):
        small(weights, precision="half")


def test_many_pairs_of_pixels_are_one_batch(weights, monkeypatch):
    raft, passes = small(weights, pairs_at_once=1), []
    both_ways = raft._both_ways
    monkeypatch.setattr(raft, "_both_ways", lambda clean: passes.append(len(clean)) or both_ways(clean))
    pairs = list((frames(3) * 255).round().byte().permute(0, 1, 3, 4, 2).numpy())
    flow = raft.pixels_of(pairs)
    assert passes == [3]
    for found, pair in zip(flow, pairs, strict=True):
        np.testing.assert_allclose(found, raft.pixels(*pair), atol=1e-5)


def test_takes_the_clips_own_flow_and_estimates_the_rest(weights):
    clean = frames()
    given = torch.full((2, 2, 2, *SIZE), torch.nan)
    given[0] = 3.0
    flow = small(weights)(clip_of(clean, given), clean)
    torch.testing.assert_close(flow.to_pixels()[::2], torch.full((2, 2, *SIZE), 3.0))
    alone = small(weights).estimate(clean[1:])
    torch.testing.assert_close(
        Flow(flow.displacement[1::2]).to_pixels(), alone.to_pixels(), atol=1e-4, rtol=0
    )


def test_pixels_equals_the_estimate(weights):
    pair = (frames(1)[0] * 255).round().byte()
    first, second = pair.permute(0, 2, 3, 1).numpy()
    flow = small(weights).pixels(first, second)
    expected = small(weights).estimate(pair[None] / 255.0).to_pixels()
    assert flow.dtype == np.float32
    np.testing.assert_allclose(flow, expected.numpy(), atol=1e-5)


def test_without_weights_it_is_random_but_works():
    flow = RAFT("small", weights=None, iterations=1).estimate(frames(1))
    assert flow.displacement.isfinite().all()


def test_fingerprint_tells_weights_and_iterations_apart(weights):
    prints = {
        small(weights).fingerprint,
        small(weights, iterations=3).fingerprint,
        RAFT("small", None, 2).fingerprint,
    }
    assert len(prints) == 3
    assert small(weights).fingerprint in prints


def test_is_an_estimator_plain_data_and_copies(weights):
    raft = small(weights)
    assert isinstance(raft, FlowEstimator)
    clean = frames(1)
    for other in (build(spec(raft)), copy.deepcopy(raft)):
        assert torch.equal(other.estimate(clean).displacement, raft.estimate(clean).displacement)


def test_no_pairs_have_no_flow():
    flow = RAFT("small", None, 1).estimate(torch.zeros(0, 2, 3, *SIZE))
    assert flow.displacement.shape == RAFT("small", None, 1).estimate(frames(1)).displacement[:0].shape
    assert flow.displacement.dtype == torch.float32


def one_line(caught):
    assert "\n" not in str(caught.value)


def test_missing_file_and_unknown_name_name_the_remedy():
    with pytest.raises(UserError, match=r"'nowhere\.pth'.*C_T_V1.*DIS") as caught:
        RAFT("small", weights="nowhere.pth")
    one_line(caught)
    with pytest.raises(UserError, match="no size 'huge'"):
        RAFT("huge", weights=None)


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError("invalid hash value")])
def test_a_failing_download_names_the_remedy(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(UserError, match=r"C_T_V2 cannot be downloaded.*https://.*path.*DIS") as caught:
        RAFT("small", weights="C_T_V2")
    one_line(caught)


def test_weights_of_another_size_or_broken_are_refused(weights, tmp_path):
    with pytest.raises(UserError, match="does not fit RAFT large") as caught:
        RAFT("large", weights=str(weights))
    one_line(caught)
    torn = tmp_path / "torn.pth"
    torn.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"torn\.pth") as caught:
        RAFT("small", weights=str(torn))
    one_line(caught)


def test_numbers_that_are_not_positive_are_refused():
    for changes in ({"iterations": 0}, {"pairs_at_once": 0}):
        with pytest.raises(ValueError, match="positive"):
            RAFT("small", weights=None, **changes)
