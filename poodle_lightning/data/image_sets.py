"""Where images with one class each come from: folders and published data sets by their official layouts.

``root`` is the folder that holds the layout, or the one above it:

===============  =============================================================================================
``folder``       ``{train,val}/<class>/**/*.jpg``: torchvision's ``ImageFolder``, ImageNet
``cifar10``      ``cifar-10-batches-py/``: ``data_batch_1`` … ``_5``, ``test_batch``, ``batches.meta``
``cifar100``     ``cifar-100-python/``: ``train``, ``test``, ``meta``; the 100 fine classes
``flowers102``   ``jpg/image_<5 digits>.jpg``, ``imagelabels.mat``, ``setid.mat``; training is ``trnid`` and
                 ``valid`` together, 2,040 images, the test is ``tstid``, 6,149
``cars``         ``cars_annos.mat``, ``car_ims/*.jpg``; or ``devkit/*.mat``, ``cars_{train,test}/*.jpg``
``inat18``       ``train2018.json``, ``val2018.json``, perhaps ``categories.json``, ``train_val2018/…/*.jpg``
===============  =============================================================================================

The files of CIFAR are pickles. They are read by an unpickler that makes NumPy arrays and plain data only.
"""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from poodle_lightning.data.label_files import IMAGES, Array, read_image
from poodle_lightning.data.label_sources import SPLITS, Split
from poodle_lightning.types import UserError

Source = Literal["folder", "cifar10", "cifar100", "flowers102", "cars", "inat18"]


@dataclass(frozen=True)
class ImageSet:
    """The images of a split, a class each.

    Args:
        names: of their files, or made up where several are in one file.
        labels: ``(n,)`` int64.
        pixels: ``(n, H, W, 3)`` uint8 where the images are in memory; else ``names`` are paths.
    """

    names: tuple[str, ...]
    labels: Array
    pixels: Array | None = None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, number: int) -> Array:
        """Image ``number``, ``(H, W, 3)`` uint8 RGB.

        Raises:
            UserError: its file cannot be read.
        """
        return read_image(Path(self.names[number])) if self.pixels is None else self.pixels[number]

    def part(self, numbers: Sequence[int]) -> ImageSet:
        """Some of the images."""
        pixels = None if self.pixels is None else self.pixels[list(numbers)]
        names = tuple(self.names[number] for number in numbers)
        return replace(self, names=names, labels=self.labels[list(numbers)], pixels=pixels)


@dataclass(frozen=True)
class Opened:
    """A data set whose classes are known.

    Args:
        classes: their names, all different, in the order of the labels.
        split: lists the images of a split.
    """

    classes: tuple[str, ...]
    split: Callable[[Split], ImageSet]


def open_images(source: Source, root: Path) -> Opened:
    """A data set; see the module for the layouts.

    Raises:
        UserError: there is no such source, a file is missing, or it does not hold what it should.
    """
    openers: dict[str, Callable[[Path], Opened]] = {
        "folder": _folder,
        "cifar10": lambda root: _cifar(root, 10),
        "cifar100": lambda root: _cifar(root, 100),
        "flowers102": _flowers,
        "cars": _cars,
        "inat18": _inaturalist,
    }
    if source not in openers:
        raise UserError(f"data.source {source!r} does not exist: choose one of {', '.join(openers)}")
    return openers[source](root)


def _where(root: Path, markers: tuple[str, ...], *below: str) -> Path:
    """The folder that has one of ``markers``: ``root`` or one of the named folders in it."""
    for folder in (root, *(root / name for name in below)):
        if any((folder / marker).exists() for marker in markers):
            return folder
    raise UserError(f"{root}: has no {' and no '.join(markers)}: give --data.root with the official layout")


# ---- folders
def _folder(root: Path) -> Opened:
    classes = _folder_names(root)

    def split(name: Split) -> ImageSet:
        paths: list[str] = []
        labels: list[int] = []
        for label, kind in enumerate(classes):
            found = sorted(
                Path(where, file)
                for where, _, files in os.walk(root / name / kind, followlinks=True)
                for file in files
                if file.lower().endswith(IMAGES)
            )
            paths += map(str, found)
            labels += [label] * len(found)
        return ImageSet(tuple(paths), np.array(labels, np.int64))

    return Opened(classes, split)


def _folder_names(root: Path) -> tuple[str, ...]:
    found: list[list[str]] = []
    for split in SPLITS:
        folder = root / split
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; it must hold one folder of images per class")
        found.append(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    train, val = found
    if not train:
        raise UserError(f"{root / 'train'}: holds no folders; each class needs one")
    if lacking := sorted(set(train) - set(val)):
        more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        raise UserError(f"{root / 'val'}: the class {lacking[0]} of train is not there{more}")
    if strange := sorted(set(val) - set(train)):
        more = f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
        raise UserError(f"{root / 'val'}: the class {strange[0]} is not in train{more}")
    return tuple(train)


# ---- CIFAR
class _PlainUnpickler(pickle.Unpickler):
    """Makes NumPy arrays and plain data; every other class or function is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may ask for.

        Raises:
            UnpicklingError: anything else.
        """
        rebuild = np.empty(0).__reduce__()[0]  # numpy's own, whose module has had two names
        allowed = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): rebuild,
            ("numpy._core.multiarray", "_reconstruct"): rebuild,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of CIFAR needs")
        return allowed[module, name]


def read_plain_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in one of CIFAR's files; nothing in it is executed.

    The files were written by Python 2, whose strings arrive as bytes; keys are decoded.

    Raises:
        UserError: the file is missing, damaged, or asks for more than arrays and plain data.
    """
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file, encoding="bytes").load()
        if not isinstance(content, Mapping):
            raise ValueError("it holds no dictionary")
        return {_text(key): value for key, value in content.items()}
    except FileNotFoundError as error:
        raise UserError(f"{path}: the file is missing: give --data.root with CIFAR's own layout") from error
    except (pickle.UnpicklingError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError,
            ImportError, OverflowError, MemoryError) as error:  # fmt: skip
        said = " ".join(str(error).split())
        raise UserError(f"{path}: is no file of CIFAR and was not loaded: {said}") from error


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _cifar(root: Path, count: Literal[10, 100]) -> Opened:
    ten = count == 10
    marker = "batches.meta" if ten else "meta"
    folder = _where(root, (marker,), "cifar-10-batches-py" if ten else "cifar-100-python")
    files: dict[str, list[str]] = {
        "train": [f"data_batch_{number}" for number in range(1, 6)] if ten else ["train"],
        "val": ["test_batch" if ten else "test"],
    }
    names = read_plain_pickle(folder / marker).get("label_names" if ten else "fine_label_names")
    if not isinstance(names, list) or len(set(map(_text, names))) != count:
        raise UserError(f"{folder / marker}: does not name the {count} classes of CIFAR-{count}")

    def split(name: Split) -> ImageSet:
        parts = [_cifar_batch(folder / file, count) for file in files[name]]
        pixels, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
        made = tuple(f"{folder / name}:{number}" for number in range(len(labels)))
        return ImageSet(made, labels, pixels)

    return Opened(tuple(map(_text, names)), split)


def _cifar_batch(path: Path, count: int) -> tuple[Array, Array]:
    """Pixels ``(n, 32, 32, 3)`` and labels ``(n,)`` of one file."""
    content = read_plain_pickle(path)
    pixels, labels = content.get("data"), content.get("labels" if count == 10 else "fine_labels")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
        raise UserError(f"{path}: has no images of CIFAR, rows of 3,072 bytes: download it again")
    whole = isinstance(labels, list) and all(isinstance(n, int) and 0 <= n < count for n in labels)
    if not isinstance(labels, list) or len(labels) != len(pixels) or not whole:
        raise UserError(f"{path}: has no label from 0 to {count - 1} for every image: download it again")
    rows = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(rows), np.array(labels, np.int64)


# ---- Oxford Flowers, Stanford Cars
def _matlab(path: Path, *keys: str) -> list[Array]:
    """Variables of a MATLAB file, at least one-dimensional, without axes of length 1.

    Raises:
        UserError: the file is missing or damaged, or lacks one of them.
    """
    from scipy.io import loadmat

    if not path.is_file():
        raise UserError(f"{path}: the file is missing: give --data.root with the official layout")
    try:
        content = loadmat(path, squeeze_me=True)
    except Exception as error:  # scipy raises whatever its parser stumbles over
        said = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as a MATLAB file: {said}") from error
    if lacking := [key for key in keys if key not in content]:
        raise UserError(f"{path}: has no variable {lacking[0]}: download it again")
    return [np.atleast_1d(content[key]) for key in keys]


def _flowers(root: Path) -> Opened:
    folder = _where(root, ("imagelabels.mat",), "flowers-102", "oxford_flowers102")
    (given,) = _matlab(folder / "imagelabels.mat", "labels")
    labels = _counted(folder / "imagelabels.mat", given)
    given_parts = _matlab(folder / "setid.mat", "trnid", "valid", "tstid")
    parts = [_counted(folder / "setid.mat", part) for part in given_parts]
    count = int(labels.max())

    def split(name: Split) -> ImageSet:
        numbers = np.concatenate(parts[:2]) if name == "train" else parts[2]
        if numbers.max() > len(labels):
            raise UserError(f"{folder / 'setid.mat'}: names images that imagelabels.mat has no label for")
        paths = tuple(str(folder / "jpg" / f"image_{number:05d}.jpg") for number in numbers.tolist())
        return ImageSet(paths, labels[numbers - 1] - 1)

    return Opened(tuple(f"flower {number}" for number in range(1, count + 1)), split)


def _counted(path: Path, values: Sequence[Any] | Array) -> Array:
    """Numbers of a MATLAB file, ``(n,)`` int64: whole, from 1 on, at least one.

    Raises:
        UserError: they are something else.
    """
    try:
        made = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        made = np.empty(0)
    if made.ndim != 1 or not made.size or not bool((made >= 1).all() and (made % 1 == 0).all()):
        raise UserError(f"{path}: has no list of whole numbers from 1 on where it should: download it again")
    return made.astype(np.int64)


def _cars(root: Path) -> Opened:
    """The class is the field of that name; by its place (4) it would be a coordinate of the box."""
    folder = _where(root, ("cars_annos.mat", "devkit"), "stanford_cars", "cars")
    path = folder / "cars_annos.mat"
    if not path.exists():
        return _cars_devkit(folder)
    rows, names = _matlab(path, "annotations", "class_names")
    fields = _fields(path, rows, "relative_im_path", "class", "test")

    def split(name: Split) -> ImageSet:
        chosen = [place for place, test in enumerate(fields[2]) if bool(test) == (name == "val")]
        paths = tuple(str(folder / str(fields[0][place])) for place in chosen)
        return ImageSet(paths, _from_one([fields[1][place] for place in chosen], len(names), path))

    return Opened(_different(list(map(str, names))), split)


def _cars_devkit(folder: Path) -> Opened:
    (names,) = _matlab(folder / "devkit" / "cars_meta.mat", "class_names")

    def split(name: Split) -> ImageSet:
        part = "train" if name == "train" else "test"
        file = "cars_train_annos.mat" if name == "train" else "cars_test_annos_withlabels.mat"
        beside = folder / file  # the labels of the test are a download of their own
        path = beside if beside.exists() else folder / "devkit" / file
        (rows,) = _matlab(path, "annotations")
        files, classes = _fields(path, rows, "fname", "class")
        paths = tuple(str(folder / f"cars_{part}" / str(file)) for file in files)
        return ImageSet(paths, _from_one(classes, len(names), path))

    return Opened(_different(list(map(str, names))), split)


def _fields(path: Path, rows: Array, *fields: str) -> list[list[Any]]:
    """Columns of a MATLAB structure."""
    if lacking := [field for field in fields if field not in (rows.dtype.names or ())]:
        raise UserError(f"{path}: its annotations have no field {lacking[0]}: download it again")
    return [rows[field].tolist() for field in fields]


def _from_one(classes: Sequence[Any], count: int, path: Path) -> Array:
    """Labels from 0 of MATLAB's classes from 1."""
    labels = _counted(path, classes) - 1 if classes else np.empty(0, np.int64)
    if len(labels) and labels.max() >= count:
        raise UserError(f"{path}: has a class outside 1 to {count}: download it again")
    return labels


# ---- iNaturalist
def _inaturalist(root: Path) -> Opened:
    """One class per category of ``train2018.json``, in the order of their numbers (8,142 species)."""
    folder = _where(root, ("train2018.json",), "inat2018", "2018")
    path = folder / "train2018.json"
    train = _inaturalist_file(path)
    categories = [row for row in _rows(train.get("categories")) if isinstance(row.get("id"), int)]
    given = {row["id"]: str(row.get("name", row["id"])) for row in categories}
    numbers = sorted(given or {row["category_id"] for row in train["annotations"]})
    spoken = folder / "categories.json"  # the names, which the competition's files leave out
    if spoken.exists():
        rows = [row for row in _rows(_json(spoken)) if "name" in row]
        numbered = [(row.get("id", place), str(row["name"])) for place, row in enumerate(rows)]
        given |= {number: name for number, name in numbered if isinstance(number, int)}
    label = {number: place for place, number in enumerate(numbers)}

    def split(name: Split) -> ImageSet:
        content = train if name == "train" else _inaturalist_file(folder / "val2018.json")
        where = path if name == "train" else folder / "val2018.json"
        category = {row["image_id"]: row["category_id"] for row in content["annotations"]}
        images = content["images"]
        if strange := [row["file_name"] for row in images if category.get(row["id"]) not in label]:
            raise UserError(f"{where}: {strange[0]} has no category of train2018.json: download it again")
        labels = np.array([label[category[row["id"]]] for row in images], np.int64)
        return ImageSet(tuple(str(folder / row["file_name"]) for row in images), labels)

    return Opened(_different([given.get(number, str(number)) for number in numbers]), split)


def _inaturalist_file(path: Path) -> dict[str, Any]:
    """``images`` and ``annotations`` of a file, whose rows have what is needed."""
    content = _json(path)
    needed: dict[str, dict[str, type]] = {
        "images": {"id": int, "file_name": str},
        "annotations": {"image_id": int, "category_id": int},
    }
    for part, keys in needed.items():
        given = content.get(part) if isinstance(content, dict) else None
        rows = _rows(given)
        whole = all(isinstance(row.get(key), kind) for row in rows for key, kind in keys.items())
        if not isinstance(given, list) or len(rows) < len(given) or not whole:
            raise UserError(f"{path}: its {part} do not all have {' and '.join(keys)}: download it again")
    return content


def _rows(content: Any) -> list[dict[str, Any]]:
    """Those of a JSON list that have keys."""
    return [row for row in content if isinstance(row, dict)] if isinstance(content, list) else []


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: the file is missing: give --data.root with the official layout") from error
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error


def _different(names: list[str]) -> tuple[str, ...]:
    """Names with their number behind those that occur twice."""
    times = Counter(names)
    return tuple(name if times[name] == 1 else f"{name} ({place})" for place, name in enumerate(names))
