import math
from dataclasses import replace

import pytest
import torch
from tiny_models import make_clip, tiny_encoder, tiny_recipe, tiny_sdm

from poodle_lightning.augment.geometric import AffineFlip, draw_views
from poodle_lightning.augment.photometric import recolour
from poodle_lightning.flow.given import Given
from poodle_lightning.methods.poodle import PooDLe
from poodle_lightning.nn.sdm import SDM
from poodle_lightning.ops.crops import SubcropRecipe
from poodle_lightning.ops.geometry import Affine, Flow, pixel_grid, pull, warp_into_view
from poodle_lightning.ops.pairs import both_directions, direction_keys
from poodle_lightning.ops.random import key_of
from poodle_lightning.types import Features


def tiny_poodle(**kwargs) -> PooDLe:
    torch.manual_seed(0)
    encoder = kwargs.pop("encoder", None) or tiny_encoder()
    defaults = {
        "decoder": tiny_sdm(encoder),
        "flow": Given(),
        "hidden": 16,
        "out": 8,
        "subcrops": SubcropRecipe(count=3, size=(16, 16)),
        "recipe": tiny_recipe(),
    }
    return PooDLe(encoder, **{**defaults, **kwargs})


def bilinear(image, x, y):
    """One bilinear read at extent coordinates, clamped; plain floats."""
    _, height, width = image.shape
    px = min(max((x + 1) * width / 2 - 0.5, 0.0), width - 1.0)
    py = min(max((y + 1) * height / 2 - 0.5, 0.0), height - 1.0)
    x0, y0 = int(px), int(py)
    x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
    top = (1 - px + x0) * image[:, y0, x0] + (px - x0) * image[:, y0, x1]
    low = (1 - px + x0) * image[:, y1, x0] + (px - x0) * image[:, y1, x1]
    return (1 - py + y0) * top + (py - y0) * low


def distance(a, b) -> float:
    return 2 - 2 * float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def affine_at(matrix, x, y):
    return (
        matrix[0][0] * x + matrix[0][1] * y + matrix[0][2],
        matrix[1][0] * x + matrix[1][1] * y + matrix[1][2],
    )


def dense_by_loops(p, to_clean_a, z, to_clean_b, flow_px, alpha1, alpha2):
    """Paper §3 and App. A in Python floats: un-augment, then warp; DDFlow occlusion; mean per image."""
    rows, _, height, width = flow_px.shape
    total = 0.0
    for i in range(rows):
        partner = (i + rows // 2) % rows
        inverse_a = torch.linalg.inv(to_clean_a[i]).tolist()
        inverse_b = torch.linalg.inv(to_clean_b[i]).tolist()
        loss, count = 0.0, 0
        for row in range(height):
            for column in range(width):
                x, y = (2 * column + 1) / width - 1, (2 * row + 1) / height - 1
                fx, fy = float(flow_px[i, 0, row, column]), float(flow_px[i, 1, row, column])
                mx, my = x + fx * 2 / width, y + fy * 2 / height
                if max(abs(mx), abs(my)) > 1:
                    continue
                bx, by = bilinear(flow_px[partner], mx, my).tolist()
                gap = (fx + bx) ** 2 + (fy + by) ** 2
                if gap > alpha1 * (fx**2 + fy**2 + bx**2 + by**2) + alpha2:
                    continue
                ax, ay = affine_at(inverse_a, x, y)
                vx, vy = affine_at(inverse_b, mx, my)
                if max(map(abs, (ax, ay, vx, vy))) > 1:
                    continue
                loss, count = loss + distance(bilinear(p[i], ax, ay), bilinear(z[i], vx, vy)), count + 1
        total += loss / max(count, 1)
    return total / rows


def test_both_losses_equal_the_formula_in_loops():
    method = tiny_poodle(view=AffineFlip()).double().eval()
    clip = make_clip()
    torch.manual_seed(1)
    clip.flow.add_(torch.randn_like(clip.flow) * 1.2)  # so that some pixels are occluded
    terms = {name: float(value) for name, value in method.losses(clip).items()}

    clean = clip.unit().double()
    flow = method.flow(clip, clean)
    u, v = both_directions(recolour(method.colour, clean, clip.key).double())
    a, b = draw_views(method.view, u, v, direction_keys(clip.key))
    p = method.dense_predictor(method.online.dense(a.image.double()))
    z = method.target.module.dense(b.image.double())
    dense = dense_by_loops(
        p.detach(),
        a.to_clean.matrix.double(),
        z,
        b.to_clean.matrix.double(),
        flow.to_pixels().double(),
        0.1,
        0.5,
    )
    assert abs(terms["dense"] - 0.5 * dense) < 1e-5

    pairs = method.pairs(flow, clip.key)
    total, count = 0.0, 0
    for row in range(len(pairs.online)):
        crops = []
        other = u if bool(pairs.same[row]) else v
        for image, box in (
            (u[row // 3], pairs.online.matrix[row]),
            (other[row // 3], pairs.target.matrix[row]),
        ):
            crop = method.online.encoder.mean.double().expand(3, 16, 16).clone()  # outside the frame
            for j in range(16):
                for i in range(16):
                    x, y = affine_at(box.tolist(), (2 * i + 1) / 16 - 1, (2 * j + 1) / 16 - 1)
                    if max(abs(x), abs(y)) <= 1 + 5e-7:
                        crop[:, j, i] = bilinear(image.double(), x, y)
            crops.append(crop)
        q = method.pooled_predictor(method.online.pooled(crops[0][None]))[0]
        t = method.target.module.pooled(crops[1][None])[0]
        total, count = total + distance(q.detach(), t), count + 1
    assert abs(terms["pooled"] - 0.5 * total / count) < 1e-5


def analytic_features(points: torch.Tensor) -> torch.Tensor:
    """A smooth 16-channel field of world coordinates, (B, H, W, 2) -> (B, 16, H, W)."""
    generator = torch.Generator().manual_seed(2)
    waves = torch.randn(16, 2, generator=generator, dtype=torch.float64) * 6
    phase = torch.rand(16, generator=generator, dtype=torch.float64) * 6.28
    return torch.sin(points.double() @ waves.T + phase).permute(0, 3, 1, 2)


def landing_cosine(stride: int, order: str, degrees: float, scale: float) -> float:
    """Mean cosine of online and target features after un-augmenting and warping, on exact features."""
    size = (128, 256)
    angle = math.radians(degrees)
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    pixels = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]]).double()
    centre = torch.tensor([[1.0, 0, 127.5], [0, 1, 63.5], [0, 0, 1]]).double()
    drawn = (centre @ pixels @ torch.linalg.inv(centre))[None]
    to_clean = Affine.from_kornia(drawn, clean=size, view=size)
    motion = torch.zeros(1, 2, *size)
    motion[:, 0], motion[:, 1] = 18.0, -9.0
    shift = torch.tensor([18.0 * 2 / 256, -9.0 * 2 / 128], dtype=torch.float64)
    coarse = pixel_grid((size[0] // stride, size[1] // stride))[None]
    online = analytic_features(coarse)  # frame a, not augmented
    target = analytic_features(to_clean(coarse).double() - shift)  # frame b shows x at x + F
    p, seen_p = pull(online, Affine.identity(1), size)
    z, seen_z = pull(target, warp_into_view(to_clean, Flow.from_pixels(motion), order), size)
    cosine = torch.nn.functional.cosine_similarity(p, z, dim=1)
    return float(cosine[seen_p & seen_z].mean())


def test_target_features_land_on_online_features():
    assert landing_cosine(1, "paper", 10.0, 1.1) > 0.999
    assert landing_cosine(8, "paper", 10.0, 1.1) > 0.998


def test_authors_order_agrees_without_an_affine_and_not_with_one():
    assert landing_cosine(1, "code", 0.0, 1.0) > 0.999
    assert landing_cosine(1, "code", 10.0, 1.1) < 0.97


ROWS = {  # paper, Table 4: which parts each row has
    "2 dense + pool, dilated": {"encoder": {"output_stride": 8}, "decoder": None},
    "3 dense + pool, top-down": {"decoder": {"lateral": False}},
    "4 dense + pool, lateral": {"decoder": {"top_down": False}},
    "5 dense, SDM": {"pooled_weight": 0.0},
    "7 PooDLe": {},
    "pooled alone": {"dense_weight": 0.0, "decoder": None},
}


@pytest.mark.parametrize("row", ROWS)
def test_every_ablation_row_trains_all_it_has(row):
    changes = dict(ROWS[row])
    encoder = tiny_encoder(**changes.pop("encoder", {}))
    if isinstance(changes.get("decoder"), dict):
        changes["decoder"] = tiny_sdm(encoder, **changes["decoder"])
    method = tiny_poodle(encoder=encoder, **changes)
    terms = method.losses(make_clip())
    assert set(terms) == {t for t in ("dense", "pooled") if changes.get(f"{t}_weight", 0.5) > 0}
    torch.stack(list(terms.values())).sum().backward()
    without = [
        n
        for n, p in method.named_parameters()
        if p.requires_grad and (p.grad is None or p.grad.abs().max() == 0)
    ]
    assert without == []
    assert all(p.grad is None for p in method.target.parameters())


def test_loss_is_symmetric_in_the_two_frames():
    method = tiny_poodle(view=None).eval()
    method.colour = lambda images, keys: images
    method.subcrops = SubcropRecipe(count=3, size=(16, 16))
    clip = make_clip()
    swapped = replace(clip, frames=clip.frames.flip(1), flow=clip.flow.flip(1))
    one, other = method.losses(clip)["dense"], method.losses(swapped)["dense"]
    assert torch.allclose(one, other, atol=1e-6)


def test_default_is_the_papers_method():
    method = PooDLe(encoder=tiny_encoder(), hidden=8, out=4, flow=Given())
    assert method.online.decoder.dims == 2048
    assert not method.online.decoder.recompute
    assert (method.dense_weight, method.pooled_weight) == (0.5, 0.5)
    assert method.view.degrees == 10.0
    assert method.subcrops.count == 6


def test_both_weights_zero_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        tiny_poodle(dense_weight=0.0, pooled_weight=0.0)


def test_draws_do_not_depend_on_how_the_batch_is_split():
    method = tiny_poodle().eval()
    whole = make_clip(batch=4)
    look = method.look(whole)
    half = whole[2:]
    part = method.look(half)
    rows = [2, 3, 6, 7]
    assert torch.equal(look.views[0].image[rows], part.views[0].image)
    crop_rows = torch.arange(24).reshape(8, 3)[rows].flatten()
    assert torch.equal(look.crops[1][crop_rows], part.crops[1])


def test_bfloat16_autocast_is_close_to_float32():
    method = tiny_poodle()
    clip = make_clip()
    plain = sum(method.losses(clip).values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = sum(method.losses(clip).values())
    assert narrow.dtype == torch.float32
    assert abs(float(plain - narrow)) / float(plain) < 2e-2


def test_keys_change_the_draws():
    method = tiny_poodle()
    clip = make_clip()
    other = replace(clip, key=torch.stack([key_of(9, 9, i) for i in range(2)]))
    assert not torch.equal(method.look(clip).crops[0], method.look(other).crops[0])


def test_without_a_dense_loss_there_is_no_untrained_decoder():
    method = tiny_poodle(decoder="default", dense_weight=0.0)
    assert method.online.decoder is None
    with pytest.raises(ValueError, match="nothing trains the decoder"):
        tiny_poodle(dense_weight=0.0)


def one_step(method, clip):
    """Terms of the loss, gradients and buffers of one training step."""
    terms = method.train().losses(clip)
    sum(terms.values()).backward()
    gradients = {n: p.grad for n, p in method.named_parameters() if p.requires_grad}
    return terms, gradients, dict(method.named_buffers())


def test_commuted_projector_changes_no_loss_no_gradient_and_no_statistics():
    clip = make_clip()
    plain, commuted = tiny_poodle(commute=False).double(), tiny_poodle().double()
    assert list(plain.state_dict()) == list(commuted.state_dict())
    expected, gradients, buffers = one_step(plain, clip)
    found, own_gradients, own_buffers = one_step(commuted, clip)
    for term, value in expected.items():
        assert abs(float(found[term] - value)) < 1e-12 * float(value)
    for name, value in gradients.items():  # a bias in front of a BatchNorm has a gradient of rounding only
        assert (own_gradients[name] - value).norm() < 1e-11 * value.norm() + 1e-14, name
    for name, value in buffers.items():
        torch.testing.assert_close(own_buffers[name], value, rtol=1e-12, atol=1e-14)


def test_what_is_exported_is_the_decoders_own_map():
    method = tiny_poodle().eval()
    images = torch.rand(2, 3, 32, 64)
    with torch.no_grad():
        decoded = method.backbone()(images).maps["sdm"]
        expected = method.online.dense_projector(decoded)
        torch.testing.assert_close(method.online.dense(images), expected, rtol=1e-4, atol=1e-5)
    assert decoded.shape == (2, 32, 4, 8)


def test_another_head_in_the_projectors_place_takes_the_plain_order():
    method = tiny_poodle()
    method.online.dense_projector = torch.nn.Conv2d(32, 8, 1)
    features = method.online.decoder(method.online.encoder(images := torch.rand(2, 3, 32, 64)))
    expected = method.online.dense_projector(features.last)
    torch.testing.assert_close(method.online.dense(images), expected, rtol=1e-4, atol=1e-5)


class Scaled(SDM):
    def forward(self, features):
        found = super().forward(features)
        return Features({"sdm": 3 * found.last}, found.strides)


def test_a_decoder_with_a_forward_of_its_own_is_called_as_it_is():
    encoder = tiny_encoder()
    method = tiny_poodle(encoder=encoder, decoder=Scaled(encoder.channels, dims=32))
    features = method.online.decoder(method.online.encoder(images := torch.rand(2, 3, 32, 64)))
    expected = method.online.dense_projector(features.last)
    torch.testing.assert_close(method.online.dense(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("commute", [True, False])
def test_recomputing_everywhere_is_the_same_step(commute):
    methods = []
    for recompute in (False, True):
        encoder = tiny_encoder(recompute=recompute)
        decoder = tiny_sdm(encoder, recompute=recompute)
        methods.append(
            tiny_poodle(encoder=encoder, decoder=decoder, commute=commute, recompute=recompute).double()
        )
    methods[1].load_state_dict(methods[0].state_dict())
    outcomes = [one_step(method, make_clip()) for method in methods]
    for expected, found in zip(*outcomes, strict=True):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_switch_reaches_the_default_parts():
    with torch.device("meta"):
        method = PooDLe(hidden=8, out=4, flow=Given(), recompute=True)
    parts = (method.online.encoder, method.online.decoder, method.online.dense_projector)
    assert all(part.recompute for part in (*parts, method.target.module.encoder, method.dense_predictor))
