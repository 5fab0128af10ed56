import pytest
import torch
from device_reads import DeviceReads

from poodle_lightning.losses.reconstruction import masked_mse, patch_statistics, patchify, unpatchify


def test_patches_row_by_row_and_colours_last():
    images = torch.randn(2, 3, 6, 9)
    found = patchify(images, 3)
    assert found.shape == (2, 6, 27)
    for b in range(2):
        for row in range(6):
            for column in range(9):
                for colour in range(3):
                    n = (row // 3) * 3 + column // 3
                    place = ((row % 3) * 3 + column % 3) * 3 + colour
                    assert found[b, n, place] == images[b, colour, row, column]
    assert torch.equal(unpatchify(found, 3, (6, 9)), images)


def test_patches_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="6x9 pixels have no whole patches of 4"):
        patchify(torch.zeros(1, 3, 6, 9), 4)


def loss_by_loops(predicted, target, mask, normalise):
    total, count = 0.0, 0
    for b in range(len(mask)):
        for n in range(mask.shape[1]):
            if not mask[b, n]:
                continue
            row = target[b, n].tolist()
            if normalise:
                mean = sum(row) / len(row)
                variance = sum((value - mean) ** 2 for value in row) / (len(row) - 1)
                row = [(value - mean) / (variance + 1e-6) ** 0.5 for value in row]
            pairs = zip(predicted[b, n].tolist(), row, strict=True)
            total += sum((a - value) ** 2 for a, value in pairs) / len(row)
            count += 1
    return total / count


@pytest.mark.parametrize("normalise", [True, False])
def test_loss_equals_loops(normalise):
    torch.manual_seed(0)
    predicted, target = torch.randn(2, 3, 4, 12, dtype=torch.float64)
    target[0, 1] = 0.7  # a patch of one colour: only the 1e-6 is left to divide by
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    found = masked_mse(predicted, target, mask, normalise)
    assert float(found) == pytest.approx(loss_by_loops(predicted, target, mask, normalise), rel=1e-12)


def test_normalises_by_default_and_can_be_undone():
    torch.manual_seed(0)
    target, mask = torch.rand(2, 5, 12), torch.ones(2, 5, dtype=torch.bool)
    mean, deviation = patch_statistics(target)
    assert mean.shape == deviation.shape == (2, 5, 1)
    assert masked_mse((target - mean) / deviation, target, mask) < 1e-10
    torch.testing.assert_close(deviation[0, 0, 0] ** 2 - 1e-6, target[0, 0].var(unbiased=True))


def test_only_masked_patches_count():
    torch.manual_seed(0)
    predicted, target = torch.randn(2, 2, 4, 12)
    predicted.requires_grad_()
    mask = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)
    masked_mse(predicted, target, mask).backward()
    assert torch.equal(predicted.grad.abs().sum(dim=2) > 0, mask)
    nothing = masked_mse(predicted, target, torch.zeros_like(mask))
    assert nothing.item() == 0.0


def test_half_precision_is_worked_on_in_float32():
    torch.manual_seed(0)
    predicted, target = torch.randn(2, 2, 4, 12).bfloat16()
    mask = torch.ones(2, 4, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = masked_mse(predicted, target, mask)
    wanted = masked_mse(predicted.double(), target.double(), mask)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-6)


def test_reads_nothing_back():
    images = torch.rand(2, 3, 8, 8)
    predicted = torch.randn(2, 4, 48, requires_grad=True)
    mask = torch.rand(2, 4) < 0.5
    with DeviceReads([images, predicted, mask]) as reads:
        masked_mse(predicted, patchify(images, 4), mask).backward()
        unpatchify(predicted.detach(), 4, (8, 8))
    assert reads.found == []
