import math

import torch
from tiny_models import make_clip, tiny_encoder, tiny_recipe

from poodle_lightning.augment.geometric import AffineFlip, draw_views
from poodle_lightning.augment.photometric import recolour
from poodle_lightning.flow.given import Given
from poodle_lightning.methods.flowe import FlowE
from poodle_lightning.ops.pairs import both_directions, direction_keys


def tiny_flowe(**kwargs) -> FlowE:
    torch.manual_seed(0)
    defaults = {"encoder": tiny_encoder(output_stride=8), "flow": Given(), "hidden": 16, "out": 8}
    return FlowE(**{**defaults, "recipe": tiny_recipe(), **kwargs})


def bilinear(image, x, y):
    """One bilinear read at pixel coordinates (centre of the first pixel at 0), clamped."""
    _, height, width = image.shape
    x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
    x0, y0 = int(x), int(y)
    x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
    fx, fy = x - x0, y - y0
    return ((1 - fy) * ((1 - fx) * image[:, y0, x0] + fx * image[:, y0, x1])
            + fy * ((1 - fx) * image[:, y1, x0] + fx * image[:, y1, x1]))  # fmt: skip


def test_loss_equals_the_formula_in_loops():
    """FlowE Eq. 3 in pixel coordinates: mean over visible x of ‖p̂1(x) − ẑ2(x + M(x))‖²."""
    method = tiny_flowe(view=AffineFlip(30.0, (0.5, 2.0), 0.5), threshold=1.5).double().eval()
    clip = make_clip(seed=3)
    torch.manual_seed(4)
    clip.flow.add_(torch.randn_like(clip.flow))
    clean = clip.unit()
    flow = method.flow(clip, clean)
    u, v = both_directions(recolour(method.colour, clean, clip.key))
    a, b = draw_views(method.view, u, v, direction_keys(clip.key))
    p = method.predictor(method.online.dense(a.image.double())).detach()
    z = method.target.module.dense(b.image.double())
    pixels = flow.to_pixels().double()
    rows, _, height, width = pixels.shape

    def read(maps, i, to_clean, x, y):
        """Value of a low-resolution map at clean pixel (x, y), or None outside the view."""
        point = torch.tensor([(x + 0.5) * 2 / width - 1, (y + 0.5) * 2 / height - 1, 1.0]).double()
        vx, vy, _ = (torch.linalg.inv(to_clean.matrix[i].double()) @ point).tolist()
        if max(abs(vx), abs(vy)) > 1:
            return None
        low_h, low_w = maps.shape[-2:]
        return bilinear(maps[i], (vx + 1) * low_w / 2 - 0.5, (vy + 1) * low_h / 2 - 0.5)

    total = 0.0
    for i in range(rows):
        loss, count = 0.0, 0
        for y in range(height):
            for x in range(width):
                fx, fy = pixels[i, :, y, x].tolist()
                mx, my = x + fx, y + fy
                if not (-0.5 <= mx <= width - 0.5 and -0.5 <= my <= height - 0.5):
                    continue
                bx, by = bilinear(pixels[(i + rows // 2) % rows], mx, my).tolist()
                if math.hypot(fx + bx, fy + by) > 1.5:
                    continue
                left, right = read(p, i, a.to_clean, x, y), read(z, i, b.to_clean, mx, my)
                if left is None or right is None:
                    continue
                cosine = float(left @ right) / math.sqrt(float(left @ left) * float(right @ right))
                loss, count = loss + 2 - 2 * cosine, count + 1
        total += loss / max(count, 1)
    assert abs(float(method.losses(clip)["dense"]) - total / rows) < 1e-5


def test_all_trainable_parameters_get_a_gradient_and_the_target_none():
    method = tiny_flowe()
    method.losses(make_clip())["dense"].backward()
    missing = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad is None for p in method.target.parameters())


def test_encoder_is_dilated_by_default():
    assert FlowE(hidden=8, out=4, flow=Given()).online.encoder.strides["layer4"] == 8


def test_look_has_flow_views_and_no_boxes():
    look = tiny_flowe().look(make_clip())
    assert look.flow is not None
    assert look.visible.shape == (4, 32, 64)
    assert look.boxes is None


def test_wider_threshold_sees_more():
    clip = make_clip()
    torch.manual_seed(4)
    clip.flow.add_(torch.randn_like(clip.flow) * 2)
    seen = [tiny_flowe(threshold=t).look(clip).visible.sum() for t in (0.5, 2.0, 8.0)]
    assert seen[0] < seen[1] < seen[2]


def test_recomputing_heads_and_encoder_is_the_same_step():
    methods = [
        tiny_flowe(encoder=tiny_encoder(output_stride=8, recompute=recompute), recompute=recompute).double()
        for recompute in (False, True)
    ]
    methods[1].load_state_dict(methods[0].state_dict())
    outcomes = []
    for method in methods:
        loss = method.train().losses(make_clip())["dense"]
        loss.backward()
        gradients = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
        outcomes.append({"loss": loss, **gradients, **dict(method.named_buffers())})
    plain, switched = outcomes
    assert all(torch.equal(switched[name], value) for name, value in plain.items())
