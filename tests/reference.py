"""Figures produced by the published implementations, and the recipe that makes the inputs and weights they belong to.

The figures are not part of this repository. `REFERENCE_DIR` names their folder (default: `shared/reference` beside the
checkout); tests that need them skip where it is absent.
"""

import functools
import json
import os
import pathlib
import zlib

import numpy as np
import pytest

FOLDER = pathlib.Path(
    os.environ.get("REFERENCE_DIR", pathlib.Path(__file__).resolve().parents[2] / "shared" / "reference")
)
needs_reference = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the published implementations' figures are not here; set REFERENCE_DIR to their folder"
)


@functools.cache
def description(name: str) -> dict:
    """The JSON that describes the arrays of group file `name`."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def cases(name: str) -> dict:
    """The cases of a group file, empty where the figures are absent (so that parametrized tests collect nothing)."""
    return description(name)["cases"] if FOLDER.is_dir() else {}


def rows(name: str) -> list[dict]:
    """The rows of a table file, empty where the figures are absent."""
    return description(name)["rows"] if FOLDER.is_dir() else []


@functools.cache
def arrays(name: str) -> np.lib.npyio.NpzFile:
    """The arrays of group file `name`, under keys `case/array`."""
    return np.load(FOLDER / f"{name}.npz")


def rng(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def normal(name: str, shape) -> np.ndarray:
    return rng(name).standard_normal(shape, dtype=np.float32)


def uniform(name: str, shape) -> np.ndarray:
    return rng(name).random(shape, dtype=np.float32)


def nhwc(array) -> np.ndarray:
    """The last three axes of an array from PyTorch, channels last."""
    return np.moveaxis(np.asarray(array), -3, -1)
