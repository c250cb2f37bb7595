"""A data set as it is stored: splits of records, the names of its classes, and what was passed over."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from score_sde.data import gather
from score_sde.errors import UserError

CHANNELS = (1, 3, 4)  # of gray, colour, and colour with alpha


class Raw(NamedTuple):
    """A split as stored: record(i) -> (image, label).

    The image is uint8 (h, w, c) or encoded bytes, the label an int or None. An OSError means a disk that failed.

    name: i -> what image i is called within the data set; None where an image has its number alone.
    length: i -> bytes of image i as stored, told without reading it.
    arrays: the same records in one piece, {"image", "label"}, if they are in memory or mapped into it.
    """

    size: int
    record: Callable[[int], tuple[np.ndarray | bytes, int | None]]
    name: Callable[[int], str] | None = None
    length: Callable[[int], int] | None = None
    arrays: dict[str, np.ndarray] | None = None


class Source(NamedTuple):
    """What a reader returns: splits by name, the names of labels 0, 1, ..., and a line for whatever a user should know.

    Splits that people call by several names are "train", "validation" and "test" here.
    """

    splits: dict[str, Raw]
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


Parts = tuple[str, ...]  # a path within a tree
MAX_ENCODED = 2**28  # bytes of one file of an archive, which may promise anything


class Tree(NamedTuple):
    """Files that may be data, in the order of their paths, and what else was met."""

    root: str
    files: list[Parts]
    folders: set[Parts]
    read: Callable[[Parts], bytes]
    length: Callable[[Parts], int]
    passed: Counter  # what was passed over, by kind


# What people call a split; "t10k" is MNIST's.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "t10k"),
}
_CALLED = {called: name for name, calls in SPLITS.items() for called in calls}
_ENDING = re.compile(r"[-_ ]?(set|split|data|images|imgs|\d{4})$")  # as in training_set, val2017

# What systems and tools leave beside images, all of it lower-case; whatever begins with a dot is hidden as well.
_LEAVINGS = {
    *("__macosx", "__pycache__", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "@eadir"),
    *("#recycle", "$recycle.bin", "system volume information", "lost+found"),
}


def split_called(name: str) -> str | None:
    """The split that people mean by a name in any case, as in Valid, training_set or val2017; None: they mean none."""
    name = name.lower()
    return _CALLED.get(name) or _CALLED.get(_ENDING.sub("", name))


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is never data."""
    return name.startswith((".", "~$")) or name.lower() in _LEAVINGS


def count_line(passed: Counter, most: int = 8) -> str:
    """Counts by kind, the largest first, as in "10 .gif, 2 hidden"; empty if there are none."""
    kinds = passed.most_common(most)
    others = passed.total() - sum(count for _, count in kinds)
    return ", ".join([f"{count} {kind}" for kind, count in kinds] + ([f"{others} others"] if others else []))


def from_arrays(images: np.ndarray, labels: np.ndarray | None, where: str) -> Raw:
    """uint8 images (N, H, W, C) or (N, H, W), and integer labels (N,) or (N, 1), after checking that they are."""
    if images.dtype != np.uint8:
        raise UserError(f"{where}: images are {images.dtype}, expected uint8 levels 0..255{_conversion(images)}")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in CHANNELS or 0 in images.shape[1:]:
        raise UserError(
            f"{where}: images have shape {images.shape}, expected (N, H, W) or (N, H, W, C) with C 1, 3, 4"
            + (": move the channels, images.transpose(0, 2, 3, 1)" if images.shape[1:2] in ((1,), (3,), (4,)) else "")
        )
    if images.shape[2:] in ((3, 1), (4, 1)) and images.shape[1] > 4:
        raise UserError(f"{where}: shape {images.shape[:3]} is one image, expected several: save images[None]")
    if labels is None:
        return Raw(len(images), lambda i: (images[i], None), arrays={"image": images})
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        one_hot = ": save labels.argmax(1)" if labels.ndim == 2 and len(labels) == len(images) else ""
        numbers = labels.shape == (len(images),) and labels.dtype.kind in "fb"
        whole = ": save labels.astype(int)" if numbers and (labels == np.round(labels.astype(float))).all() else ""
        raise UserError(
            f"{where}: labels are {labels.dtype} {labels.shape}, expected one integer for each of {len(images)} images"
            + one_hot
            + whole
        )
    if len(labels) and (labels.min() < 0 or labels.max() >= 2**31):
        raise UserError(f"{where}: labels span {labels.min()}..{labels.max()}, expected int32 counting from 0")
    labels = labels.astype(np.int32)
    return Raw(len(images), lambda i: (images[i], labels[i]), arrays={"image": images, "label": labels})


def _conversion(images: np.ndarray) -> str:
    """How to make levels of numbers that are none, by the range of the first of them; empty where nothing fits."""
    first = np.asarray(images[:100]) if images.ndim else images
    if first.dtype.kind == "b":
        return ": save (images * 255).astype(np.uint8)"
    if first.dtype.kind not in "iuf" or not first.size or not np.isfinite(first).all():
        return ""
    low, high = first.min(), first.max()
    if first.dtype.kind == "f" and low >= 0 and high <= 1:
        return ": save (images * 255).round().astype(np.uint8)"
    if first.dtype.kind == "f" and low >= -1 and high <= 1:
        return ": save ((images + 1) * 127.5).round().astype(np.uint8)"
    if low >= 0 and high <= 255:
        return ": save images.round().astype(np.uint8)"
    if first.dtype == np.uint16:
        return ": save (images // 257).astype(np.uint8)"
    return f": bring their range {low:g}..{high:g} to 0..255 first"


def dark(raw: Raw) -> bool:
    """Whether the levels of the first images are 0 and 1 alone, which is all but black."""
    first = raw.arrays["image"][:1000] if raw.arrays else np.zeros(0)
    return first.size > 0 and first.max() == 1


def subset(raw: Raw, indices: np.ndarray) -> Raw:
    """The images `indices` of a split, in that order."""
    at = lambda function: function and (lambda i: function(int(indices[i])))
    return Raw(len(indices), at(raw.record), at(raw.name), at(raw.length), raw.arrays and gather(raw.arrays, indices))


def concatenate(raws: Sequence[Raw], where: str) -> Raw:
    """Several splits one after another."""
    if len(raws) == 1:
        return raws[0]
    keys = {frozenset(raw.arrays or ()) for raw in raws}
    if len(keys) == 1 and raws[0].arrays and len({raw.arrays["image"].shape[1:] for raw in raws}) == 1:
        whole = {key: np.concatenate([raw.arrays[key] for raw in raws]) for key in raws[0].arrays}
        return from_arrays(whole["image"], whole.get("label"), where)
    starts = np.cumsum([0, *(raw.size for raw in raws)])

    def at(field):
        functions = [getattr(raw, field) for raw in raws]
        if None in functions:
            return None

        def function(i):
            part = int(np.searchsorted(starts, i, "right")) - 1
            return functions[part](int(i - starts[part]))

        return function

    return Raw(int(starts[-1]), at("record"), at("name"), at("length"))
