"""Figures produced by the published implementations, and the recipe that makes the inputs and weights they belong to.

Some groups are in tests/reference/; `REFERENCE_DIR` names the folder of all (default: `shared/reference` beside the
checkout). A test that asks for figures that are in neither is skipped, and says so.
"""

import functools
import json
import os
import pathlib
import zlib

import numpy as np
import pytest

HERE = pathlib.Path(__file__).resolve()
FOLDERS = (
    pathlib.Path(os.environ.get("REFERENCE_DIR", HERE.parents[2] / "shared" / "reference")),
    HERE.parent / "reference",
)


def find(name: str) -> pathlib.Path | None:
    """The file of that name, None where it is in neither folder."""
    return next((folder / name for folder in FOLDERS if (folder / name).is_file()), None)


def file(name: str) -> pathlib.Path:
    """The file of that name; skips the test that asks where it is absent."""
    path = find(name)
    if path is None:
        pytest.skip(
            f"the published implementations' {name} is not here; set REFERENCE_DIR to the folder of their figures"
        )
    return path


@functools.cache
def description(name: str) -> dict:
    """The JSON that describes the arrays of group file `name`."""
    return json.loads(file(f"{name}.json").read_text())


def cases(name: str) -> dict:
    """The cases of a group file, empty where the figures are absent (so that parametrized tests collect nothing)."""
    return description(name)["cases"] if find(f"{name}.json") else {}


def rows(name: str) -> list[dict]:
    """The rows of a table file, empty where the figures are absent."""
    return description(name)["rows"] if find(f"{name}.json") else []


@functools.cache
def arrays(name: str) -> np.lib.npyio.NpzFile:
    """The arrays of group file `name`, under keys `case/array`."""
    return np.load(file(f"{name}.npz"))


def rng(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def normal(name: str, shape) -> np.ndarray:
    return rng(name).standard_normal(shape, dtype=np.float32)


def uniform(name: str, shape) -> np.ndarray:
    return rng(name).random(shape, dtype=np.float32)


def nhwc(array) -> np.ndarray:
    """The last three axes of an array from PyTorch, channels last."""
    return np.moveaxis(np.asarray(array), -3, -1)
