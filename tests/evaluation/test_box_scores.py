"""Average precision against pycocotools and lvis on random boxes and masks."""

import copy
import json
import math

import numpy as np
import pytest

from poodle_lightning.evaluation.box_scores import average_precision

KINDS = (1, 3, 4, 9)


def scene(seed, masks=False):
    from pycocotools import mask as api

    draws = np.random.default_rng(seed)
    images = [
        {
            "id": i,
            "height": 200,
            "width": 300,
            "coco_url": "http://images/val2017/1.jpg",
            "neg_category_ids": [int(draws.choice(KINDS))],
            "not_exhaustive_category_ids": [int(draws.choice(KINDS))],
        }
        for i in range(1, 13)
    ]
    truth, found = [], []
    for image in images:
        for _ in range(draws.integers(1, 6)):
            w, h = draws.uniform(5, 140, 2)
            x, y = draws.uniform(0, 300 - w), draws.uniform(0, 200 - h)
            kind = int(draws.choice(KINDS))
            one = {"id": len(truth) + 1, "image_id": image["id"], "category_id": kind, "area": w * h * 0.9}
            one |= {"bbox": [x, y, w, h], "iscrowd": int(not masks and draws.random() < 0.1)}
            one["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            truth.append(one)
            for _ in range(draws.integers(0, 3)):
                box = np.array([x, y, w, h]) + draws.normal(0, 0.1, 4) * np.array([w, h, w, h])
                box[2:] = np.maximum(box[2:], 2)
                guess = {"image_id": image["id"], "category_id": kind if draws.random() < 0.8 else 3}
                guess |= {"score": float(draws.random()), "bbox": box.tolist()}
                if masks:
                    pixels = np.zeros((200, 300), np.uint8, order="F")
                    a, b, c, d = np.maximum(box, 0).astype(int)
                    pixels[b : b + d, a : a + c] = 1
                    guess["segmentation"] = api.encode(pixels)
                found.append(guess)
    kinds = [{"id": k, "name": str(k), "frequency": "rcf"[k % 3]} for k in KINDS]
    return {"images": images, "annotations": truth, "categories": kinds}, found


@pytest.mark.parametrize(("kind", "masks"), [("bbox", False), ("segm", True)])
def test_coco_against_pycocotools(kind, masks):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = scene(0, masks)
    gold = COCO()
    gold.dataset = copy.deepcopy(truth)
    gold.createIndex()
    guesses = copy.deepcopy(found)
    if masks:  # else the library takes the results for boxes
        for one in guesses:
            del one["bbox"]
    run = COCOeval(gold, gold.loadRes(guesses), kind)
    run.evaluate()
    run.accumulate()
    run.summarize()
    before = copy.deepcopy((truth, found))
    mine = average_precision(truth, found, kind)
    assert list(mine.means.values()) == pytest.approx(run.stats[:6].tolist(), abs=1e-9)
    assert list(mine.means) == ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
    for number, value in enumerate(mine.classes):
        assert value == pytest.approx(run.eval["precision"][:, :, number, 0, -1].mean(), abs=1e-9)
    assert (truth, found) == before


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_federated_against_lvis(kind, tmp_path, monkeypatch):
    lvis = pytest.importorskip("lvis")
    monkeypatch.setattr(np, "float", float, raising=False)  # the library was written for NumPy 1
    truth, found = scene(1, masks=True)
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth), encoding="utf-8")
    gold = lvis.LVIS(str(path))
    run = lvis.LVISEval(gold, lvis.LVISResults(gold, copy.deepcopy(found)), kind)
    run.run()
    names = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "APs", "ap_medium": "APm"}
    names |= {"ap_large": "APl", "ap_rare": "APr", "ap_common": "APc"}
    mine = average_precision(truth, found, kind, federated=True, limit=300).means
    for name, theirs in names.items():
        assert mine[name] == pytest.approx(run.results[theirs], abs=1e-9), name
    assert math.isnan(mine["ap_frequent"])  # no class is; LVIS says −1
    assert mine["ap"] != pytest.approx(average_precision(truth, found, kind).means["ap"], abs=1e-3)


def test_nothing_found_and_all_found():
    truth, _ = scene(2)
    none = average_precision(truth, [])
    assert none.means["ap"] == 0.0
    exact = [{**one, "score": 0.5} for one in truth["annotations"] if not one["iscrowd"]]
    for one in exact:
        del one["id"]
    assert average_precision(truth, exact).means["ap"] == pytest.approx(1.0)
