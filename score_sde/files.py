"""Files that appear whole or not at all: written under a temporary name beside them, then renamed."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np


@contextlib.contextmanager
def replacing(path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` once it is written without an error; folders are made."""
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


def write(path, content: bytes | str):
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def save_npz(path, arrays: dict, *, compressed: bool = False):
    """One .npz, whatever the path's suffix."""
    with replacing(path) as file:
        (np.savez_compressed if compressed else np.savez)(file, **arrays)
