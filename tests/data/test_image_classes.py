"""Classified images in batches: what comes when, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from poodle_lightning.data.image_classes import ImageClassDataModule, ImageViews, Repeated
from poodle_lightning.types import UserError


def picture(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def root(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "ant", "bee")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(count + label):
                pixels = np.full((40, 50, 3), 10 * number + 60 * label, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path


def module(root, **kwargs):
    views = kwargs.pop("views", ImageViews(size=16, resize=20))
    made = ImageClassDataModule(str(root), views=views, num_workers=0, **kwargs)
    made.setup()
    return made


def test_classes_are_sorted_folders_and_every_image_comes_once(root):
    data = module(root, val_batch_size=4)
    assert data.classes.names == ("ant", "bee", "cat")
    for loader, count in ((data.memory_dataloader(), 15), (data.val_dataloader(), 9)):
        batches = list(loader)
        assert torch.cat([b.index for b in batches]).tolist() == list(range(count))
        for batch in batches:
            assert batch.images.shape[1:] == (3, 16, 16)
            for name, label in zip(batch.names, batch.labels.tolist(), strict=True):
                assert data.classes.names[label] in name


def test_training_order_is_a_function_of_seed_and_epoch(root):
    def epoch(seed, number):
        loader = module(root, seed=seed, batch_size=5).train_dataloader()
        loader.sampler.set_epoch(number)
        batches = list(loader)
        return torch.cat([b.index for b in batches]), torch.cat([b.images for b in batches])

    (one, pixels), (again, same), (other, _), (moved, _) = epoch(0, 0), epoch(0, 0), epoch(1, 0), epoch(0, 1)
    assert torch.equal(one, again)
    assert torch.equal(pixels, same)
    assert sorted(one.tolist()) == list(range(15))
    assert not torch.equal(one, other)
    assert not torch.equal(one, moved)


def test_a_subset_takes_a_share_of_every_class(root):
    half = module(root, subset=0.5)
    labels = half.images("train").labels.tolist()
    assert [labels.count(label) for label in range(3)] == [2, 3, 2]
    assert half.count("val") == 9
    assert [module(root, subset=0.01).count("train")] == [3]


def test_a_truncated_image_is_refused_by_name(root):
    path = root / "val" / "bee" / "0.jpg"
    Image.fromarray(picture(60, 60, seed=2)).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UserError, match=r"bee/0\.jpg: the image cannot be read"):
        list(module(root).val_dataloader())


def test_what_is_missing_is_said_in_one_line(root, tmp_path):
    with pytest.raises(UserError, match=r"give --data\.root"):
        ImageClassDataModule()
    with pytest.raises(UserError, match="no such folder"):
        ImageClassDataModule(str(tmp_path / "nowhere"))
    for path in (root / "val" / "cat").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="the class cat has no image in val: add some"):
        module(root)
    (root / "val" / "cat").rmdir()
    with pytest.raises(UserError, match="the class cat of train is not there"):
        module(root)
    (root / "val" / "dog").mkdir()
    (root / "train" / "cat" / "0.png").rename(root / "train" / "other.png")
    (root / "val" / "cat").mkdir()
    with pytest.raises(UserError, match="the class dog is not in train"):
        module(root)


@pytest.mark.parametrize(("wrong", "said"), [({"batch_size": 0}, "at least 1"), ({"subset": 0.0}, "above 0")])
def test_settings_out_of_range_are_refused(root, wrong, said):
    with pytest.raises(UserError, match=said):
        module(root, **wrong)


@pytest.mark.parametrize("world", [1, 2])
def test_repeated_views_are_deits(root, world):
    """Every image three times in a row, the views dealt to the devices in turn, as DeiT's sampler does it."""
    order = Repeated(3, 15, 1, 12, world, 0)
    items = [order.item(2, position) for position in range(12)]
    images = [item % 15 for item in items]
    assert images == [image for image in images[::3] for _ in range(3)]
    assert len(set(images)) == 4
    assert len(set(items)) == 12  # another view each time
    plain = Repeated(1, 15, 1, 12, world, 0)
    assert [plain.item(2, place) for place in range(4)] == images[::3]
    with pytest.raises(UserError, match="repeats 0"):
        module(root, repeats=0)


def test_repeated_views_of_an_image_differ(root):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for path in root.rglob("*.png"):
        Image.fromarray(pixels).save(path)
    batch = next(iter(module(root, repeats=3, batch_size=6).train_dataloader()))
    assert batch.index.tolist() == [batch.index[0]] * 3 + [batch.index[3]] * 3
    assert len({image.numpy().tobytes() for image in batch.images}) == 6


def test_erased_views_reach_the_batch_as_float16(root):
    views = ImageViews(size=16, resize=20, erase=1.0)
    data = module(root, views=views, batch_size=4)
    batch = next(iter(data.train_dataloader()))
    assert batch.images.dtype == torch.float16
    assert float(batch.images.max()) > 255
    assert next(iter(data.val_dataloader())).images.dtype == torch.uint8
