"""Images as arrays in files: .npz and .npy of many tools, and MNIST's kin under their published names."""

import gzip
import math
import re
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from score_sde import files
from score_sde.errors import UserError, one_line
from score_sde.sources.raw import SPLITS, Raw, Source, dark, from_arrays, split_called

# What tools call the images of a whole set and their labels: this one, its samples, guided diffusion.
WHOLE = (("images", "labels"), ("samples", "labels"), ("arr_0", "arr_1"))
# The same for each split, as MedMNIST and Keras do.
BY_SPLIT = (("{}_images", "{}_labels"), ("x_{}", "y_{}"), ("X_{}", "y_{}"))


def array_names() -> dict[str, tuple[str | None, str]]:
    """Each name of images: (their split, None for a whole set; the name of their labels)."""
    names = {images: (None, labels) for images, labels in WHOLE}
    for split, calls in SPLITS.items():
        for called in calls:
            names |= {images.format(called): (split, labels.format(called)) for images, labels in BY_SPLIT}
    return names


NAMES = array_names()


def from_named(arrays: Mapping[str, np.ndarray], where: str, others: Collection[str] = ()) -> Source:
    """Splits of arrays that have the names of any tool; others: names of arrays that stayed unread."""
    splits, used, notes = {}, set(), []
    for images, (split, labels) in NAMES.items():
        if images in arrays and (split or "train") not in splits and not (split is None and splits):
            splits[split or "train"] = from_arrays(arrays[images], arrays.get(labels), where)
            used |= {images, labels}
            if split is None:
                break
    if not splits:
        known = "neither `images` nor `train_images`, nor what other tools call them (`samples`, `arr_0`, `x_train`)"
        raise UserError(f"{where} holds {known}, but {', '.join(sorted({*arrays, *others})[:8]) or 'nothing'}")
    over = sorted({*arrays, *others} - used)
    if over:
        notes.append(f"{where}: passed over {', '.join(over[:8])}{', ...' if over[8:] else ''}")
    return Source(splits, notes=(*notes, *_oddities(splits, where)))


def _oddities(splits: Mapping[str, Raw], where: str) -> list[str]:
    """What is odd about images or labels, and yet may be meant."""
    notes, labels = [], [raw.arrays["label"] for raw in splits.values() if "label" in raw.arrays and raw.size]
    if any(map(dark, splits.values())):
        notes.append(f"{where}: its levels are 0 and 1 of 0..255, which is all but black: save images * 255")
    if labels and min(numbers.min() for numbers in labels) > 0:
        least, most = min(numbers.min() for numbers in labels), max(numbers.max() for numbers in labels)
        notes.append(f"{where}: labels are {least} to {most}: no image is of class 0, and there are {most + 1} classes")
    return notes


def from_npz(path: Path) -> Source:
    """An .npz with images by one of NAMES; other arrays in it stay unread."""
    wanted = {*NAMES, *(labels for _, labels in NAMES.values())}
    try:
        arrays = files.load_npz(path, wanted)
        others = set(files.names_npz(path)) - set(arrays)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable .npz of plain arrays: {one_line(error)}") from error
    return from_named(arrays, str(path), others)


def from_npy(path: Path) -> Source:
    """An .npy of images, mapped into memory, not read as a whole."""
    return from_named({"images": map_npy(path)}, str(path))


def map_npy(path: Path) -> np.ndarray:
    """The array of an .npy, of which only what is asked for is read."""
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except Exception as error:  # of many types, for a header that lies
        raise UserError(f"{path} is not a readable .npy of plain numbers: {one_line(error)}") from error


def npy_files(folder_files: list[Path]) -> dict[str, Path]:
    """Files that are arrays of NAMES, such as x_train.npy, if there are any images among them."""
    wanted = {*NAMES, *(labels for _, labels in NAMES.values())}
    named = {path.stem: path for path in folder_files if path.suffix == ".npy" and path.stem in wanted}
    return named if set(named) & set(NAMES) else {}


# ------------------------------------------------------------------------------------------------ MNIST and its kin

# MNIST and Fashion-MNIST: train-images-idx3-ubyte, in some archives train-images.idx3-ubyte; EMNIST:
# emnist-balanced-train-images-idx3-ubyte; QMNIST: qmnist-train-labels-idx2-int, whose first column is the digit; KMNIST
# also kmnist-train-imgs.npz and kmnist-train-labels.npz, each with an arr_0.
_IDX = r"[-.]idx(?P<rank>[123])-(?P<type>ubyte|int)(?:\.gz)?"
_NAME = re.compile(rf"(?P<set>(?:.*[-_])?)(?P<part>[^-_]+)-(?P<what>images|imgs|labels)(?:{_IDX}|\.npz)", re.IGNORECASE)
_TYPES = {"ubyte": (8, np.dtype(np.uint8)), "int": (12, np.dtype(">i4"))}  # IDX's code of it


class _File(NamedTuple):
    path: Path
    set: str  # whose it is, such as "emnist-balanced"; empty for MNIST
    part: str  # of it, such as "t10k"
    images: bool  # or labels


def _named(paths: Iterable[Path]) -> list[_File]:
    """The files of MNIST's kin among these, told by name."""
    matches = [(path, _NAME.fullmatch(path.name)) for path in paths]
    return [
        _File(path, match["set"].strip("-_").lower(), match["part"].lower(), match["what"].lower() != "labels")
        for path, match in matches
        if match
    ]


def is_mnist(path: Path) -> bool:
    """Whether a file is called as the images of MNIST's kin are."""
    return any(file.images for file in _named([path]))


def from_mnist(paths: Iterable[Path], where: str) -> Source:
    """The images among files of MNIST's kin, and the labels that belong to them."""
    named = _named(paths)
    images = [file for file in named if file.images]
    sets = sorted({file.set for file in images})
    if len(sets) > 1:
        raise UserError(f"{where} holds several data sets ({', '.join(sets)}): give a folder with the files of one")
    labels = {(file.set, file.part): file.path for file in reversed(named) if not file.images}
    splits, notes = {}, []
    for file in images:
        split = split_called(file.part) or file.part
        if split not in splits:  # packed and unpacked files may lie side by side
            splits[split] = _split(file, labels.get((file.set, file.part)))
            if (file.set, file.part) not in labels:
                notes.append(f"{file.path}: no labels beside it")
    if sets[0].startswith("emnist"):
        notes.append(f"{where}: EMNIST's files hold images transposed, rows for columns; they are turned upright")
    return Source(splits, notes=(*notes, *_oddities(splits, where)))


def from_mnist_file(path: Path) -> Source:
    """The images of one file, and the labels beside it."""
    labels = (file for file in sorted(path.parent.glob("*labels*")) if file.is_file())
    source = from_mnist([path, *labels], str(path))
    return source._replace(splits={"train": next(iter(source.splits.values()))})


def _split(file: _File, labels: Path | None) -> Raw:
    images = _array(file.path)
    if file.set.startswith("emnist"):
        images = np.ascontiguousarray(images.transpose(0, 2, 1))
    numbers = None if labels is None else _array(labels)
    if numbers is not None and numbers.ndim == 2:
        numbers = numbers[:, 0]
    return from_arrays(images, numbers, str(file.path))


def _array(path: Path) -> np.ndarray:
    if path.suffix.lower() != ".npz":
        return read_idx(path)
    try:
        return files.load_npz(path, {"arr_0"})["arr_0"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a readable .npz with one array, arr_0: {one_line(error)}") from error


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file of the type and rank in its name.

    Bytes 0, 0, a code of the type, the rank; then big-endian int32 sizes, then the values.
    """
    match = _NAME.fullmatch(path.name)
    rank, (code, dtype) = int(match["rank"]), _TYPES[match["type"].lower()]
    packed = path.suffix.lower() == ".gz"
    most = path.stat().st_size * (files.MOST_DEFLATED if packed else 1)
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            header = file.read(4 + 4 * rank)
            shape = np.frombuffer(header, ">i4", offset=4).tolist()
            if header[:4] != bytes([0, 0, code, rank]) or len(shape) != rank or min(shape) < 0:
                raise UserError(f"{path} is not an IDX file of rank {rank} and {match['type']} numbers")
            size = math.prod(shape) * dtype.itemsize
            values = file.read(size) if size <= most else b""
            if len(values) != size or file.read(1):
                raise UserError(f"{path}: its header promises {size} bytes, which is not what it holds")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path} is not a readable IDX file: {one_line(error)}") from error
    return np.frombuffer(values, dtype).reshape(shape)
