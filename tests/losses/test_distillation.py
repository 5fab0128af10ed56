import pytest
import torch
from device_reads import DeviceReads
from lightly.loss import DINOLoss, IBOTPatchLoss
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from poodle_lightning.losses.distillation import paired_losses, teacher_probabilities, view_losses
from poodle_lightning.ops.masking import masked_tokens

U, V, B, K = 2, 4, 5, 12


def make(dtype=torch.float64):
    torch.manual_seed(0)
    student, teacher = torch.randn(V, B, K, dtype=dtype), torch.randn(U, B, K, dtype=dtype)
    return student, teacher, torch.randn(K, dtype=dtype) * 0.3


def probabilities_by_loops(logits, centre, temperature):
    rows = []
    for row in logits.reshape(-1, logits.shape[-1]):
        shifted = torch.stack([(value - c) / temperature for value, c in zip(row, centre, strict=True)])
        rows.append(shifted.exp() / shifted.exp().sum())
    return torch.stack(rows).reshape(logits.shape)


def entropy_by_loops(q, s, temperature):
    """``−Σ q log p`` with p the softmax of the student's row."""
    weights = [float(torch.exp(value / temperature)) for value in s]
    return -sum(
        float(a) * torch.tensor(w / sum(weights)).log().item() for a, w in zip(q, weights, strict=True)
    )


def test_teacher_probabilities_equal_loops():
    _, logits, centre = make()
    found = teacher_probabilities(logits, centre, 0.07)
    torch.testing.assert_close(found, probabilities_by_loops(logits, centre, 0.07))
    assert teacher_probabilities(logits.bfloat16(), centre.float(), 0.04).dtype == torch.float32


class Made(TorchDispatchMode):
    """Bytes of all that operations take anew."""

    def __init__(self):
        super().__init__()
        self.kept = {}  # alive, so that no address is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.kept[out.untyped_storage().data_ptr()] = out
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teacher_probabilities_take_one_copy_beside_the_result(dtype):
    logits, centre = torch.randn(64, 512).to(dtype), torch.randn(512)
    with Made() as made:
        found = teacher_probabilities(logits, centre, 0.04)
    assert sum(x.untyped_storage().nbytes() for x in made.kept.values()) == 2 * found.nbytes


def test_targets_have_no_gradient():
    student, logits, centre = make()
    logits.requires_grad_()
    student.requires_grad_()
    targets = teacher_probabilities(logits, centre, 0.04)
    assert not targets.requires_grad
    view_losses(student, targets).sum().backward()
    assert logits.grad is None
    assert student.grad.abs().sum() > 0


def test_view_losses_equal_loops():
    student, logits, centre = make()
    targets = teacher_probabilities(logits, centre, 0.2)
    found = view_losses(student, targets, 0.3)
    assert found.shape == (U, V)
    for u in range(U):
        for v in range(V):
            wanted = sum(entropy_by_loops(targets[u, b], student[v, b], 0.3) for b in range(B)) / B
            assert float(found[u, v]) == pytest.approx(wanted, rel=1e-6)


def published(student, targets, temperature):
    """A log-softmax per view and a product per pair."""
    logs = (student / temperature).log_softmax(dim=-1)
    return torch.stack([torch.stack([-(q * log).sum(-1).mean() for log in logs]) for q in targets])


def test_gradient_of_view_losses_equals_the_published_forms():
    student, logits, centre = make()
    targets, weights = teacher_probabilities(logits, centre, 0.04), torch.rand(U, V, dtype=torch.float64)
    grads = []
    for form in (view_losses, published):
        leaf = student.clone().requires_grad_()
        (form(leaf, targets, 0.1) * weights).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_gradient_of_logits_that_lie_otherwise_in_memory():
    student, logits, centre = make()
    targets = teacher_probabilities(logits, centre, 0.04)
    grads = []
    for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0)):
        leaf = student.permute(order).contiguous().requires_grad_()
        view_losses(leaf.permute(order), targets.permute(order).contiguous().permute(order)).sum().backward()
        grads.append(leaf.grad.permute(order))
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


def test_equals_lightlys_dino_loss():
    """Its sum over pairs of different views, with a centre that is not zero; the first U views are shared."""
    student, logits, _ = make(torch.float32)
    reference = DINOLoss(K, teacher_temp=0.05, student_temp=0.1, center_momentum=0.5)
    for _ in range(3):  # the centre moves
        centre = reference.center.flatten().clone()
        wanted = reference(list(logits), list(student))
        pairs = view_losses(student, teacher_probabilities(logits, centre, 0.05), 0.1)
        others = ~torch.eye(U, V, dtype=torch.bool)
        torch.testing.assert_close((pairs * others).sum() / (U * V - U), wanted, rtol=1e-5, atol=1e-6)
        logits = logits + 0.5
    assert centre.abs().sum() > 0


def test_paired_losses_equal_loops():
    student, logits, centre = make()
    targets = teacher_probabilities(logits, centre, 0.2)
    found = paired_losses(student[:U], targets, 0.3)
    assert found.shape == (U, B)
    for u in range(U):
        for b in range(B):
            wanted = entropy_by_loops(targets[u, b], student[u, b], 0.3)
            assert float(found[u, b]) == pytest.approx(wanted, rel=1e-6)


def test_equals_lightlys_ibot_loss():
    """Masked patches only, an image's mean, then the mean over images; one image has none masked."""
    torch.manual_seed(0)
    student, logits = torch.randn(2, 4, 9, K)
    mask = torch.rand(4, 3, 3) < torch.tensor([0.0, 0.3, 0.6, 1.0])[:, None, None]
    reference = IBOTPatchLoss(K, teacher_temp=0.05, student_temp=0.1)
    reference.center.center += torch.randn(K) * 0.2
    centre = reference.center.value.flatten().clone()
    flat = mask.flatten(1)
    wanted = reference(logits[flat], student[flat], mask)
    index, weight = masked_tokens(flat, int(flat.sum()))
    targets = teacher_probabilities(logits.flatten(0, 1)[index], centre, 0.05)
    losses = paired_losses(student.flatten(0, 1)[index], targets, 0.1)
    torch.testing.assert_close((losses * weight).sum(), wanted)


def test_gradient_of_paired_losses_equals_cross_entropy():
    student, logits, centre = make()
    targets = teacher_probabilities(logits, centre, 0.04).flatten(0, 1)
    grads = []
    for form in (
        lambda s: paired_losses(s, targets, 0.1).sum(),
        lambda s: nn.functional.cross_entropy(s / 0.1, targets, reduction="sum"),
    ):
        leaf = student[:U].flatten(0, 1).clone().requires_grad_()
        form(leaf).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_half_precision_is_worked_on_in_float32():
    student, logits, centre = make(torch.float32)
    student, logits = (30 * student).bfloat16(), (3 * logits).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        targets = teacher_probabilities(logits, centre, 0.04)
        found = view_losses(student, targets), paired_losses(student[:U], targets)
    exact = teacher_probabilities(logits.double(), centre.double(), 0.04)
    wanted = view_losses(student.double(), exact), paired_losses(student[:U].double(), exact)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_nothing_of_the_students_size_is_kept_but_the_student():
    """What waits for the backward pass: logits, targets and a number per row; no probabilities, no pairs."""
    student = torch.randn(10, 4, 256, requires_grad=True)
    targets = torch.randn(2, 4, 256).softmax(dim=-1)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x,
        lambda x: x,
    ):
        view_losses(student, targets)
    assert sum(kept.values()) == student.nbytes + targets.nbytes + 10 * 4 * 4


def test_reads_nothing_back():
    student, logits, centre = make(torch.float32)
    student.requires_grad_()
    with DeviceReads([student, logits, centre]) as reads:
        targets = teacher_probabilities(logits, centre, 0.04)
        (view_losses(student, targets).sum() + paired_losses(student[:U], targets).sum()).backward()
    assert reads.found == []
