"""The Inception network of the FID (Heusel et al. 2017): the graph of 2015-12-05, not the paper's Inception-v3.

It differs from torchvision's network: average pools do not count the padding, the last block pools by maximum, there
are 1008 outputs, and images come in by TensorFlow 1's bilinear resize. Layers and weights have the names of
pytorch-fid's conversion of the graph, https://github.com/mseitzer/pytorch-fid (Apache-2.0).

    params, sha256 = load("pt_inception-2015-12-05-6726825d.pth")
    features, logits, _ = Inception().apply({"params": params}, preprocess(images, *MODES["tf"]))
"""

import hashlib
import os
import pathlib
import urllib.request

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from score_sde import files
from score_sde.errors import UserError, one_line
from score_sde.foreign import read_checkpoint

SIZE = 299
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # of the file at URL
BATCH_NORM_EPS = 1e-3

# ---------------------------------------------------------------------------------------------------- preprocessing

# (grid of the resize, level that becomes 0): the original TensorFlow graph, and pytorch-fid. Figures by one must not be
# compared with figures by the other.
MODES = {"tf": ("tf1", 128.0), "pf": ("half_pixel", 127.5)}


def source_positions(grid: str, n: int, size: int) -> np.ndarray:
    """Where each of `size` output pixels lies among n input pixels, (size,).

    tf1: i n/size in float32, the corner-aligned grid of TensorFlow 1; half_pixel: max((i + 1/2) n/size - 1/2, 0).
    """
    i = np.arange(size)
    if grid == "tf1":
        return i.astype(np.float32) * np.float32(n / size)
    return np.maximum((i + 0.5) * (n / size) - 0.5, 0.0)


def resize(x, grid: str, size: int = SIZE):
    """Bilinear, without antialiasing: (B, H, W, C) -> (B, size, size, C)."""
    for axis in (1, 2):
        n = x.shape[axis]
        position = source_positions(grid, n, size)
        low = np.floor(position).astype(np.int32)
        high = np.minimum(low + 1, n - 1)
        weight = (position - low).astype(x.dtype).reshape([-1 if a == axis else 1 for a in range(4)])
        x = (1 - weight) * jnp.take(x, low, axis) + weight * jnp.take(x, high, axis)
    return x


def preprocess(images, grid: str, zero: float):
    """Levels 0..255 (B, H, W, 3) of any dtype -> network input (B, 299, 299, 3), (level - zero) / zero; see MODES."""
    x = jnp.asarray(images)
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    return (resize(x, grid) - zero) / zero


# ---------------------------------------------------------------------------------------------------------- network


def conv(name: str, x, channels: int, kernel: tuple[int, int] = (1, 1), stride: int = 1, padding: str = "SAME"):
    """Convolution and ReLU; the batch normalization between them is part of the weights (see `params_of`)."""
    return nn.relu(nn.Conv(channels, kernel, stride, padding, dtype=x.dtype, name=name)(x))


def conv_and_halve(name: str, x, channels: int):
    return conv(name, x, channels, (3, 3), 2, "VALID")


def halve(x):
    return nn.max_pool(x, (3, 3), (2, 2))


def average(x):
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


class MixedA(nn.Module):
    """35 x 35: branches 1x1, 5x5, twice 3x3, pool."""

    pool_channels: int

    @nn.compact
    def __call__(self, x):
        five = conv("branch5x5_1", x, 48)
        five = conv("branch5x5_2", five, 64, (5, 5))
        double = conv("branch3x3dbl_1", x, 64)
        double = conv("branch3x3dbl_2", double, 96, (3, 3))
        double = conv("branch3x3dbl_3", double, 96, (3, 3))
        pool = conv("branch_pool", average(x), self.pool_channels)
        return jnp.concatenate([conv("branch1x1", x, 64), five, double, pool], -1)


class MixedB(nn.Module):
    """35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x):
        double = conv("branch3x3dbl_1", x, 64)
        double = conv("branch3x3dbl_2", double, 96, (3, 3))
        double = conv_and_halve("branch3x3dbl_3", double, 96)
        return jnp.concatenate([conv_and_halve("branch3x3", x, 384), double, halve(x)], -1)


class MixedC(nn.Module):
    """17 x 17: branches 1x1, 7x7 as 1x7 and 7x1, twice that, pool."""

    channels: int

    @nn.compact
    def __call__(self, x):
        seven = conv("branch7x7_1", x, self.channels)
        seven = conv("branch7x7_2", seven, self.channels, (1, 7))
        seven = conv("branch7x7_3", seven, 192, (7, 1))
        double = conv("branch7x7dbl_1", x, self.channels)
        double = conv("branch7x7dbl_2", double, self.channels, (7, 1))
        double = conv("branch7x7dbl_3", double, self.channels, (1, 7))
        double = conv("branch7x7dbl_4", double, self.channels, (7, 1))
        double = conv("branch7x7dbl_5", double, 192, (1, 7))
        pool = conv("branch_pool", average(x), 192)
        return jnp.concatenate([conv("branch1x1", x, 192), seven, double, pool], -1)


class MixedD(nn.Module):
    """17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x):
        three = conv("branch3x3_1", x, 192)
        three = conv_and_halve("branch3x3_2", three, 320)
        seven = conv("branch7x7x3_1", x, 192)
        seven = conv("branch7x7x3_2", seven, 192, (1, 7))
        seven = conv("branch7x7x3_3", seven, 192, (7, 1))
        seven = conv_and_halve("branch7x7x3_4", seven, 192)
        return jnp.concatenate([three, seven, halve(x)], -1)


class MixedE(nn.Module):
    """8 x 8: branches 1x1, 3x3 split into 1x3 beside 3x1, the same after another 3x3, pool."""

    max_pool: bool

    @nn.compact
    def __call__(self, x):
        three = conv("branch3x3_1", x, 384)
        double = conv("branch3x3dbl_1", x, 448)
        double = conv("branch3x3dbl_2", double, 384, (3, 3))
        pool = nn.max_pool(x, (3, 3), (1, 1), "SAME") if self.max_pool else average(x)
        branches = [
            conv("branch1x1", x, 320),
            conv("branch3x3_2a", three, 384, (1, 3)),
            conv("branch3x3_2b", three, 384, (3, 1)),
            conv("branch3x3dbl_3a", double, 384, (1, 3)),
            conv("branch3x3dbl_3b", double, 384, (3, 1)),
            conv("branch_pool", pool, 192),
        ]
        return jnp.concatenate(branches, -1)


class Inception(nn.Module):
    """(B, 299, 299, 3) by `preprocess` -> features (B, 2048), logits (B, 1008), {layer: its output (B, h, w, c)}.

    The features of the FID are the last layer's mean over pixels ("pool3"). Outputs that are not used cost nothing
    under jit.
    """

    @nn.compact
    def __call__(self, x):
        layers = {
            "Conv2d_1a_3x3": lambda name, x: conv_and_halve(name, x, 32),
            "Conv2d_2a_3x3": lambda name, x: conv(name, x, 32, (3, 3), padding="VALID"),
            "Conv2d_2b_3x3": lambda name, x: conv(name, x, 64, (3, 3)),
            "MaxPool_1": lambda name, x: halve(x),
            "Conv2d_3b_1x1": lambda name, x: conv(name, x, 80),
            "Conv2d_4a_3x3": lambda name, x: conv(name, x, 192, (3, 3), padding="VALID"),
            "MaxPool_2": lambda name, x: halve(x),
            "Mixed_5b": lambda name, x: MixedA(32, name=name)(x),
            "Mixed_5c": lambda name, x: MixedA(64, name=name)(x),
            "Mixed_5d": lambda name, x: MixedA(64, name=name)(x),
            "Mixed_6a": lambda name, x: MixedB(name=name)(x),
            "Mixed_6b": lambda name, x: MixedC(128, name=name)(x),
            "Mixed_6c": lambda name, x: MixedC(160, name=name)(x),
            "Mixed_6d": lambda name, x: MixedC(160, name=name)(x),
            "Mixed_6e": lambda name, x: MixedC(192, name=name)(x),
            "Mixed_7a": lambda name, x: MixedD(name=name)(x),
            "Mixed_7b": lambda name, x: MixedE(max_pool=False, name=name)(x),
            "Mixed_7c": lambda name, x: MixedE(max_pool=True, name=name)(x),
        }
        outputs = {}
        for name, layer in layers.items():
            x = outputs[name] = layer(name, x)
        features = x.mean((1, 2))
        return features, nn.Dense(1008, dtype=x.dtype, name="fc")(features), outputs


# ---------------------------------------------------------------------------------------------------------- weights


def params_of(state: dict[str, np.ndarray]) -> dict:
    """The parameters from a state_dict of pytorch-fid, in float64; UserError if an entry is missing or left over.

    Inference batch normalization is affine, so it goes into the convolution before it: with
    g = weight / sqrt(running_var + 1e-3), the kernel is g times the stored one and the bias is bias - g running_mean.
    """
    template = jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    rest = {name: array for name, array in state.items() if not name.endswith("num_batches_tracked")}

    def take(name, shape):
        array = rest.pop(name, None)
        if array is None or array.shape != shape:
            found = "none" if array is None else array.shape
            raise UserError(f"the weights of the Inception network need {name} of shape {shape}, found {found}")
        return array.astype(np.float64)

    def convolution(path, leaf):
        height, width, channels_in, channels = leaf["kernel"].shape
        kernel = take(f"{path}.conv.weight", (channels, channels_in, height, width))
        scale, shift, mean, variance = (
            take(f"{path}.bn.{name}", (channels,)) for name in ("weight", "bias", "running_mean", "running_var")
        )
        gain = scale / np.sqrt(variance + BATCH_NORM_EPS)
        return {"kernel": kernel.transpose(2, 3, 1, 0) * gain, "bias": shift - gain * mean}

    params = {}
    for name, leaf in template.items():
        if name == "fc":
            params[name] = {"kernel": take("fc.weight", (1008, 2048)).T, "bias": take("fc.bias", (1008,))}
        elif "kernel" in leaf:
            params[name] = convolution(name, leaf)
        else:
            params[name] = {branch: convolution(f"{name}.{branch}", leaf[branch]) for branch in leaf}
    if rest:
        raise UserError(f"the Inception network has no place for {len(rest)} entries, such as {min(rest)}")
    return params


def load(path: str | os.PathLike, *, any_weights: bool = False) -> tuple[dict, str]:
    """(float32 parameters, SHA-256) of pytorch-fid's file; another file is refused unless any_weights."""
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the Inception weights {path}: {error.strerror}") from None
    if sha256 != SHA256 and not any_weights:
        raise UserError(
            f"{path} is not the standard FID network: its SHA-256 is {sha256[:8]}..., that of {URL} is {SHA256[:8]}..."
        )
    found = read_checkpoint(path)
    if found.kind != "torch":
        raise UserError(f"{path} is a {found.kind} checkpoint, expected the PyTorch file {URL}")
    return jax.tree.map(np.float32, params_of(found.model)), sha256


def download(folder: pathlib.Path) -> pathlib.Path:
    """The file at URL, kept in `folder`; fetched if it is not there."""
    path = folder / URL.rpartition("/")[2]
    if path.exists():
        return path
    try:
        print(f"downloading {URL} to {path} (96 MB)")
        with urllib.request.urlopen(URL, timeout=30) as answer, files.replacing(path) as file:
            digest = hashlib.sha256()
            while block := answer.read(2**20):
                digest.update(block)
                file.write(block)
            if digest.hexdigest() != SHA256:
                raise OSError("what came has another SHA-256")
    except OSError as error:
        raise UserError(
            f"cannot download the Inception weights ({one_line(error, 100)}): fetch {URL} elsewhere and "
            "give --inception_weights=PATH, or use a local network (resnet20-...)"
        ) from None
    return path
