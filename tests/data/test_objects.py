"""VOC's objects: read as the files say, wherever the folder lies; what is wrong is refused by name."""

import pickle

import lightning as L
import numpy as np
import pytest
from object_trees import SCENES, voc_objects
from PIL import Image
from torchvision.datasets import VOCDetection
from torchvision.transforms import Resize

from poodle_lightning.data.objects import ObjectDataModule, read_boxes, resized
from poodle_lightning.types import UserError


@pytest.fixture
def root(tmp_path):
    return voc_objects(tmp_path / "VOCdevkit" / "VOC2012")


def data(root, **kwargs):
    return ObjectDataModule(str(root), num_workers=0, **kwargs)


def scenes(module):
    return {scene.name: scene for scene in map(module.source.read, range(module.count()))}


def test_every_image_has_its_boxes_and_pixels(root):
    found = scenes(data(root))
    assert list(found) == list(SCENES)
    for name, (size, things) in SCENES.items():
        scene = found[name]
        assert scene.size == size == scene.image.shape[:2] == scene.objects.shape
        assert scene.boxes.tolist() == [[t.left, t.top, t.right, t.bottom] for t in things]
        for number, thing in enumerate(things, 1):
            inside = np.zeros(size, bool)
            inside[thing.top : thing.bottom, thing.left : thing.right] = True
            assert np.array_equal(scene.objects == number, inside)
        assert (scene.objects == 255).any() == any(thing.top for thing in things)


def test_boxes_are_torchvisions_with_one_pixel_taken_from_left_and_top(root):
    """LOST reads ``VOCDetection`` and takes 1 from xmin and ymin."""
    published = VOCDetection(str(root.parents[1]), year="2012", image_set="trainval", download=False)
    found = list(scenes(data(root, task="detection", split="trainval")).values())
    for (_, target), scene in zip(published, found, strict=True):
        boxes = []
        for one in target["annotation"]["object"]:
            sides = {side: int(text) for side, text in one["bndbox"].items()}
            boxes.append([sides["xmin"] - 1, sides["ymin"] - 1, sides["xmax"], sides["ymax"]])
        assert scene.boxes.tolist() == boxes
        assert scene.objects is None


@pytest.mark.parametrize("above", [0, 1, 2])
def test_the_folder_may_be_one_above(root, above):
    assert data([root, *root.parents][above]).count() == len(SCENES)


def test_year_2007_lies_elsewhere(tmp_path):
    voc_objects(tmp_path / "VOC2007")
    assert data(tmp_path, year=2007, task="detection", split="trainval").count() == len(SCENES)
    with pytest.raises(UserError, match="not laid out as VOC 2012"):
        data(tmp_path).setup()


def test_hard_objects_can_be_left_out(root):
    found = scenes(data(root, hard="drop"))
    assert found["2008_000001"].boxes.shape == (0, 4)
    assert found["2009_000007"].boxes.tolist() == [[2, 10, 30, 39]]
    assert len(found["2007_000042"].boxes) == 2


@pytest.mark.parametrize("size", [24, (30, 50), None])
def test_images_are_resized_as_torchvision_does(size):
    pixels = np.random.default_rng(0).integers(0, 256, (51, 37, 3), dtype=np.uint8)
    made = resized(pixels, size)
    whole = Image.fromarray(pixels)
    assert np.array_equal(made, pixels if size is None else np.asarray(Resize(size)(whole)))


def test_batches_hold_images_of_different_sizes(root):
    module = data(root, batch_size=3)
    first, second = module.val_dataloader()
    assert [tuple(image.shape) for image in first.images] == [(3, 40, 64), (3, 40, 64), (3, 51, 37)]
    assert (len(second), second.names, second.index.tolist()) == (1, ("2009_000007",), [3])
    moved = first.to("meta")
    assert {image.device.type for image in moved.images} == {"meta"}
    assert moved.boxes[0].device.type == "cpu"
    squeezed = next(iter(data(root, size=(16, 24)).val_dataloader()))
    assert {tuple(image.shape) for image in squeezed.images} == {(3, 16, 24)}
    assert squeezed.sizes[2] == (51, 37)


def test_the_trainer_does_not_travel_to_the_workers(root):
    module = data(root)
    module.trainer = L.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    loader = module.val_dataloader()
    again = pickle.loads(pickle.dumps(loader.dataset))
    assert np.array_equal(again[0, 2].image, loader.dataset[0, 2].image)
    assert len(pickle.dumps(loader.dataset)) < 4000


def test_coordinates_need_not_be_whole_numbers(tmp_path):
    """A few of VOC 2012's are not."""
    path = tmp_path / "a.xml"
    path.write_text(
        "<annotation><object><name>dog</name><bndbox><xmin>45.70</xmin><ymin>1</ymin><xmax>128.19</xmax>"
        "<ymax>9</ymax></bndbox></object></annotation>"
    )
    assert read_boxes(path).tolist() == [[pytest.approx(44.7), 0, 128.19, 9]]
    path.write_text("<annotation></annotation>")
    assert read_boxes(path).shape == (0, 4)


def break_list(root):
    (root / "ImageSets/Segmentation/val.txt").write_text("\n")


def add_name(root):
    with (root / "ImageSets/Segmentation/val.txt").open("a") as file:
        file.write("2010_000001\n2010_000002\n")


def cut_xml(root):
    path = root / "Annotations/2007_000033.xml"
    path.write_text(path.read_text()[:60])


def drop_side(root):
    path = root / "Annotations/2007_000033.xml"
    path.write_text(path.read_text().replace("<xmax>40</xmax>", ""))


def resize_mask(root):
    path = root / "SegmentationObject/2007_000033.png"
    with Image.open(path) as mask:
        mask.resize((10, 12)).save(path)


def remove_mask(root):
    (root / "SegmentationObject/2008_000001.png").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (break_list, r"val.txt: the split is empty"),
        (add_name, r"val.txt: .*JPEGImages/2010_000001.jpg is missing \(and 1 more\)"),
        (cut_xml, r"Annotations/2007_000033.xml: cannot be read"),
        (drop_side, r"2007_000033.xml: cannot be read: an object 'cat' has no box"),
        (resize_mask, r"2007_000033.png: the mask is 10×12 px, its image is 64×40 px"),
        (remove_mask, r"SegmentationObject/2008_000001.png is missing"),
    ],
)
def test_what_is_wrong_is_named(root, harm, message):
    harm(root)
    module = data(root)
    with pytest.raises(UserError, match=message):
        scenes(module)


def test_settings_that_cannot_be(root, tmp_path):
    with pytest.raises(UserError, match=r"give --data.root"):
        ObjectDataModule()
    with pytest.raises(UserError, match="at least 1"):
        data(root, batch_size=0)
    with pytest.raises(UserError, match="at least 1"):
        data(root, size=(0, 4))
    with pytest.raises(UserError, match=r"data.split can be: val"):
        data(root, split="test").setup()
    with pytest.raises(UserError, match="trains nothing"):
        data(root).train_dataloader()
    with pytest.raises(UserError, match="no such folder"):
        data(tmp_path / "nowhere").setup()
