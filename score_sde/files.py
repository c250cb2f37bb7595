"""Files that appear whole or not at all: written under a temporary name beside them, then renamed. And .npz of anyone.

Where several processes of a job call the same function, the first alone writes.
"""

import contextlib
import io
import math
import os
import pathlib
import zipfile
from collections.abc import Collection, Iterator
from typing import BinaryIO

import numpy as np

from score_sde import parallel
from score_sde.errors import UserError, one_line

# What readers raise on files that are not what they should be.
DAMAGED = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


@contextlib.contextmanager
def reading(path, what: str, remedy: str, *, absent: str = "") -> Iterator[None]:
    """Whatever goes wrong in reading anyone's file as one line: "PATH what (reason): remedy".

    absent: the whole line where there is no such file, if it is another.
    """
    try:
        yield
    except DAMAGED as error:
        if absent and isinstance(error, FileNotFoundError):
            raise UserError(absent) from None
        raise UserError(f"{path} {what} ({one_line(error, 100)}): {remedy}") from None


@contextlib.contextmanager
def replacing(path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` once it is written without an error; folders are made."""
    if not parallel.writes():
        yield io.BytesIO()
        return
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(folder):
    """Refuse, before any work, a folder that could not be made or written; nothing is left behind."""
    at = pathlib.Path(folder).absolute()
    while not at.exists() and at != at.parent:
        at = at.parent
    if not at.is_dir():
        raise UserError(f"cannot write to {folder}: {at} is no folder: choose another place")
    if not os.access(at, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: {at} may not be written: choose another place, or its permissions")


def write(path, content: bytes | str):
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def save_npz(path, arrays: dict, *, compressed: bool = False):
    """One .npz, whatever the path's suffix."""
    with replacing(path) as file:
        (np.savez_compressed if compressed else np.savez)(file, **arrays)


def names_npz(path) -> set[str]:
    """The names of an .npz's arrays. Raises as `load_npz`."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(one_line(error)) from None


MOST_DEFLATED = 1032  # deflate shrinks at most so many times, so a header that promises more is lying


def load_npz(path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an .npz that have one of these names, or all of them; nothing in it is executed.

    Before anything is allocated, what headers promise is compared with the file's length, so that memory is bounded by
    MOST_DEFLATED times that. Raises OSError for a file that cannot be opened, ValueError for one that is no such .npz.
    """
    with open(path, "rb") as file:
        left, arrays = MOST_DEFLATED * os.fstat(file.fileno()).st_size, {}
        try:
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    name = member.filename.removesuffix(".npy")
                    if names is None or name in names:
                        left -= member.file_size
                        arrays[name] = _array(archive, member, left)
        except Exception as error:  # zipfile, zlib and NumPy raise many types on a damaged file
            raise ValueError(one_line(error)) from None
    return arrays


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, left: int) -> np.ndarray:
    """An array of an .npz, refused if it is larger than what its archive holds for it; left: bytes that may follow."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is compressed in a way that NumPy does not use")
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
        shape, _, dtype = read_header(stream)
    size = math.prod(shape) * dtype.itemsize
    if left < 0 or min(shape, default=0) < 0 or dtype.itemsize == 0 or size > member.file_size:
        raise ValueError(f"{member.filename} promises {dtype} {shape}, which it does not hold")
    with archive.open(member) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)
