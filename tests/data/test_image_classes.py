"""Folders of classes: views against torchvision, order, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, RandomResizedCrop, Resize
from torchvision.transforms import functional as TF
from torchvision.transforms.functional import InterpolationMode

from poodle_lightning.data.image_classes import ImageClassDataModule, ImageViews
from poodle_lightning.ops.random import bernoulli, fold, key_of
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


@pytest.mark.parametrize("size", [(300, 431), (431, 300), (256, 256), (90, 64)])
def test_test_view_is_torchvisions(size):
    image = picture(*size, seed=0)
    wanted = Compose([Resize(256, InterpolationMode.BICUBIC), CenterCrop(224)])(Image.fromarray(image))
    assert np.array_equal(ImageViews().test(image), np.asarray(wanted))


def test_train_view_is_torchvisions_for_the_same_box():
    views, image = ImageViews(size=32, resize=32), picture(90, 140, seed=1)
    mirrored = 0
    for number in range(6):
        key = key_of(0, number)
        box = views.box((90, 140), fold(key.reshape(1), "crop"))
        wanted = TF.resized_crop(Image.fromarray(image), *box, [32, 32], InterpolationMode.BILINEAR)
        if bool(bernoulli(fold(key.reshape(1), "flip"), 0.5)):
            wanted, mirrored = TF.hflip(wanted), mirrored + 1
        assert np.array_equal(views.train(image, key), np.asarray(wanted))
    assert 0 < mirrored < 6


def test_boxes_have_torchvisions_distribution():
    views = ImageViews()
    ours = torch.tensor([views.box((300, 400), key_of(5, i).reshape(1)) for i in range(1500)]).double()
    torch.manual_seed(0)
    image = torch.empty(3, 300, 400)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(1500)]
    )
    theirs = theirs.double()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= 300).all()
    assert (ours[:, 1] + ours[:, 3] <= 400).all()
    for column in range(4):
        spread = theirs[:, column].std()
        assert (ours[:, column].mean() - theirs[:, column].mean()).abs() < 5 * spread / 1500**0.5 * 2**0.5
        assert ours[:, column].std() == pytest.approx(float(spread), rel=0.1)


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10)])
def test_an_image_without_room_gives_the_largest_centred_crop(size):
    top, left, height, width = ImageViews(scale=(0.9, 1.0)).box(size, key_of(0).reshape(1))
    wanted = (10, 13) if size[0] == 10 else (13, 10)
    assert (height, width) == wanted
    assert (top, left) == ((size[0] - height) // 2, (size[1] - width) // 2)


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
    labels = [label for _, label in half.files("train")]
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
    with pytest.raises(UserError, match="the class cat has no image in val"):
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


def test_a_crop_larger_than_the_image_after_resizing_is_refused():
    with pytest.raises(UserError, match="from 1 to resize"):
        ImageViews(size=300)
