"""COCO and LVIS in miniature: bright rectangles of two classes on dark noise."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (96, 128)


def detection_tree(root: Path, images: int = 3, lvis: bool = False) -> Path:
    draws = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        rows, objects = [], []
        for number in range(1, images + 1):
            name = f"{number:012d}.jpg"
            picture = draws.integers(0, 80, (*SIZE, 3), dtype=np.uint8)
            for kind in (0, 1):
                x, y = int(draws.integers(0, 60)), int(draws.integers(0, 40))
                picture[y : y + 48, x : x + 56, kind] = 255
                corners = [x, y, x + 56, y, x + 56, y + 48, x, y + 48]
                objects.append(
                    {
                        "id": len(objects) + 1,
                        "image_id": number,
                        "category_id": (3, 7)[kind],
                        "bbox": [x, y, 56, 48],
                        "area": 56 * 48,
                        "iscrowd": 0,
                        "segmentation": [corners],
                    }
                )
            Image.fromarray(picture).save(root / f"{split}2017" / name)
            row = {"id": number, "height": SIZE[0], "width": SIZE[1]}
            if lvis:
                row |= {"coco_url": f"http://images/{split}2017/{name}"}
                row |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
            else:
                row["file_name"] = name
            rows.append(row)
        kinds = [{"id": 3, "name": "red", "frequency": "f"}, {"id": 7, "name": "green", "frequency": "r"}]
        file = f"lvis_v1_{split}.json" if lvis else f"instances_{split}2017.json"
        content = {"images": rows, "annotations": objects, "categories": kinds}
        (root / "annotations" / file).write_text(json.dumps(content), encoding="utf-8")
    return root
