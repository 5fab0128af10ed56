import math

import pytest
import torch

from poodle_lightning.ops.crops import SubcropRecipe, box_pixels, flow_guided_subcrops, grid_cell
from poodle_lightning.ops.geometry import Flow
from poodle_lightning.ops.random import key_of

SIZE = (512, 1024)


def keys(count: int) -> torch.Tensor:
    return torch.stack([key_of(5, i) for i in range(count)])


def constant_flow(count: int, dx: float, dy: float, size=SIZE) -> Flow:
    """The same motion in px everywhere, one value in memory."""
    motion = torch.tensor([dx * 2 / size[1], dy * 2 / size[0]])
    return Flow(motion.reshape(1, 2, 1, 1).expand(count, 2, *size))


def test_grid_is_three_by_five_at_the_papers_size():
    cell = grid_cell(SubcropRecipe(), SIZE)
    assert cell == 214  # round(sqrt(0.175) * 512)
    assert (math.ceil(512 / cell), math.ceil(1024 / cell)) == (3, 5)


def test_boxes_have_the_drawn_area_ratio_and_cells_of_their_own():
    pairs = flow_guided_subcrops(constant_flow(200, 0, 0), keys(200), SubcropRecipe(jitter=0.0))
    x0, y0, x1, y1 = box_pixels(pairs.online, SIZE).unbind(-1)
    area = (x1 - x0) * (y1 - y0) / (512 * 1024)
    ratio = (x1 - x0) / (y1 - y0)
    assert area.min() >= 0.05 - 1e-4
    assert area.max() <= 0.3 + 1e-4
    assert ratio.min() >= 0.75 - 1e-3
    assert ratio.max() <= 4 / 3 + 1e-3
    assert x0.min() >= -0.51  # clear of the left and top border
    assert y0.min() >= -0.51


def test_centres_lie_in_different_cells_where_no_border_moved_them():
    pairs = flow_guided_subcrops(constant_flow(120, 0, 0), keys(120), SubcropRecipe(jitter=0.0))
    boxes = box_pixels(pairs.online, SIZE)
    centres = ((boxes[:, :2] + boxes[:, 2:]) / 2 + 0.5).reshape(120, 6, 2)
    sides = (boxes[:, 2:] - boxes[:, :2]).reshape(120, 6, 2)
    free = (centres * 2 > sides + 1).all(-1)
    assert 0.2 < free.float().mean() < 1
    cells = (centres // 214).long()
    number = cells[..., 1] * 5 + cells[..., 0]
    for image in range(120):
        chosen = number[image][free[image]].tolist()
        assert len(set(chosen)) == len(chosen)


def test_partner_follows_the_flow_exactly_without_jitter():
    pairs = flow_guided_subcrops(constant_flow(100, 37.0, -21.0), keys(100), SubcropRecipe(jitter=0.0))
    other = ~pairs.same
    online, target = box_pixels(pairs.online, SIZE), box_pixels(pairs.target, SIZE)
    uncut = other & (target[:, 0] > 0) & (target[:, 1] > 0) & (target[:, 2] < 1022) & (target[:, 3] < 510)
    moved = (target[:, :2] + target[:, 2:]) / 2 - (online[:, :2] + online[:, 2:]) / 2
    assert uncut.sum() > 100
    assert (moved[uncut] - torch.tensor([37.0, -21.0])).abs().max() < 1e-2


def test_jitter_is_uniform_within_a_tenth_of_the_image():
    pairs = flow_guided_subcrops(constant_flow(120, 0, 0), keys(120), SubcropRecipe(area=(0.05, 0.06)))
    online, target = box_pixels(pairs.online, SIZE), box_pixels(pairs.target, SIZE)
    inner = (
        ~pairs.same & (target[:, 0] > 0) & (target[:, 1] > 0) & (target[:, 2] < 1022) & (target[:, 3] < 510)
    )
    shift = ((target[:, :2] + target[:, 2:]) - (online[:, :2] + online[:, 2:]))[inner] / 2
    share = shift / torch.tensor([1024.0, 512.0])
    assert share.abs().max() <= 0.1 + 1e-5
    assert share.abs().max() > 0.095
    assert (share.std(dim=0) - 0.2 / math.sqrt(12)).abs().max() < 0.006


def test_partner_is_at_least_as_large_and_cut_at_the_border():
    pairs = flow_guided_subcrops(constant_flow(100, 0, 0), keys(100), SubcropRecipe())
    target = box_pixels(pairs.target, SIZE)
    assert (target[:, :2] >= -0.51).all()
    assert (target[:, 2] <= 1023.51).all()
    assert (target[:, 3] <= 511.51).all()
    online = box_pixels(pairs.online, SIZE)
    area = lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])  # noqa: E731
    uncut = (target[:, :2] > -0.49).all(1) & (target[:, 2] < 1023.4) & (target[:, 3] < 511.4)
    assert uncut.any()
    assert (area(target)[uncut] >= area(online)[uncut] - 1).all()


def test_flow_that_leaves_the_frame_gives_a_pair_from_one_frame():
    pairs = flow_guided_subcrops(constant_flow(10, 5000.0, 0), keys(10), SubcropRecipe())
    assert pairs.same.all()
    online, target = box_pixels(pairs.online, SIZE), box_pixels(pairs.target, SIZE)
    uncut = (target[:, :2] > 0).all(1) & (target[:, 2] < 1022) & (target[:, 3] < 510)
    centre = lambda b: (b[:, :2] + b[:, 2:]) / 2  # noqa: E731
    assert uncut.any()
    assert (centre(online) - centre(target))[uncut].abs().max() < 1e-2


def test_a_later_try_is_used_when_the_first_leads_outside():
    """With a flow of half the width, pairs exist only for centres in the left half."""
    pairs = flow_guided_subcrops(
        constant_flow(200, 512.0, 0), keys(200), SubcropRecipe(centres="uniform", jitter=0)
    )
    online = box_pixels(pairs.online, SIZE)
    centre = (online[:, 0] + online[:, 2]) / 2
    other = ~pairs.same
    assert (centre[other] <= 512).all()
    assert 0.9 < other.float().mean() < 1  # 1 − P(5 tries on the right), the clamp shifting centres a bit


def test_draws_do_not_depend_on_the_batch():
    flow = Flow(torch.randn(6, 2, 64, 128) * 0.1)
    whole = flow_guided_subcrops(flow, keys(6), SubcropRecipe())
    part = flow_guided_subcrops(flow[2:4], keys(6)[2:4], SubcropRecipe())
    assert torch.equal(whole.online.matrix[12:24], part.online.matrix)
    assert torch.equal(whole.target.matrix[12:24], part.target.matrix)


@pytest.mark.parametrize("bad", [{"area": (0.5, 0.1)}, {"count": 0}, {"ratio": (2.0, 1.0)}])
def test_impossible_recipes_are_refused(bad):
    with pytest.raises(ValueError, match="subcrops"):
        SubcropRecipe(**bad)
