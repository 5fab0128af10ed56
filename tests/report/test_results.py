"""What an evaluation leaves on disk: numbers as they were, pictures of what went wrong."""

import json
import math
import statistics

import cv2
import numpy as np
import pytest
import torch

from poodle_lightning.draw.canvas import png
from poodle_lightning.draw.segmentation import errors, palette
from poodle_lightning.evaluation.base import Scores
from poodle_lightning.report import write_report
from poodle_lightning.report.results import draw_worst, read_result, write_result, write_summary
from poodle_lightning.types import ClassSet, LabelledBatch

CLASSES = ClassSet(("road", "sky", "odd | new"), {"small": ("sky",)})


def scores(**changes):
    fields = {
        "protocol": "linear",
        "headline": "miou",
        "scores": {"miou": 0.3925, "miou_small": math.nan, "pixel_accuracy": 0.9},
        "per_class": {"iou": {"road": 0.5, "sky": 0.25, "odd | new": math.nan}},
        "counts": {"images": 2, "ignored_pixels": 1234},
        "details": {"lr": 0.02},
        "worst": [("sky", 1), ("road", 0)],
    }
    return Scores(**{**fields, **changes})


ABOUT = {"encoder": "runs/x/last.ckpt", "config": "linear_bdd100k", "seed": 3, "step": 60000}


def test_every_number_is_in_the_json_and_what_was_not_measured_is_null(tmp_path):
    write_result(tmp_path, scores(), ABOUT)
    content = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert content["value"] == 0.3925
    assert content["scores"] == {"miou": 0.3925, "miou_small": None, "pixel_accuracy": 0.9}
    assert content["per_class"]["iou"]["odd | new"] is None
    assert (content["encoder"], content["seed"], content["step"]) == ("runs/x/last.ckpt", 3, 60000)
    assert read_result(tmp_path) == content


def test_the_row_is_in_percent_and_pipes_do_not_break_it(tmp_path):
    write_result(tmp_path, scores(), ABOUT)
    lines = (tmp_path / "result.md").read_text().splitlines()
    assert lines[2] == "| runs/x/last.ckpt | linear | 39.2 | – | 90.0 |"
    assert "| odd \\| new | – |" in lines
    assert "2 images, 1,234 ignored pixels" in lines


def test_runs_are_averaged_with_the_deviation_of_a_sample(tmp_path):
    values = [0.30, 0.32, 0.37]
    contents = [
        write_result(tmp_path / str(seed), scores(scores={"miou": value}), {**ABOUT, "seed": seed})
        for seed, value in enumerate(values)
    ]
    summary = write_summary(tmp_path, contents)
    assert summary["seeds"] == [0, 1, 2]
    assert summary["mean"]["miou"] == pytest.approx(statistics.fmean(values))
    assert summary["std"]["miou"] == pytest.approx(np.std(values, ddof=1))
    assert "33.0 ± 3.6" in (tmp_path / "runs.md").read_text()


def test_what_a_run_did_not_measure_has_no_deviation(tmp_path):
    about = {"protocol": "boxes", "headline": "box_ap", **ABOUT}
    contents = [{**about, "scores": {"box_ap": ap, "box_ap_small": math.nan}} for ap in (0.1, 0.2)]
    summary = write_summary(tmp_path, contents)
    assert summary["mean"]["box_ap"] == pytest.approx(0.15)
    assert math.isnan(summary["std"]["box_ap_small"])
    assert "| 15.0 ± 7.1 | – ± – |" in (tmp_path / "runs.md").read_text()


class Data:
    classes = CLASSES

    def item(self, split, number):
        assert split == "val"
        labels = torch.tensor([[0, 0, 1, 255], [0, 1, 1, 2]], dtype=torch.uint8)[None]
        images = torch.full((1, 3, 4, 8), 128, dtype=torch.uint8)
        name = (f"val/frame {number}.jpg",)
        return LabelledBatch(images, labels, torch.tensor([number]), torch.tensor([0]), name)


class Zero:
    def predict_labels(self, batch):
        return torch.zeros(batch.labels.shape, dtype=torch.int64)


def test_pictures_show_image_truth_prediction_and_errors(tmp_path):
    written = draw_worst(tmp_path, scores(), Zero(), Data())
    assert [path.name for path in written] == ["01_sky_frame-1.png", "02_road_frame-0.png"]
    seen = cv2.imread(str(written[0]))[:, :, ::-1].astype(float) / 255
    # four cells of 240 rows (2:1 maps 480 wide) with a gap between them
    cells = [seen[a : a + 240, b : b + 480] for a in (0, 244) for b in (0, 484)]
    corner = [cell[20, 20] for cell in cells]
    colours = palette(CLASSES.names).numpy()
    np.testing.assert_allclose(corner[0], 128 / 255, atol=0.01)
    np.testing.assert_allclose(corner[1], colours[0], atol=0.01)
    np.testing.assert_allclose(corner[2], colours[0], atol=0.01)
    wrong, ignored = cells[3][100, 300], cells[3][20, 460]
    assert wrong[0] > 0.7
    assert wrong[1:].max() < 0.3
    assert ignored.max() < 0.05
    draw_worst(tmp_path, scores(worst=[("sky", 1)]), Zero(), Data())
    assert len(list((tmp_path / "pictures").iterdir())) == 1  # earlier ones are gone


def test_errors_tell_right_wrong_and_ignored_apart():
    truth = torch.tensor([[[0, 1, 255]]], dtype=torch.uint8)
    drawn = errors(truth, torch.tensor([[[0, 2, 2]]]))[0, :, 0]
    assert drawn[:, 0].min() > 0.8
    assert drawn[0, 1] > 0.8
    assert drawn[1:, 1].max() < 0.2
    assert drawn[:, 2].max() == 0


def test_the_report_of_an_evaluation_shows_scores_and_pictures(tmp_path):
    write_result(tmp_path, scores(), ABOUT)
    draw_worst(tmp_path, scores(), Zero(), Data())
    page = write_report(tmp_path).read_text()
    assert "Evaluation" in page
    assert "39.25 %" in page
    assert page.count("01_sky_frame-1") == 2
    assert "rgb(128 64 128)" in page  # the key says which colour is road
    assert "data:image/png;base64" in page


def test_the_report_draws_probes_one_plot_per_readout(tmp_path):
    rows = [
        "step,probe/streets/knn_miou,probe/streets/knn_miou_small,probe/streets/linear_miou",
        "9,0.1,0.0,0.2",
    ]
    (tmp_path / "metrics.csv").write_text("\n".join([*rows, "19,0.2,0.1,0.3"]))
    page = write_report(tmp_path).read_text()
    assert "streets, linear readout: mIoU in %" in page
    assert "streets, dense k-NN: mIoU in %" in page
    assert "Probes" in page


def test_a_torn_result_is_no_result(tmp_path):
    (tmp_path / "result.json").write_text('{"scores": {')
    assert read_result(tmp_path) is None


def test_the_report_of_object_discovery_says_what_its_pictures_show(tmp_path):
    found = Scores("object discovery", "corloc", {"corloc": 0.5, "jaccard": 0.25}, counts={"images": 2})
    write_result(tmp_path, found, ABOUT)
    assert "Pictures:" not in write_report(tmp_path).read_text()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "discovery_00001_dog.png").write_bytes(png(torch.zeros(3, 4, 4)))
    page = write_report(tmp_path).read_text()
    assert "CorLoc" in page
    assert "50.00 %" in page
    assert "found (magenta)" in page
    assert "errors (red)" not in page
    assert page.count("discovery_00001_dog") == 2


def test_errors_are_printed_as_they_are_and_shares_in_percent(tmp_path):
    scores = Scores("depth", "rmse", {"rmse": 0.9504, "delta1": 0.8125})
    content = write_result(tmp_path, scores, {"encoder": "e", "seed": 0, "step": 1})
    text = (tmp_path / "result.md").read_text()
    assert "RMSE [m] | δ < 1.25" in text
    assert "0.950 | 81.2" in text
    assert text.endswith("Scores in %; errors as they are.\n")
    summary = write_summary(tmp_path, [content, {**content, "scores": {"rmse": 1.0504, "delta1": 0.8125}}])
    assert summary["headline"] == "rmse"
    assert "1.000 ± 0.071 | 81.2 ± 0.0" in (tmp_path / "runs.md").read_text()
