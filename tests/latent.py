"""What tests of latent-space networks share: the reference figures' weights, by the networks' own names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference

TINY = reference.FOLDERS[0] / "ckpt" / "sd_tiny"
needs_tiny = pytest.mark.skipif(not TINY.is_dir(), reason="the tiny published model is not here; set REFERENCE_DIR")


def synthetic(name: str, shape) -> np.ndarray:
    """Reference README_L 2: the weights that the figures belong to, by the published name without a file's prefix."""
    last = name.split(".")[-1]
    if last == "position_ids":
        return np.arange(shape[-1], dtype=np.int64)[None]
    value = reference.normal(name, shape)
    if name.endswith(("embedding.weight", "label_emb.weight")):
        return value
    if len(shape) >= 2:
        return value * np.float32(1 / np.sqrt(np.prod(shape[1:])))
    return np.float32(last == "weight") + np.float32(0.1) * value


def state_of(group: str, name: str) -> dict:
    """The state_dict of a case."""
    return {
        entry: synthetic(entry, shape) for entry, shape, _ in reference.description(group)["cases"][name]["state_dict"]
    }


def renamed(state: dict, mapping: list) -> dict:
    """A state_dict under the names, and with the shapes, of rows [from, to, shape, shape]."""
    return {theirs: state[ours].reshape(shape) for ours, theirs, _, shape in mapping}


def figures_of(group: str, name: str) -> dict:
    stored = reference.arrays(group)
    return {key: stored[f"{name}/{key}"] for key in reference.description(group)["cases"][name]["arrays"]}


def tree_in(dtype, params: dict) -> dict:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def nchw(array) -> np.ndarray:
    return np.moveaxis(np.asarray(array), -1, -3)


def compared(out, expected, tolerance: float, what: str) -> None:
    """Asserts the largest difference over the largest value expected to be less than the tolerance."""
    expected = np.asarray(expected)
    error = np.abs(np.asarray(out, np.float64) - expected).max() / np.abs(expected).max()
    print(f"{what} {error:.1e}")  # shown by pytest -s
    assert np.shape(out) == expected.shape
    assert error < tolerance
