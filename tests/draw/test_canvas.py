"""Contact sheets, enlarging, PNG and figures that leave Matplotlib's global state alone."""

import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

from poodle_lightning.draw.canvas import DARK, blend, colour, enlarge, figure, figure_png, fit, png, sheet


def decoded(data):
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def test_png_keeps_every_pixel_and_the_order_of_channels():
    pixels = torch.randint(0, 256, (4, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    bgra = decoded(png(pixels.float() / 255))
    assert (bgra[..., [2, 1, 0, 3]] == pixels.permute(1, 2, 0).numpy()).all()
    assert (decoded(png(pixels[:3].float() / 255))[..., ::-1] == pixels[:3].permute(1, 2, 0).numpy()).all()


def test_sheet_places_images_row_by_row_with_transparent_gaps():
    images = [torch.full((3, 4, 6), v) for v in (0.1, 0.2, 0.3)]
    made = sheet(images, columns=2, gap=2)
    assert made.shape == (4, 10, 14)
    assert made[0, 0, 0] == pytest.approx(0.1)
    assert made[0, 0, 8] == pytest.approx(0.2)
    assert made[0, 6, 0] == pytest.approx(0.3)
    assert made[3, :4, 6:8].sum() == 0
    assert made[3, 6:, 8:].sum() == 0
    assert made[3].sum() == 3 * 24


def test_sheet_centres_smaller_images_on_paper():
    made = sheet([torch.zeros(3, 8, 8), torch.zeros(3, 4, 4)], columns=2, gap=0, paper=1.0)
    assert made.shape == (3, 8, 16)
    assert (made[:, 2:6, 10:14] == 0).all()
    assert (made[:, :2, 8:] == 1).all()


def test_sheet_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        sheet([], 2)


def test_enlarge_repeats_and_fit_keeps_the_mean():
    image = torch.arange(12.0).reshape(1, 1, 3, 4).expand(1, 3, 3, 4) / 12
    assert enlarge(image, 2)[0, 0, :2, :2].unique().tolist() == [0.0]
    assert fit(image, 9).shape == (1, 3, 6, 8)
    wide = torch.rand(1, 3, 8, 64, generator=torch.Generator().manual_seed(0))
    assert fit(wide, 32).shape == (1, 3, 4, 32)
    assert fit(wide, 32).mean() == pytest.approx(float(wide.mean()), abs=1e-6)


def test_blend_only_where_asked():
    image = torch.zeros(1, 3, 1, 2)
    mixed = blend(image, (1.0, 0.0, 1.0), torch.tensor([[[True, False]]]), strength=0.5)
    assert mixed[0, :, 0, 0].tolist() == [0.5, 0.0, 0.5]
    assert mixed[0, :, 0, 1].tolist() == [0.0, 0.0, 0.0]


def test_colours_of_eight_neighbours_differ():
    assert len({colour(k) for k in range(8)}) == 8
    assert colour(8) == colour(0)


def test_figures_do_without_pyplot():
    drawn, axes = figure(2, 1, DARK)
    axes.plot([0, 1], [0, 1])
    pixels = decoded(figure_png(drawn, dpi=50))
    assert pixels.shape[:2] == (50, 100)
    # the corner is the dark theme's ground, #191b1f
    assert pixels[0, 0, :3][::-1].tolist() == [0x19, 0x1B, 0x1F]


def test_neither_importing_nor_drawing_touches_pyplot():
    code = (
        "import sys; from poodle_lightning.draw import curves, segmentation, canvas, flow, boxes; "
        "assert not {'matplotlib', 'cv2'} & set(sys.modules); "
        "canvas.figure_png(curves.curves({'a': ([0, 1], [0, 1])})); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
