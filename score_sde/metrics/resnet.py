"""A small feature network that can be trained here, for work without the weights of the Inception network.

ResNet-20 (He et al., "Deep Residual Learning", CVPR 2016, section 4.2) with group normalization in place of batch
normalization, so that it has no state, and with 1x1 convolutions where a shortcut changes shape. Distances in its
features compare models of one data set with each other; they are not FIDs. Trained by `python -m tools.train_features`.
"""

import functools
import hashlib
import json
import os
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from score_sde import files
from score_sde.errors import UserError

WEIGHTS = pathlib.Path(__file__).parent / "weights"


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x):
        h = nn.Conv(self.channels, (3, 3), self.stride, use_bias=False)(x)
        h = nn.relu(nn.GroupNorm(8)(h))
        h = nn.Conv(self.channels, (3, 3), use_bias=False)(h)
        h = nn.GroupNorm(8)(h)
        if self.stride > 1:
            x = nn.Conv(self.channels, (1, 1), self.stride, use_bias=False)(x)
        return nn.relu(x + h)


class ResNet20(nn.Module):
    """Levels 0..255 as float32 (B, H, W, C) -> features (B, 64), the mean over pixels; logits (B, num_classes)."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        h = nn.Conv(16, (3, 3), use_bias=False)((x - 127.5) / 127.5)
        h = nn.relu(nn.GroupNorm(8)(h))
        for channels in (16, 32, 64):
            for i in range(3):
                h = Block(channels, 2 if channels > 16 and i == 0 else 1)(h)
        features = h.mean((1, 2))
        return features, nn.Dense(self.num_classes)(features)


def save(path: str | os.PathLike, params: dict, provenance: dict) -> None:
    """Parameters in half precision and a JSON `provenance` (with image_shape and num_classes), as one .npz."""
    arrays = {
        name: np.asarray(array, np.float16) for name, array in traverse_util.flatten_dict(params, sep="/").items()
    }
    files.save_npz(path, arrays | {"provenance": json.dumps(provenance)}, compressed=True)


def load(path: str | os.PathLike) -> tuple[dict, dict, str]:
    """(float32 parameters, provenance, SHA-256 of the file) of a file by `save`; UserError if it is none."""
    with files.reading(path, "holds no weights of a ResNet-20", "make them by python -m tools.train_features"):
        arrays, sha256 = files.load_npz(path), hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
        provenance = json.loads(str(arrays.pop("provenance")))
        shapes = _shapes(tuple(provenance["image_shape"]), provenance["num_classes"])
    if {name: array.shape for name, array in arrays.items()} != shapes:
        raise UserError(f"{path} holds no weights of a ResNet-20: its arrays have other names or shapes")
    if any(array.dtype.kind != "f" or not np.isfinite(array).all() for array in arrays.values()):
        raise UserError(f"{path} holds no weights of a ResNet-20: not all are finite floats")
    params = traverse_util.unflatten_dict({k: v.astype(np.float32) for k, v in arrays.items()}, sep="/")
    return params, provenance, sha256


@functools.lru_cache
def _shapes(image_shape: tuple[int, int, int], num_classes: int) -> dict[str, tuple[int, ...]]:
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    params = jax.eval_shape(ResNet20(num_classes).init, jax.random.key(0), images)["params"]
    return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(params, sep="/").items()}
