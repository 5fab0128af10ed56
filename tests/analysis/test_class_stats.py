"""Class statistics against a loop, and PooDLe's Table 10 from its printed numbers."""

import math

import pytest
import torch

from poodle_lightning.analysis.class_stats import class_statistics, grouped, main
from poodle_lightning.data.label_sets import BDD100K
from poodle_lightning.types import ClassSet

# PooDLe, appendix H, Table 10, in the order of its columns; shares in percent.
COLUMNS = (
    "road", "sky", "building", "vegetation", "car", "bus", "fence", "truck", "wall", "sidewalk", "terrain",
    "train", "pole", "bicycle", "person", "motorcycle", "traffic sign", "rider", "traffic light",
)  # fmt: skip
PIXELS_PER_IMAGE = "22.0 18.2 15.0 14.4 8.4 3.7 3.4 3.2 3.1 3.1 2.8 2.1 1.0 0.8 0.7 0.6 0.5 0.4 0.4"
OF_PIXELS = "21.3 17.3 13.2 13.2 8.1 0.6 1.0 1.0 0.5 2.0 1.0 0.0 0.9 0.1 0.3 0.0 0.3 0.0 0.2"
OF_IMAGES = "96.5 94.8 88.4 91.7 97.3 15.0 30.6 30.5 15.4 66.7 36.7 0.7 95.0 6.4 34.7 3.8 75.3 5.2 47.1"


def printed(row):
    return {name: float(value) / 100 for name, value in zip(COLUMNS, row.split(), strict=True)}


def test_printed_statistics_give_the_papers_groups():
    found = grouped(printed(PIXELS_PER_IMAGE), printed(OF_IMAGES))
    assert {name: set(members) for name, members in found.items()} == {
        name: set(members) for name, members in BDD100K.groups.items()
    }


@pytest.mark.parametrize(("size", "rarity"), [(0.0101, 0.1541), (0.0209, 0.3049)])
def test_all_thresholds_that_the_table_leaves_open_give_them(size, rarity):
    found = grouped(printed(PIXELS_PER_IMAGE), printed(OF_IMAGES), size, rarity)
    assert set(found["small"]) == set(BDD100K.groups["small"])
    assert set(found["rare"]) == set(BDD100K.groups["rare"])


@pytest.mark.parametrize(("size", "rarity"), [(0.010, 0.2), (0.022, 0.2), (0.015, 0.154), (0.015, 0.306)])
def test_thresholds_outside_give_others(size, rarity):
    found = grouped(printed(PIXELS_PER_IMAGE), printed(OF_IMAGES), size, rarity)
    same = [set(found[name]) == set(BDD100K.groups[name]) for name in ("small", "rare")]
    assert same != [True, True]


def test_the_papers_first_row_is_a_mean_over_the_images_with_the_class():
    # first row x third row = second row, up to the rounding of the first two (and larger nowhere)
    per_image, of_pixels, of_images = map(printed, (PIXELS_PER_IMAGE, OF_PIXELS, OF_IMAGES))
    for name in COLUMNS:
        rounding = 0.0005 * of_images[name] + 0.0005 * per_image[name] + 0.0005
        assert per_image[name] * of_images[name] == pytest.approx(of_pixels[name], abs=rounding + 1e-4), name


def test_statistics_equal_a_loop():
    generator = torch.Generator().manual_seed(1)
    classes = ClassSet(("a", "b", "c", "d"))
    maps = [
        torch.where(
            torch.rand(h, w, generator=generator) < 0.2,
            255,
            torch.randint(0, top, (h, w), generator=generator),
        )
        for h, w, top in ((8, 12, 3), (5, 7, 1), (9, 4, 2))
    ]
    found = class_statistics([one.to(torch.uint8) for one in maps], classes)
    for label, name in enumerate(classes.names):
        shares = [sum(v == label for v in one.flatten().tolist()) / one.numel() for one in maps]
        shown = [share for share in shares if share]
        pixels = sum(share * one.numel() for share, one in zip(shares, maps, strict=True))
        assert found.share_of_images()[name] == pytest.approx(len(shown) / 3)
        assert found.share_of_pixels()[name] == pytest.approx(pixels / sum(one.numel() for one in maps))
        if shown:
            assert found.share_in_images()[name] == pytest.approx(sum(shown) / len(shown))
    assert math.isnan(found.share_in_images()["d"])
    assert "d" in found.groups()["small"]
    assert "d" in found.groups()["rare"]
    assert "| d | – | 0.0 | 0.0 | small | rare |" in found.markdown()


def test_a_batch_counts_like_its_images():
    labels = torch.randint(0, 4, (3, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    classes = ClassSet(("a", "b", "c", "d"))
    whole, single = class_statistics([labels], classes), class_statistics(list(labels), classes)
    assert whole.markdown() == single.markdown()
    assert whole.images == 3


def test_command_prints_a_table_or_one_line(capsys, tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    with pytest.raises(SystemExit) as ended:
        main(["--source", "bdd100k", "--root", str(tmp_path)])
    assert ended.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err.splitlines()[-1]
