"""CIFAR-10 and CIFAR-100 as they are downloaded: binary or Python batches, unpacked or in their .tar.gz."""

import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from score_sde import foreign
from score_sde.errors import UserError, one_line
from score_sde.sources.raw import Source, from_arrays

# The files of each kind: (binary, of CIFAR-100, of training, of test, of class names).
_BATCH = r"data_batch_\d+"
_KINDS = (
    (True, False, re.compile(rf"{_BATCH}\.bin"), "test_batch.bin", "batches.meta.txt"),
    (True, True, re.compile(r"train\.bin"), "test.bin", "fine_label_names.txt"),
    (False, False, re.compile(_BATCH), "test_batch", "batches.meta"),
    (False, True, re.compile("train"), "test", "meta"),
)
_NAME = re.compile(
    rf"{_BATCH}(\.bin)?|test_batch(\.bin)?|batches\.meta(\.txt)?|(train|test)(\.bin)?|meta|fine_label_names\.txt"
)
_ARCHIVE = re.compile(r"cifar-100?-(python|binary|batches-py|batches-bin)(\.tar|\.tar\.gz|\.tgz)", re.IGNORECASE)
MOST_BYTES = 2**29  # of an archive's files; those of CIFAR are 0.2 GB
_PIXELS = 3 * 32 * 32


def is_archive(path: Path) -> bool:
    """Whether a file is called as CIFAR's archives are."""
    return path.is_file() and _ARCHIVE.fullmatch(path.name) is not None


def batches(paths: list[Path]) -> list[Path]:
    """The files among these that are CIFAR's, if any holds images for training or test."""
    named = [path for path in paths if _NAME.fullmatch(path.name) and path.is_file()]
    return named if _kind([path.name for path in named]) else []


def _kind(names: list[str]) -> tuple | None:
    """The row of _KINDS that files of these names are."""
    for row in _KINDS:
        binary, hundred, train, test, meta = row
        images = [name for name in names if train.fullmatch(name) or name == test]
        if images and (binary or not hundred or meta in names):  # `train` alone may be anything
            return row
    return None


def from_batches(paths: list[Path], where: str) -> Source:
    """CIFAR of unpacked files, all in one folder."""
    folders = sorted({path.parent.name for path in paths})
    if len(folders) > 1:
        raise UserError(f"{where} holds several data sets ({', '.join(folders)}): give the folder of one")
    return _read({path.name: path.read_bytes for path in reversed(paths)}, where)


def from_archive(path: Path) -> Source:
    """CIFAR of its .tar.gz, whose files are held in memory one after another."""
    contents, left = {}, MOST_BYTES
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                left -= max(0, member.size)
                if left < 0:
                    raise UserError(f"{path} holds more than {MOST_BYTES} bytes, which CIFAR does not")
                name = member.name.rpartition("/")[2]
                if member.isfile() and _NAME.fullmatch(name):
                    contents[name] = archive.extractfile(member).read()
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError) as error:
        raise UserError(f"{path} is not a readable archive: {one_line(error)}: download it again") from error
    return _read({name: (lambda content=content: content) for name, content in contents.items()}, str(path))


def _read(files: dict[str, Callable[[], bytes]], where: str) -> Source:
    kind = _kind(list(files))
    if kind is None:
        raise UserError(f"{where} holds no batches of CIFAR-10 or CIFAR-100")
    binary, hundred, train, test, meta = kind
    read = _binary if binary else _python
    splits = {}
    for split, names in (("train", sorted(filter(train.fullmatch, files))), ("test", [test] * (test in files))):
        parts = [read(files[name](), hundred, f"{where}/{name}") for name in names]
        if parts:
            images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            splits[split] = from_arrays(images.transpose(0, 2, 3, 1), labels, where)
    notes = (f"{where}: labels are the 100 fine ones",) if hundred else ()
    return Source(splits, _class_names(files.get(meta), binary, where), notes)


def _binary(content: bytes, hundred: bool, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32) and labels (N,): rows of one label, or a coarse and a fine one, and the pixels."""
    row = _PIXELS + 1 + hundred
    if not content or len(content) % row:
        raise UserError(f"{where} is {len(content)} bytes long, expected a multiple of {row}: download it again")
    rows = np.frombuffer(content, np.uint8).reshape(-1, row)
    return rows[:, 1 + hundred :].reshape(-1, 3, 32, 32), rows[:, int(hundred)].astype(np.int32)


def _python(content: bytes, hundred: bool, where: str) -> tuple[np.ndarray, np.ndarray]:
    """The same of a pickled dictionary of `data` and `labels` or `fine_labels`, which is read, not executed."""
    batch = foreign.read_arrays(content, where)
    try:
        images, labels = batch["data"], np.asarray(batch["fine_labels" if hundred else "labels"])
        return np.asarray(images, np.uint8).reshape(len(labels), 3, 32, 32), labels.astype(np.int32)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{where} is no batch of CIFAR: {one_line(error)}: download it again") from error


def _class_names(read: Callable[[], bytes] | None, binary: bool, where: str) -> tuple[str, ...] | None:
    if read is None:
        return None
    if binary:
        return tuple(read().decode(errors="replace").split())
    names = foreign.read_arrays(read(), where)
    found = names.get("fine_label_names") or names.get("label_names")
    return tuple(map(str, found)) if isinstance(found, list) else None
