"""Tiny data sets of whole images in the official layouts, and what they hold."""

import json
import struct

import numpy as np
from PIL import Image
from scipy.io import savemat


def picture(number, side=12):
    """A plain image whose grey says its number."""
    return np.full((side, side, 3), number % 256, np.uint8)


def save(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(number)).save(path, quality=100)


# ---- CIFAR, as Python 2 wrote it
def python2(value):
    """Opcodes of protocol 2 as Python 2 pickles them: its strings are BINSTRING, numpy's module is core."""
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"(" + b"".join(map(python2, value)) + b"l"
    if isinstance(value, dict):
        return b"(" + b"".join(python2(key) + python2(item) for key, item in value.items()) + b"d"
    kind = b"cnumpy\ndtype\n(" + python2(b"u1") + python2(0) + python2(1) + b"tR("
    kind += python2(3) + python2(b"|") + b"NNN" + python2(-1) + python2(-1) + python2(0) + b"tb"
    made = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n("
        + python2(0)
        + b"t"
        + python2(b"b")
        + b"tR"
    )
    shape = b"(" + b"".join(map(python2, value.shape)) + b"t"
    return made + b"(" + python2(1) + shape + kind + b"I00\n" + python2(value.tobytes()) + b"tb"


def write_python2(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x80\x02" + python2(content) + b".")


def cifar_rows(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def cifar10(root):
    """Five training files of 10 images and a test of 10; every class once in each."""
    folder = root / "cifar-10-batches-py"
    write_python2(folder / "batches.meta", {b"label_names": [b"c%d" % n for n in range(10)]})
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        labels = [(n + number) % 10 for n in range(10)]
        write_python2(folder / name, {b"data": cifar_rows(10, number), b"labels": labels})
    return root


def cifar100(root):
    folder = root / "cifar-100-python"
    write_python2(folder / "meta", {b"fine_label_names": [b"f%d" % n for n in range(100)]})
    for number, name in enumerate(("train", "test")):
        labels = [(7 * n + number) % 100 for n in range(100)]
        content = {b"data": cifar_rows(100, number), b"fine_labels": labels, b"coarse_labels": [0] * 100}
        write_python2(folder / name, content)
    return root


# ---- MATLAB
def flowers102(root):
    """9 images of 3 classes: image i has class 1 + (i - 1) mod 3."""
    savemat(root / "imagelabels.mat", {"labels": np.array([[1, 2, 3] * 3], np.uint8)})
    sets = {"trnid": [[5, 1, 3]], "valid": [[2]], "tstid": [[9, 4, 8]]}
    savemat(root / "setid.mat", {key: np.array(value, np.uint16) for key, value in sets.items()})
    for number in range(1, 10):
        save(root / "jpg" / f"image_{number:05d}.jpg", 20 * number)
    return root


CAR_NAMES = ["Acura", "BMW", "Saab"]


def names_of(cars):
    names = np.empty((1, len(cars)), object)
    names[0] = cars
    return names


def cars(root):
    """8 images; image i has class 1 + i mod 3 and a box down to row 40 + i, the field before the class."""
    kind = [("relative_im_path", "O"), *((f"bbox_{e}", "O") for e in ("x1", "y1", "x2", "y2"))]
    rows = np.empty((1, 8), [*kind, ("class", "O"), ("test", "O")])
    for number in range(8):
        path = f"car_ims/{number:06d}.jpg"
        rows[0, number] = (path, 1, 2, 30, 40 + number, 1 + number % 3, int(number >= 5))
        save(root / path, 25 * number)
    savemat(root / "cars_annos.mat", {"annotations": rows, "class_names": names_of(CAR_NAMES)})
    return root


def cars_devkit(root):
    """The form with a development kit, as torchvision takes it."""
    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": names_of(CAR_NAMES)})
    kind = [*((f"bbox_{e}", "O") for e in ("x1", "y1", "x2", "y2")), ("class", "O"), ("fname", "O")]
    for part, count, file in (
        ("train", 5, "devkit/cars_train_annos.mat"),
        ("test", 3, "cars_test_annos_withlabels.mat"),
    ):
        rows = np.empty((1, count), kind)
        for number in range(count):
            rows[0, number] = (1, 2, 30, 40, 1 + number % 3, f"{number:05d}.jpg")
            save(root / f"cars_{part}" / f"{number:05d}.jpg", 30 * number)
        savemat(root / file, {"annotations": rows})
    return root


# ---- iNaturalist
def inat18(root):
    """Categories 3, 5 and 9, of which two share a name; the annotations are not in the images' order."""
    names = {3: "Felis catus", 5: "Apis", 9: "Apis"}
    for split, numbers in (("train", range(10, 16)), ("val", range(30, 33))):
        images, marks = [], []
        for place, number in enumerate(numbers):
            category = (5, 9, 3)[place % 3]
            file = f"train_val2018/Some/{category}/{number}.jpg"
            images.append({"id": number, "file_name": file})
            marks.insert(0, {"id": number, "image_id": number, "category_id": category})
            save(root / file, 7 * number)
        content = {"images": images, "annotations": marks}
        content["categories"] = [{"id": key, "name": str(key)} for key in (9, 3, 5)]
        (root / f"{split}2018.json").write_text(json.dumps(content))
    kept = [{"id": key, "name": name} for key, name in names.items()]
    (root / "categories.json").write_text(json.dumps(kept))
    return root


def folder(root):
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            for number in range(count):
                save(root / split / name / f"{number}.jpg", 60 * label + 10 * number)
    return root


TREES = {
    "folder": folder, "cifar10": cifar10, "cifar100": cifar100, "flowers102": flowers102, "cars": cars,
    "inat18": inat18,
}  # fmt: skip
