"""Images as arrays in files: .npz and .npy of many tools, and IDX under the names that it is published by."""

import gzip
import math
import re
import zlib
from collections.abc import Collection, Mapping
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
    if any(map(dark, splits.values())):
        notes.append(f"{where}: its levels are 0 and 1 of 0..255, which is all but black: save images * 255")
    return Source(splits, notes=tuple(notes))


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


# ------------------------------------------------------------------------------------------------ IDX

# MNIST and Fashion-MNIST: train-images-idx3-ubyte, in some archives train-images.idx3-ubyte; EMNIST:
# emnist-balanced-train-images-idx3-ubyte; QMNIST: qmnist-train-labels-idx2-int, whose first column is the digit.
_NAME = re.compile(
    r"(?P<set>(?:.*[-_])?)(?P<part>[^-_]+)-(?P<what>images|labels)[-.]idx(?P<rank>[123])-(?P<type>ubyte|int)(?:\.gz)?",
    re.IGNORECASE,
)
_TYPES = {"ubyte": (8, np.dtype(np.uint8)), "int": (12, np.dtype(">i4"))}  # IDX's code of it


class _Idx(NamedTuple):
    path: Path
    set: str  # whose it is, such as "emnist-balanced"; empty for MNIST
    part: str  # of it, such as "t10k"
    what: str  # "images" or "labels"


def idx_files(paths: list[Path]) -> list[_Idx]:
    """The IDX files among these, told by name."""
    matches = [(path, _NAME.fullmatch(path.name)) for path in paths]
    named = [(path, match.group) for path, match in matches if match]
    return [
        _Idx(path, group("set").strip("-_").lower(), group("part").lower(), group("what").lower())
        for path, group in named
    ]


def is_idx_images(path: Path) -> bool:
    return any(file.what == "images" for file in idx_files([path]))


def from_idx(paths: list[Path], where: str, part: str | None = None) -> Source:
    """The images among IDX files, and the labels that belong to them; part: of that one alone."""
    named = idx_files(paths)
    images = [file for file in named if file.what == "images" and part in (None, file.part)]
    sets = sorted({file.set for file in images})
    if len(sets) > 1:
        raise UserError(f"{where} holds several data sets ({', '.join(sets)}): give a folder with the files of one")
    labels = {(file.set, file.part): file.path for file in reversed(named) if file.what == "labels"}
    splits, notes = {}, []
    for file in images:
        split = split_called(file.part) or file.part
        if split not in splits:  # packed and unpacked files may lie side by side
            splits[split] = _idx_split(file, labels.get((file.set, file.part)))
            if (file.set, file.part) not in labels:
                notes.append(f"{file.path}: no labels beside it")
    if sets[0].startswith("emnist"):
        notes.append(f"{where}: EMNIST's files hold images transposed, rows for columns; they are turned upright")
    return Source(splits, notes=tuple(notes))


def _idx_split(file: _Idx, labels: Path | None) -> Raw:
    images = read_idx(file.path)
    if file.set.startswith("emnist"):
        images = np.ascontiguousarray(images.transpose(0, 2, 1))
    numbers = None if labels is None else read_idx(labels)
    if numbers is not None and numbers.ndim == 2:
        numbers = numbers[:, 0]
    return from_arrays(images, numbers, str(file.path))


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
