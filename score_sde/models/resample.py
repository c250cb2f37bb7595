"""Doubling and halving the resolution of (B, H, W, C) images with a separable FIR filter.

StyleGAN-2 (Karras et al. 2020) and Score-SDE (Song et al. 2021, Appendix H) low-pass filter whatever they resample,
after Zhang (2019). Each kernel is a short list of taps, applied along H and along W. The box `(1, 1)` gives nearest
upsampling and 2 x 2 averaging, so networks without FIR filters use the same functions.

Filters are written as sums of shifted slices. Depthwise convolutions compute the same numbers, but XLA has no fast CPU
path for them: 3 to 200 times slower here, worst with dilated inputs and in gradients.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

BOX = (1, 1)


def upsample_2d(x: Array, kernel: Sequence[float] = BOX, margin: int = 0) -> Array:
    """(B, H, W, C) -> (B, 2H, 2W, C), wider by `margin` filtered pixels on each side.

    Zeros are put between the pixels and the result convolved with the kernel, scaled to sum 2 per axis (the mean of the
    image is kept). An output pixel meets non-zero inputs only at every other tap: even and odd outputs are computed
    separately, from the small image, and interleaved.
    """
    taps = _normalized(kernel, total=2.0)
    before = (len(taps) + 1) // 2 + margin  # zeros in front of the first pixel, on the fine grid
    low, high = (before + 1) // 2, (len(taps) - before) // 2 + margin
    padded = _pad(x, {1: (low, high), 2: (low, high)})
    height, width = x.shape[1] + margin, x.shape[2] + margin

    def phase(parity: int) -> list[tuple[float, int]]:
        """The taps that meet pixels, and where: output 2 p + parity = sum of tap * padded[p + start]."""
        shifts = [(tap, parity + i - before) for i, tap in enumerate(taps)]
        return [(tap, low + shift // 2) for tap, shift in shifts if shift % 2 == 0]

    def outputs(row: int, column: int) -> Array:
        return sum((a * b) * padded[:, i : i + height, j : j + width] for a, i in phase(row) for b, j in phase(column))

    rows = [jnp.stack([outputs(row, column) for column in (0, 1)], axis=3) for row in (0, 1)]
    return jnp.stack(rows, axis=2).reshape(x.shape[0], 2 * height, 2 * width, x.shape[3])


def downsample_2d(x: Array, kernel: Sequence[float] = BOX) -> Array:
    """(B, H, W, C) -> (B, H/2, W/2, C): convolution with the kernel, scaled to sum 1 per axis, at every other pixel."""
    taps = _normalized(kernel, total=1.0)
    return _convolve(x, taps, stride=2, padding=((len(taps) - 1) // 2, (len(taps) - 2) // 2))


def smooth_2d(x: Array, kernel: Sequence[float]) -> Array:
    """(B, H, W, C) -> (B, H + 1, W + 1, C): the filtered image that a 3 x 3 VALID convolution of stride 2 halves."""
    taps = _normalized(kernel, total=1.0)
    return _convolve(x, taps, stride=1, padding=((len(taps) + 1) // 2, len(taps) // 2))


def space_to_depth(x: Array, size: int) -> Array:
    """(B, H, W, C) -> (B, H / size, W / size, size^2 C): each square of pixels as the channels of one."""
    batch, height, width, channels = x.shape
    squares = x.reshape(batch, height // size, size, width // size, size, channels).swapaxes(2, 3)
    return squares.reshape(batch, height // size, width // size, size**2 * channels)


def depth_to_space(x: Array, size: int) -> Array:
    """The inverse of `space_to_depth`: (B, H, W, size^2 C) -> (B, size H, size W, C)."""
    batch, height, width, depth = x.shape
    squares = x.reshape(batch, height, width, size, size, depth // size**2).swapaxes(2, 3)
    return squares.reshape(batch, size * height, size * width, depth // size**2)


def _normalized(kernel: Sequence[float], total: float) -> list[float]:
    """Taps that sum to `total`, reversed: convolution is correlation with the reversed kernel."""
    return [total * tap / sum(kernel) for tap in reversed(tuple(kernel))]


def _convolve(x: Array, taps: Sequence[float], stride: int, padding: tuple[int, int]) -> Array:
    for axis in (1, 2):
        padded = _pad(x, {axis: padding})
        last = (padded.shape[axis] - len(taps)) // stride * stride
        x = sum(tap * lax.slice_in_dim(padded, i, i + last + 1, stride=stride, axis=axis) for i, tap in enumerate(taps))
    return x


def _pad(x: Array, widths: dict[int, tuple[int, int]]) -> Array:
    """Zero padding per axis."""
    return jnp.pad(x, [widths.get(axis, (0, 0)) for axis in range(x.ndim)])
