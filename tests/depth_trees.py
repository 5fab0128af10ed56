"""Small trees of images with depth, as NYUv2's own file and in folders."""

import cv2
import h5py
import numpy as np
from PIL import Image
from scipy.io import savemat

from poodle_lightning.data.depth import DepthDataModule

H, W = 12, 16


def pixels(number):
    draws = np.random.default_rng(number)
    depth = draws.uniform(1, 5, (H, W)).astype(np.float32)
    depth[0, :3] = 0
    return draws.integers(0, 255, (H, W, 3), dtype=np.uint8), depth


def nyu(root, count=5, train=(1, 2, 4), test=(3, 5)):
    root.mkdir(exist_ok=True)
    images, depths = zip(*(pixels(number) for number in range(count)), strict=True)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        # MATLAB writes its (H, W, 3, N) from the last axis to the first
        file["images"] = np.stack(images, axis=-1).transpose()
        file["depths"] = np.stack(depths, axis=-1).transpose()
    lists = {"trainNdxs": np.array(train)[:, None], "testNdxs": np.array(test)[:, None]}
    savemat(root / "splits.mat", lists)
    return root


def folder(root, counts=(("train", 4), ("val", 2))):
    for split, count in counts:
        for name in ("rgb", "depth"):
            (root / split / name).mkdir(parents=True)
        for number in range(count):
            image, depth = pixels(number)
            Image.fromarray(image).save(root / split / "rgb" / f"{number}.png")
            cv2.imwrite(str(root / split / "depth" / f"{number}.png"), (depth * 1000).astype(np.uint16))
    return root


def module(root, **kwargs):
    return DepthDataModule(root=str(root), **{"size": (H, W), "num_workers": 0, **kwargs})
