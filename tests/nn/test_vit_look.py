"""The last block's attention, queries and keys, against timm's path without fusion."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from vit_twins import SIZES, pair, split, timms_last_block

from poodle_lightning.nn.vit import ViT


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("size", [(32, 48), (48, 32), (40, 72)])
def test_looking_gives_the_last_blocks_attention(class_token, size):
    ours, reference = pair(class_token)
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        plain, found = ours(images), ours.look(images)
    attention, queries, keys = timms_last_block(reference, (images - ours.mean) / ours.std)
    count = (size[0] // 8) * (size[1] // 8) + class_token
    assert found.attention.shape == (2, 2, count, count)
    torch.testing.assert_close(found.attention, attention, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.queries, split(queries, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.keys, split(keys, 2), rtol=1e-5, atol=1e-5)
    assert found.maps.keys() == plain.maps.keys()
    assert found.strides == plain.strides
    for name, cells in plain.maps.items():
        torch.testing.assert_close(found.maps[name], cells, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.vector, plain.vector, rtol=1e-6, atol=1e-6)
    assert plain.attention is plain.queries is plain.keys is None


@pytest.mark.parametrize("heads", [None, 4])
def test_both_ways_compute_the_same_network(heads):
    """In float64, where rounding hides nothing."""
    ours = pair()[0].double()
    images = torch.rand(2, 3, 40, 72, dtype=torch.float64)
    with torch.no_grad():
        plain, found = ours(images), ours.look(images, heads)
    assert found.attention.dtype == torch.float64
    for name, cells in plain.maps.items():
        torch.testing.assert_close(found.maps[name], cells, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.vector, plain.vector, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 4, 16])
def test_heads_split_anew(heads):
    """Attention row by row in float64 from timm's queries and keys; the network's output stays."""
    ours, reference = pair()
    images = torch.rand(2, 3, 40, 48)
    with torch.no_grad():
        plain, found = ours(images), ours.look(images, heads=heads)
    _, queries, keys = timms_last_block(reference, (images - ours.mean) / ours.std)
    width = 64 // heads
    for image in range(2):
        for head in range(heads):
            of_head = slice(head * width, (head + 1) * width)
            q, k = (part[image, :, of_head].double().numpy() for part in (queries, keys))
            scores = np.exp(q @ k.T / math.sqrt(width))
            rows = scores / scores.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(found.attention[image, head].numpy(), rows, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.queries, split(queries, heads), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.keys, split(keys, heads), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.vector, plain.vector, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.last, plain.last, rtol=1e-6, atol=1e-6)


class Calls(TorchFunctionMode):
    """Counts the functions of torch that are called inside."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count[function.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("call", "fused", "softmax"),
    [
        (lambda network, images: network(images), 3, 0),
        (lambda network, images: network.tokens(images), 3, 0),
        (lambda network, images: network.look(images), 2, 1),
        (lambda network, images: network.look(images, heads=2), 2, 1),
        (lambda network, images: network.look(images, heads=4), 3, 1),
        (lambda network, images: network.look(images, rows=1), 3, 1),
        (lambda network, images: network.look(images, heads=4, rows=2), 3, 1),
    ],
)
def test_attention_is_fused_where_nobody_looks_and_computed_once_where_somebody_does(call, fused, softmax):
    ours, _ = pair()
    with torch.no_grad(), Calls() as calls:
        call(ours, torch.rand(1, 3, 32, 48))
    assert calls.count["scaled_dot_product_attention"] == fused
    assert calls.count["softmax"] == softmax
    assert calls.count["linear"] == 3 * 4  # qkv, proj, fc1 and fc2 of each block, once


@pytest.mark.parametrize("rows", [1, 3, 31])
@pytest.mark.parametrize("heads", [None, 2, 4])
def test_some_rows_are_those_of_the_whole(heads, rows):
    ours = pair()[0].double()
    images = torch.rand(2, 3, 40, 48, dtype=torch.float64)
    with torch.no_grad():
        whole, some, plain = ours.look(images, heads), ours.look(images, heads, rows), ours(images)
    assert some.attention.shape == (2, heads or 2, rows, 31)
    torch.testing.assert_close(some.attention, whole.attention[:, :, :rows], rtol=1e-12, atol=1e-15)
    assert torch.equal(some.queries, whole.queries)
    assert torch.equal(some.keys, whole.keys)
    for name, cells in plain.maps.items():
        torch.testing.assert_close(some.maps[name], cells, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(some.vector, plain.vector, rtol=1e-12, atol=1e-12)


def test_the_scores_of_other_rows_are_never_made():
    """Counted: the largest tensor that a product returns while only [CLS] is looked at."""
    ours, _ = pair()
    largest = []

    class Products(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if function.__name__ in ("matmul", "__matmul__", "softmax"):
                largest.append(found.shape)
            return found

    with torch.no_grad(), Products():
        ours.look(torch.rand(1, 3, 32, 48), rows=1)
    assert largest
    assert set(largest) == {(1, 2, 1, 25)}


def test_rows_sum_to_one_under_autocast():
    ours, _ = pair()
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        exact = ours.look(images).attention
        with torch.autocast("cpu", torch.bfloat16):
            for heads, rows in ((None, None), (16, None), (None, 1), (16, 1)):
                found = ours.look(images, heads, rows)
                assert found.attention.dtype == torch.float32
                assert found.queries.dtype == torch.bfloat16
                sums = found.attention.sum(dim=-1)
                torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-6)
            plain, found = ours(images), ours.look(images)
    torch.testing.assert_close(found.attention, exact, rtol=0.2, atol=5e-3)
    torch.testing.assert_close(found.vector, plain.vector, rtol=0.05, atol=0.05)


class Told(TorchDispatchMode):
    """What cuBLAS is told about float32 at every product of two batches of matrices."""

    def __init__(self):
        super().__init__()
        self.told = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "bmm":
            self.told.append(torch.backends.cuda.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("heads", [None, 16])
def test_scores_are_float32_where_the_network_may_use_tf32(heads):
    ours, _ = pair()
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        with torch.no_grad(), Told() as products:
            ours.look(torch.rand(1, 3, 32, 48), heads, rows=1)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
    assert products.told == ["ieee"]  # all other attention is fused


def gradients(network, loss):
    network.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def test_gradients_flow_through_looking():
    ours, _ = pair()
    images, target = torch.rand(2, 3, 32, 48), torch.randn(2, 64)
    plain = gradients(ours, functional.mse_loss(ours(images).vector, target))
    found = gradients(ours, functional.mse_loss(ours.look(images).vector, target))
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    looked = ours.look(images, heads=4)
    entropy = -(looked.attention * looked.attention.log()).sum(dim=-1).mean()
    found = gradients(ours, entropy + looked.queries.square().mean() + looked.keys.square().mean())
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.2.attn.qkv.weight"} <= found.keys()
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found["blocks.2.attn.qkv.weight"][:128].abs().max() > 0
    assert not found["blocks.2.attn.qkv.weight"][128:].any()  # the values have no part in it


def test_drop_path_rises_and_is_drawn_alike_with_and_without_a_look():
    ours = ViT(**SIZES, drop_path=0.4).train()
    assert [getattr(block.drop_path2, "drop_prob", 0.0) for block in ours.blocks] == pytest.approx(
        [0, 0.2, 0.4]
    )
    images = torch.rand(8, 3, 32, 48)
    with torch.no_grad():
        torch.manual_seed(3)
        plain = ours(images).vector
        torch.manual_seed(3)
        torch.testing.assert_close(ours.look(images).vector, plain, rtol=1e-5, atol=1e-5)
        torch.manual_seed(3)
        torch.testing.assert_close(ours.look(images, rows=1).vector, plain, rtol=1e-5, atol=1e-5)
        torch.manual_seed(4)
        assert (ours(images).vector - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["call", "masked", "look", "split", "rows", "kept"])
def test_compiles_into_one_graph(name):
    ours = ViT(**{**SIZES, "depth": 1}, mask_token=True).eval()
    images = torch.rand(1, 3, 40, 48)
    call, arguments = {
        "call": (ours, ()),
        "masked": (ours, (torch.ones(1, 5, 6, dtype=torch.bool),)),
        "look": (ours.look, ()),
        "split": (ours.look, (4,)),
        "rows": (ours.look, (None, 1)),
        "kept": (ours.tokens, (torch.tensor([[3, 1]]),)),
    }[name]
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(call, fullgraph=True, backend="eager")(images, *arguments)
        expected = call(images, *arguments)
    if name == "kept":
        torch.testing.assert_close(found, expected)
    else:
        torch.testing.assert_close(found.vector, expected.vector)
        torch.testing.assert_close(found.last, expected.last)
