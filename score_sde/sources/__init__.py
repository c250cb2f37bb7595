"""Images of any source as splits of square uint8 images; READERS is the table of what is read."""

import functools
import hashlib
import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from score_sde.data import Images, gather, permutation
from score_sde.errors import UserError
from score_sde.sources import archives, arrays, cifar, hubs, trees
from score_sde.sources.pictures import FORMATS, RESIZE_RULES, SUFFIXES, DamagedImage, decode, fit, patiently
from score_sde.sources.raw import Raw, Source, concatenate, from_arrays, is_hidden, split_called, subset

__all__ = [
    "ARRAY_NAMES",
    "FORMATS",
    "READERS",
    "DamagedImage",
    "Raw",
    "Source",
    "choose_split",
    "decode",
    "fit",
    "from_arrays",
    "load",
    "read_source",
]
ARRAY_NAMES = tuple(arrays.NAMES)  # what images are called in .npz files
MEMORY_BYTES = 2**30  # larger splits are decoded batch by batch
TENTHS = 10  # a set that is not divided gives its last tenth to "test", if it has so many images


def load(
    dataset: str,
    split: str,
    *,
    image_size: int,
    num_channels: int,
    resize: str = "none",
    crop: int | None = None,
    data_dir: str | None = None,
    skip_damaged: bool = False,
    source: Source | None = None,
) -> Images:
    """One split of a data set, as square images.

    dataset: "digits" (8x8 gray, in scikit-learn); the name of a tensorflow-datasets set, such as "cifar10" or
        "lsun/bedroom", kept under `data_dir`; or a path that one of READERS reads. A file or folder named like a
        tensorflow-datasets set is written "./name".
    split: "train", "test" (the validation split of sets that lack a test split), or any name of the set's own. A set
        with one split only is divided: the last tenth of a fixed permutation is "test"; one of fewer than ten images is
        both whole. "all" is the whole set, its splits one after another.
    crop: side of a central square taken first (140 for the published CelebA).
    resize: "none", images must have image_size already; "pad", black borders; "crop_resize", central square, then
        bicubic (published LSUN); "resize_crop", shorter side to image_size bilinear, then central square (published
        LSUN at 128, and CelebA after its crop). Both antialias and round to uint8, where the published code keeps
        floats or truncates.
    num_channels: 1 or 3. Gray repeats to RGB, RGB becomes gray by luma (ITU-R 601), alpha is dropped: the conventions
        of Pillow, hence of the field's folder readers. 16-bit gray and float images are refused. EXIF turns images.
    skip_damaged: put the next image of the set that can be decoded in the place of one that cannot.
    source: what `read_source` made of the data set, if it has been read.

    Splits under 1 GiB decoded are decoded now; of larger ones the first image is, as a check, and the rest by threads
    as batches ask, so a bad image deep inside is reported when it is reached. Raises UserError for any unusable input.
    """
    if resize not in RESIZE_RULES:
        raise UserError(f"unknown resize rule {resize!r}: choose one of {', '.join(RESIZE_RULES)}")
    if num_channels not in (1, 3):
        raise UserError(f"num_channels is {num_channels}, expected 1 or 3")
    if image_size < 1 or (crop is not None and crop < 1):
        raise UserError(f"image_size is {image_size} and crop is {crop}: expected positive numbers of pixels")
    source = read_source(dataset, data_dir) if source is None else source
    raw = choose_split(source.splits, split, dataset)
    if raw.size == 0:
        raise UserError(f"{dataset}: split {split} holds no images")
    name, shape, damaged = f"{dataset} ({split})", (image_size, image_size, num_channels), {}
    notes = source.notes
    if split in ("train", "test") and too_small(source.splits):
        notes += (f"{dataset}: {raw.size} image(s), of which all are for training and for test; {TENTHS} are divided",)
    told = dict(classes=source.classes, notes=notes, damaged=damaged, marks=functools.partial(marks, raw))

    if raw.arrays and raw.arrays["image"].shape[1:] == shape and not crop:
        return Images(name, raw.size, functools.partial(gather, raw.arrays), **told)

    def read(i):
        where = f"{name}, image {i}" if raw.name is None else str(Path(dataset) / raw.name(i))
        image, label = patiently(lambda: raw.record(i), where)
        if label is not None and label < 0:
            raise UserError(f"{where} has the label {label}; labels count from 0")
        return fit(image, where, image_size, num_channels, resize, crop), label

    def fitted(i):
        for k in range(raw.size if skip_damaged else 1):
            j = int(i + k) % raw.size
            if j not in damaged or not skip_damaged:
                try:
                    return read(j)
                except UserError as error:
                    damaged[j] = str(error)
                    if not (skip_damaged and isinstance(error, DamagedImage)):
                        raise
        raise DamagedImage(f"{damaged[int(i)]}, nor is any other image of {name}")

    pool = ThreadPoolExecutor(os.cpu_count())
    apply = map if raw.arrays else pool.map  # decoding leaves the interpreter's lock, array work does not

    def take(indices):
        images, labels = zip(*apply(fitted, indices), strict=True)
        batch = {"image": np.stack(images)}
        return batch if None in labels else batch | {"label": np.array(labels, np.int32)}

    take([0])
    if raw.size * math.prod(shape) < MEMORY_BYTES:
        take = functools.partial(gather, take(range(raw.size)))
        pool.shutdown()
    return Images(name, raw.size, take, **told)


def choose_split(splits: dict[str, Raw], split: str, dataset: str) -> Raw:
    """The split of that name, by the rules in `load`."""
    if split in splits and not (len(splits) == 1 and split in ("train", "test")):
        return splits[split]
    if split == "all":
        return concatenate(list(splits.values()), dataset)
    if len(splits) == 1 and split in ("train", "test"):
        (whole,) = splits.values()
        if too_small(splits):
            return whole
        cut = whole.size - whole.size // 10
        order = permutation(0, 0, whole.size)
        return subset(whole, order[:cut] if split == "train" else order[cut:])
    called = split_called(split)
    meant = [name for name in splits if called and split_called(name) == called]
    if called == "test" and not meant:
        meant = [name for name in splits if split_called(name) == "validation"]
    if not meant:
        names = [*splits, "all"] if len(splits) > 1 else ("train", "test", "all")
        raise UserError(f"{dataset} has no split {split!r}: choose one of {', '.join(names)}")
    return splits[meant[0]]


def too_small(splits: dict[str, Raw]) -> bool:
    """Whether a set is too small to be divided, and so serves whole for training and for test."""
    return len(splits) == 1 and next(iter(splits.values())).size < TENTHS


MARKED_BYTES, MARKED = 2**30, 10_000  # of larger sets, SPREAD images at equal distances are read
SPREAD = 1000


def marks(raw: Raw) -> np.ndarray:
    """A hash of each image as it is stored, uint64 (size,): its name, length, label, and content.

    The content of SPREAD images alone counts where there are more than MARKED files, or MARKED_BYTES, so that a million
    files take seconds.
    """
    called = lambda i: f"image {i}" if raw.name is None else raw.name(i)
    lengths = [raw.length and patiently(lambda i=i: raw.length(i), called(i)) for i in range(raw.size)]
    in_memory = raw.arrays and raw.arrays["image"].nbytes <= MARKED_BYTES
    whole = in_memory or (raw.size <= MARKED and sum(length or 0 for length in lengths) <= MARKED_BYTES)
    read = set(range(raw.size) if whole else np.linspace(0, raw.size - 1, SPREAD, dtype=int).tolist())
    found = np.zeros(raw.size, np.uint64)
    for i, length in enumerate(lengths):
        digest = hashlib.blake2b(f"{'' if raw.name is None else raw.name(i)} {length}".encode(errors="replace"))
        if i in read:
            try:
                image, label = patiently(lambda i=i: raw.record(i), called(i))
                digest.update(np.ascontiguousarray(image) if isinstance(image, np.ndarray) else image)
                digest.update(str(label).encode())
            except DamagedImage:
                pass
        found[i] = int.from_bytes(digest.digest()[:8], "little")
    return found


# ------------------------------------------------------------------------------------------------ the table of readers


class Reader(NamedTuple):
    """A kind of source; what tells whether a path is one, and what reads it, or raises UserError.

    Both are given the path and the files that are `nearby`.
    """

    kind: str
    recognises: Callable[[Path, list[Path]], bool]
    read: Callable[[Path, list[Path]], Source]


def nearby(path: Path, most: int = 1000, folders: int = 20) -> list[Path]:
    """The file itself, or the visible files of a folder and of its few sub-folders; none if it has many of either."""
    if not path.is_dir():
        return [path]
    entries = visible(path, most)
    below = [entry for entry in entries if entry.is_dir()]
    if len(entries) == most or len(below) > folders:
        return []
    inside = [file for folder in below for file in visible(folder, most)]
    return sorted((entry for entry in [*entries, *inside] if entry.is_file()), key=str)


def visible(folder: Path, most: int) -> list[Path]:
    """The first entries of a folder that are not hidden."""
    return list(itertools.islice((entry for entry in folder.iterdir() if not is_hidden(entry.name)), most))


def has_suffix(suffix: str) -> Callable[[Path, list[Path]], bool]:
    return lambda path, near: path.is_file() and path.suffix.lower() == suffix


def parquet_files(near: list[Path]) -> list[Path]:
    """Parquet files where there are no images beside them."""
    found = [file for file in near if file.suffix.lower() == ".parquet"]
    return [] if any(file.suffix.lower() in SUFFIXES for file in near) else found


def read_npy_folder(path: Path, near: list[Path]) -> Source:
    named = arrays.npy_files(near)
    return arrays.from_named({name: arrays.map_npy(file) for name, file in named.items()}, str(path))


def read_mnist(path: Path, near: list[Path]) -> Source:
    """Every part in a folder; a file alone, with the labels beside it."""
    return arrays.from_mnist(near, str(path)) if path.is_dir() else arrays.from_mnist_file(path)


READERS = (
    Reader(
        "CIFAR's .tar.gz",
        lambda path, near: cifar.is_archive(path),
        lambda path, near: cifar.from_archive(path),
    ),
    Reader(
        "CIFAR's batches",
        lambda path, near: bool(cifar.batches(near)),
        lambda path, near: cifar.from_batches(cifar.batches(near), str(path)),
    ),
    Reader("*-images-idx3-ubyte[.gz]", lambda path, near: any(map(arrays.is_mnist, near)), read_mnist),
    Reader(".npz", has_suffix(".npz"), lambda path, near: arrays.from_npz(path)),
    Reader(".npy", has_suffix(".npy"), lambda path, near: arrays.from_npy(path)),
    Reader("a folder of .npy", lambda path, near: path.is_dir() and bool(arrays.npy_files(near)), read_npy_folder),
    Reader(
        "Hugging Face's .parquet",
        lambda path, near: bool(parquet_files(near)),
        lambda path, near: hubs.from_parquet(parquet_files(near), str(path)),
    ),
    Reader("a .zip of images", has_suffix(".zip"), lambda path, near: archives.from_zip(path)),
    Reader(
        "a .tar[.gz] of images", lambda path, near: archives.is_tar(path), lambda path, near: archives.from_tar(path)
    ),
    Reader("a folder of images", lambda path, near: path.is_dir(), lambda path, near: trees.from_folder(path)),
)
PATH_SUFFIXES = (".npz", ".npy", ".zip", ".parquet", ".gz", ".bz2", ".xz", ".bin", *archives.TARS, *SUFFIXES)
RUN = "config.json"  # in a folder of that name is a run, no data set


def read_source(dataset: str, data_dir: str | None = None) -> Source:
    """The splits of whichever source `dataset` names (see `load`)."""
    path = Path(dataset).expanduser()
    here = os.path.lexists(dataset) and not (path / RUN).is_file()
    if dataset == "digits":
        if here:
            raise UserError("digits is both a file or folder here and scikit-learn's set: write ./digits, or rename it")
        return hubs.from_digits()
    named = not dataset.startswith(("/", ".", "~")) and path.suffix.lower() not in PATH_SUFFIXES
    if named and "-ubyte" not in path.name:
        source = hubs.from_tfds(dataset, data_dir, missing_ok=here)
        if source is not None:
            return source
    if not path.exists():
        raise UserError(f"{dataset}: no such file or folder")
    return read_path(path)


def read_path(path: Path) -> Source:
    """What the first reader that knows the path makes of it, or of what alone is in a folder."""
    inner, folder = path, READERS[-1]
    for _ in range(4):
        near = nearby(inner)
        for reader in READERS[:-1]:
            if reader.recognises(inner, near):
                return reader.read(inner, near)
        below = visible(inner, 2) if inner.is_dir() else []
        if len(below) != 1:
            break
        (inner,) = below
    if folder.recognises(path, []):
        return folder.read(path, [])
    kinds = ", ".join(reader.kind for reader in READERS[:-1] if reader.kind != ".npz")
    raise UserError(
        f"{path}: expected a folder, an .npz, or one of {kinds}: unpack other archives, and put single images into a "
        "folder"
    )
