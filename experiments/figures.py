"""Pictures of a run: image grids and curves. Every function writes one .png and returns nothing."""

import math

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from score_sde import files

SMALL = 64  # pixels: smaller images are magnified


def image_grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Tile uint8 images (N, H, W, C) into one picture with gray lines of `gap` pixels between them."""
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = np.full((rows * columns, height + gap, width + gap, channels), 128, np.uint8)
    canvas[:, gap:, gap:] = 0
    canvas[:n, gap:, gap:] = images
    canvas = canvas.reshape(rows, columns, *canvas.shape[1:]).swapaxes(1, 2)
    return np.pad(
        canvas.reshape(rows * canvas.shape[1], -1, channels), ((0, gap), (0, gap), (0, 0)), constant_values=128
    )


def save_grid(path, images: np.ndarray, columns: int | None = None):
    """Write a grid of uint8 images (N, H, W, C), small ones magnified by a whole factor."""
    factor = max(1, SMALL // images.shape[1])
    grid = image_grid(images.repeat(factor, 1).repeat(factor, 2), columns)
    with files.replacing(path) as file:
        Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid).save(file, "png")


def save_ems(path, lam: np.ndarray, statistics: dict[str, np.ndarray], title: str):
    """Mean and spread over pixels of each statistic (N, H, W, C) against lam."""
    figure, axes = plt.subplots(1, len(statistics), figsize=(4 * len(statistics), 3), layout="constrained")
    for axis, (name, values) in zip(axes, statistics.items(), strict=True):
        pixels = values.reshape(len(values), -1)
        low, median, high = np.quantile(pixels, [0.1, 0.5, 0.9], axis=1)
        axis.fill_between(lam, low, high, alpha=0.25, label="10 to 90 % of pixels")
        axis.plot(lam, median, label="median")
        axis.set(xlabel="half-log-SNR lam (noise to data)", title=name)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


def save_convergence(path, steps, distances: dict[str, list[float | None]], title: str):
    """RMS distance to the fine solution against evaluations, one line a solver; None where it has none."""
    figure, axis = plt.subplots(figsize=(7.6, 3.6), layout="constrained")
    axis.set_prop_cycle(plt.cycler(linestyle=["-", ":"]) * plt.cycler(color=plt.cm.tab10.colors))
    for name, values in distances.items():
        axis.loglog(steps, values, marker="o", markersize=4, label=name)
    axis.set_xticks(steps, [str(n) for n in steps])
    axis.minorticks_off()
    axis.set(xlabel="network evaluations", ylabel="RMS distance to the fine solution")
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize=8)
    _save(figure, path)


def save_loss(path, loss, held_out, title: str):
    """Training loss and, if not None, that of averaged parameters on test images; each (steps, values)."""
    figure, axis = plt.subplots(figsize=(6.8, 3.2), layout="constrained")
    steps, values = loss
    window = max(1, len(values) // 50)
    smooth = np.convolve(values, np.full(window, 1 / window), "valid")
    axis.plot(steps, values, color="tab:blue", alpha=0.25, label="training, one batch")
    axis.plot(steps[window - 1 :], smooth, color="tab:blue", label=f"training, mean of {window}")
    if held_out is not None:
        axis.plot(*held_out, "o-", markersize=3, color="tab:orange", label="test, averaged parameters")
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    _save(figure, path)


def _save(figure, path):
    with files.replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")
    plt.close(figure)
