import weakref
from collections import Counter

import pytest
import torch
from lightly.loss import IBOTPatchLoss
from tiny_models import make_clip, stirred, tiny_crops, tiny_encoder, tiny_head, tiny_recipe, tiny_vit

from poodle_lightning import IBOT, AttMask
from poodle_lightning.types import UserError


def tiny(kind=IBOT, **kwargs) -> IBOT:
    torch.manual_seed(0)
    settings = {"encoder": tiny_vit(mask_token=True), "head": tiny_head(), "crops": tiny_crops()}
    return stirred(kind(**settings, recipe=tiny_recipe(), **kwargs))


def patches(network, images, mask=None):
    """Tokens of the patches, ``(B, n, D)``."""
    return network.encoder(images, mask).last.flatten(2).transpose(1, 2)


def outputs(network, token, kind):
    """Head outputs of one token, by the last layer of [CLS] or of patches."""
    row = network.head.project(token[None])
    layer = network.head.last_layer
    if kind == "patch" and network.patch_last_layer is not None:
        layer = network.patch_last_layer
    weight = layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True) * layer.weight_g
    return weight @ row[0]


def entropy(teacher, centre, student, temperature=0.04):
    p = ((teacher - centre) / temperature).softmax(0).detach()
    return -(p * (student / 0.1).log_softmax(0)).sum()


@pytest.mark.parametrize(("shared", "frames"), [(True, 2), (False, 1)])
def test_losses_and_gradient_equal_the_formulas_in_loops(shared, frames):
    """iBOT Eq. 2 and 3 as in its code: view by view, image by image, patch by patch, float64."""
    method, clip = tiny(shared_head=shared, cls_weight=0.7, patch_weight=1.3), make_clip(4, frames=frames)
    assert (method.student.patch_last_layer is None) == shared
    crops = method.crops(clip)
    large, small = crops.large, crops.small
    seen = method.observe(large.flatten(0, 1))
    masks = method.hide(clip, seen)[0].unflatten(0, large.shape[:2])
    count = large.shape[1]
    cls, patch = 0.0, 0.0
    for u in range(2):
        for image in range(count):
            teacher = outputs(method.teacher, method.teacher.encoder(large[u, image][None]).vector[0], "cls")
            for v in range(4):
                if u == v:
                    continue
                shown = large[v, image] if v < 2 else small[v - 2, image]
                mask = masks[v, image][None] if v < 2 else None
                student = outputs(method.student, method.student.encoder(shown[None], mask).vector[0], "cls")
                cls = cls + entropy(teacher, method.centre.value, student) / (count * 6)
            t_all = patches(method.teacher, large[u, image][None])[0]
            s_all = patches(method.student, large[u, image][None], masks[u, image][None])[0]
            hidden = masks[u, image].flatten().nonzero()[:, 0].tolist()
            for n in hidden:
                pair = outputs(method.teacher, t_all[n], "patch"), outputs(method.student, s_all[n], "patch")
                one = entropy(pair[0], method.patch_centre.value, pair[1])
                patch = patch + one / len(hidden) / (count * 2)
    assert masks.any()
    assert not masks.flatten(2).any(dim=2).all()  # some crops are left whole
    losses = method.losses(clip)
    expected = {"cls": 0.7 * cls, "patch": 1.3 * patch}
    # weights of patches are float32
    assert {k: float(v.detach()) for k, v in losses.items()} == pytest.approx(
        {k: float(v.detach()) for k, v in expected.items()}, rel=1e-7
    )
    parameters = [p for p in method.student.parameters() if p.requires_grad]
    found = torch.autograd.grad(sum(losses.values()), parameters)
    wanted = torch.autograd.grad(sum(expected.values()), parameters)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm() + 1e-14


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("settings", [{}, {"strategy": "high"}, {"strategy": "hint", "show": 0.25}])
def test_only_hidden_patches_go_through_the_last_layer(settings, shared, monkeypatch):
    """As many rows as patches are hidden, and the teacher's mean row; [CLS] goes through by itself."""
    method = tiny(AttMask if settings else IBOT, shared_head=shared, **settings)
    clip = make_clip(batch=6)
    hidden, total = method.hide(clip, method.observe(method.crops(clip).large.flatten(0, 1)))
    counts = hidden.flatten(1).sum(dim=1)
    assert total == counts.sum()
    assert total < len(counts) * counts.max()  # what lists of one length would send
    rows = {"student": [], "teacher": []}
    for name, seen in rows.items():
        network = getattr(method, name)
        call = network.patch_logits
        monkeypatch.setattr(
            network, "patch_logits", lambda x, call=call, seen=seen: seen.append(x[..., 0].numel()) or call(x)
        )
    method.losses(clip)
    assert rows == {"student": [total], "teacher": [1, total]}


@pytest.mark.parametrize("kind", [IBOT, AttMask])
def test_the_teachers_maps_are_gone_when_the_student_begins(kind, monkeypatch):
    method, clip = tiny(kind), make_clip()
    made, alive = [], []
    for block in method.teacher.encoder.blocks[:-1]:
        block.register_forward_hook(lambda block, given, out: made.append(weakref.ref(out)))
    watch = method.student.encoder.register_forward_pre_hook(
        lambda *_: alive.append([x for x in made if x() is not None])
    )
    method.losses(clip)
    watch.remove()
    assert len(made) == 1
    assert alive[0] == []
    seen = method.observe(method.crops(clip).large.flatten(0, 1))
    assert list(seen.maps) == list(seen.strides) == ["block1"]
    assert (seen.attention is None) == (kind is IBOT)
    assert seen.queries is seen.keys is None


def test_patch_loss_is_lightlys():
    method, clip = tiny(), make_clip(batch=4)
    images = method.crops(clip).large.flatten(0, 1)
    mask, _ = method.hide(clip, method.observe(images))
    reference = IBOTPatchLoss(64, teacher_temp=0.04).double()
    reference.center.center.copy_(method.patch_centre.value[None])
    with torch.no_grad():
        teacher = method.teacher.head(patches(method.teacher, images)[mask.flatten(1)])
        student = method.student.head(patches(method.student, images, mask)[mask.flatten(1)])
        expected = reference(teacher, student, mask)
    assert float(method.losses(clip)["patch"].detach()) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_patch_centre_is_the_mean_of_the_outputs_of_all_patches(shared):
    """iBOT's code: update_center takes the mean over images and all patches, hidden or not."""
    method, clip = tiny(shared_head=shared), make_clip()
    for centre in (method.centre, method.patch_centre):
        centre.train().float().value.zero_()
    tokens = patches(method.teacher, method.crops(clip).large.flatten(0, 1)).flatten(0, 1)
    expected = torch.stack([outputs(method.teacher, token, "patch") for token in tokens]).mean(dim=0)
    method.losses(clip)
    method.after_step()
    assert torch.allclose(method.patch_centre.value.double(), 0.1 * expected, atol=1e-6)
    assert not torch.allclose(method.centre.value, method.patch_centre.value, atol=1e-3)


@pytest.mark.parametrize("strategy", ["high", "low", "hint"])
def test_attmask_hides_by_the_teachers_attention(strategy):
    """Slowly: each crop's own whole attention, averaged over heads, its patches in order."""
    method, clip = tiny(AttMask, strategy=strategy, show=0.25), make_clip(batch=6)
    images = method.crops(clip).large.flatten(0, 1)
    masks, total = method.hide(clip, method.observe(images))
    numbers = Counter()
    for image, mask in zip(images, masks.flatten(1), strict=True):
        attention = method.teacher.encoder.look(image[None]).attention[0, :, 0, 1:].mean(dim=0)
        order = attention.argsort(descending=strategy != "low").tolist()
        hidden = set(mask.nonzero()[:, 0].tolist())
        numbers[len(hidden)] += 1
        if strategy == "hint":
            assert hidden <= set(order[: len(hidden) + 1])  # at most one of them is shown again
        else:
            assert hidden == set(order[: len(hidden)])
    assert 0 < numbers[0] < len(masks)
    assert max(numbers) <= 8  # a ratio of 0.5 at most
    assert total == sum(number * images for number, images in numbers.items())


def test_hidden_patches_are_shown_in_pictures():
    method, clip = tiny(AttMask), make_clip(batch=3)
    look = method.look(clip)
    masks, _ = method.hide(clip, method.observe(method.crops(clip).large.flatten(0, 1)))
    assert look.hidden.shape == (3, 2, 4, 4)
    assert torch.equal(look.hidden[2, 1], masks[6 + 4])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", [IBOT, AttMask])
def test_a_batch_without_hidden_patches_has_no_patch_loss(kind, shared):
    """And still a gradient, of 0, for all that only patches use: DDP waits for it."""
    method = tiny(kind, ratios=(0.0,), spread=(0.0,), shared_head=shared)
    losses = method.losses(make_clip())
    assert float(losses["patch"].detach()) == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in method.student.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", [IBOT, AttMask])
def test_an_encoder_without_mask_token_is_named(kind):
    for encoder in (tiny_vit(), tiny_encoder()):
        with pytest.raises(UserError, match=r"encoder\.mask_token=true"):
            kind(encoder=encoder, crops=tiny_crops())


@pytest.mark.parametrize(
    ("ratios", "spread"), [((0.0, 0.9), (0.0, 0.2)), ((-0.1,), (0.0,)), ((0.3,), (0.1, 0.1)), ((), ())]
)
@pytest.mark.parametrize("kind", [IBOT, AttMask])
def test_ratios_that_leave_the_interval_are_named(kind, ratios, spread):
    with pytest.raises(UserError, match=rf"{kind.__name__}: ratios=\[.*\] with spread=\[.*\]: choose"):
        tiny(kind, ratios=ratios, spread=spread)


def test_attmask_without_class_token_is_named():
    with pytest.raises(UserError, match=r"AttMask .* \[CLS\].*encoder\.class_token=true"):
        AttMask(tiny_vit(mask_token=True, class_token=False), tiny_head(), tiny_crops())
