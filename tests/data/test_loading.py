import pytest

from poodle_lightning.data.loading import each_once, whole_batches
from poodle_lightning.types import UserError


@pytest.mark.parametrize(
    ("items", "batch", "devices", "passes", "length"),
    [
        (10, 4, 1, 1, 8),  # two batches of four; two items are left out
        (10, 2, 3, 1, 6),  # batches of six on three devices
        (3, 4, 2, 1, 8),  # fewer than a batch: three passes hold one
        (10, 4, 1, 5, 48),
    ],
)
def test_an_epoch_has_whole_batches_on_all_devices(items, batch, devices, passes, length):
    order = whole_batches(items, batch, devices, seed=0, passes=passes)
    assert order.length == length
    assert order.stride == devices
    taken = [order.item(0, position) % items for position in range(length)]
    counts = [taken.count(item) for item in range(items)]
    assert max(counts) - min(counts) <= 1
    assert taken != [order.item(1, position) % items for position in range(length)]


def test_held_out_items_are_taken_once_and_in_place():
    order = each_once(5, 2, "x")
    assert [order.item(-1, position) for position in range(order.length)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="root: 1 images for 2 devices: use at most 1 devices"):
        each_once(1, 2, "root: 1 images")
