"""The inverse problems of sample.py with few-step solvers: what is measured of images, made to bend a model, and shown.

    python sample.py --task=super_resolve --factor=4 [--image=FILE.png] --solver=dpmv3 --steps=20 [--method=pigdm]

The mathematics is in score_sde/inverse.py.
"""

import hashlib
import importlib
import os
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from experiments import figures, restoration, runs
from score_sde import inverse, sources
from score_sde.denoiser import NoiseFn
from score_sde.errors import UserError, one_line
from score_sde.inverse import METHODS, Measurement

TASKS = ("inpaint", "colorize", "super_resolve", "deblur", "custom")
FACTOR, BLUR = 4, 1.5  # by default: of super_resolve, and the standard deviation of deblur in pixels


class Measured(NamedTuple):
    """What was measured of the image of each sample, and how the model is bent towards it."""

    model: runs.Model
    measurement: Measurement
    method: str  # a key of METHODS
    std: float  # of the noise in what was measured, in the data range
    known: restoration.Known | None  # the images, of test images PER_IMAGE samples each; None: y was given
    y: np.ndarray | None = None  # (1, ...) of all samples, where it was given

    def identity(self) -> list[str]:
        """What tells one such problem from another: the method, and a hash of what was measured of the first image."""
        y = np.ascontiguousarray(self.values(np.arange(1)))
        return [self.method, str(self.std), hashlib.sha256(y.tobytes()).hexdigest()]

    def values(self, index) -> np.ndarray:
        """y (b, ...) of samples numbered `index`; samples of one image share its noise."""
        if self.y is not None:
            return np.broadcast_to(self.y, (len(index), *self.y.shape[1:]))
        y = np.asarray(self.measurement.apply(self.known.in_data_range(index)))
        if not self.std:
            return y
        images = index // restoration.PER_IMAGE if self.known.by_image else 0 * index
        draw = lambda image: jax.random.normal(jax.random.fold_in(jax.random.key(0), image), y.shape[1:])
        return y + np.float32(self.std) * np.asarray(jax.vmap(draw)(images))

    def bend(self, noise: NoiseFn, y) -> NoiseFn:
        """The NoiseFn of the images of which y (B, ...) was measured."""
        space = self.model.diffusion.space
        # a standard deviation of 0.5 where data are in [-1, 1]; latents have one of 1
        spread = (space.high - space.low) / 4 if np.isfinite(space.high) else 1.0
        given = dict(std=self.std, data_std=spread)
        return METHODS[self.method](noise, self.model.diffusion.sde, self.measurement, y, **given)

    def put_back(self, samples):
        """uint8 samples, whose known pixels have exactly their known levels if they were known without noise."""
        return samples if self.known is None or self.std else self.known.put_back(samples)

    def save_grid(self, path, samples):
        """Images, what was measured of them by its pseudoinverse, and the samples, side by side."""
        by_image, decode = self.known is not None and self.known.by_image, self.model.diffusion.space.decode
        samples, per_image, rows = samples[:256], restoration.PER_IMAGE if by_image else 256, []
        for start in range(0, len(samples), per_image):
            first = np.array([start])
            rows += [] if self.known is None else [self.known.images(first)]
            if self.measurement.pull is not None:
                rows.append(np.asarray(decode(self.measurement.pull(self.values(first), np.zeros(1, np.float32)))))
            rows.append(samples[start : start + per_image])
        beside = (self.known is not None) + (self.measurement.pull is not None)
        figures.save_grid(path, np.concatenate(rows), beside + restoration.PER_IMAGE if by_image else None)


def measured_of(
    model: runs.Model,
    task: str,
    *,
    method: str = "pigdm",
    std: float = 0.0,
    image: str | None = None,
    mask: str | None = None,
    operator: str | None = None,
    factor: int | None = None,
    blur: float | None = None,
) -> Measured:
    """What is measured in a task of TASKS.

    image: a file. For super_resolve one of the low resolution is what was measured; for deblur it is the blurred one;
        for custom an .npy is y of one image; otherwise it is measured here, as test images are where it is None.
    mask: of inpaint, as for `restoration.known_of`; operator: of custom, see `load_operator`.
    UserError for what does not fit the model or the task.
    """
    space = model.diffusion.space
    shape, y = space.shape, None
    if model.config.autoencoder and (task != "inpaint" or std):
        what = f"--measurement_noise={std:g}" if task == "inpaint" else f"--task={task}"
        raise UserError(f"{what} is for pixels, {model.name} draws latents: use a model of pixels")
    if not 0 <= std < space.high - space.low:
        raise UserError(
            f"--measurement_noise={std:g}: expected 0 or more, below the data range, {space.high - space.low:g}"
        )
    if task == "inpaint":
        known = restoration.known_of(model, task, image, mask)
        measurement = inverse.inpainting(known.known_x)
    elif task == "colorize":
        known, measurement = restoration.known_of(model, task, image), inverse.gray(shape)
    else:
        measurement = {
            "super_resolve": lambda: inverse.block_means(shape, FACTOR if factor is None else factor),
            "deblur": lambda: inverse.blur(shape, BLUR if blur is None else blur),
            "custom": lambda: inverse.operator(load_operator(operator), shape),
        }[task]()
        y = None if image is None else _given(model, task, measurement, image)
        known = None if y is not None else restoration.known_of(model, "inpaint", image)._replace(mask=None)
    inverse.check_method(method, measurement)
    return Measured(model, measurement, method, std, known, y)


def _given(model: runs.Model, task: str, measurement: Measurement, image: str) -> np.ndarray | None:
    """y (1, ...) where the file is what was measured, None where it is an image to be measured."""
    space = model.diffusion.space
    expected = jax.eval_shape(measurement.apply, jax.ShapeDtypeStruct((1, *space.shape), np.float32)).shape
    if task == "custom":
        if not image.lower().endswith(".npy"):
            return None
        try:
            y = np.load(image, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{image} is not a readable .npy: {one_line(error)}") from None
        with np.errstate(over="ignore"):
            as_float32 = y.astype(np.float32) if y.dtype.kind == "f" else np.full(1, np.nan)
        if y.shape != expected[1:] or not np.isfinite(as_float32).all():
            raise UserError(
                f"{image} is {y.dtype} {y.shape}: expected what the operator makes, finite float32 {expected[1:]}"
            )
        return as_float32[None]
    if task == "super_resolve" and pathlib.Path(image).is_file():
        whole = sources.decode(pathlib.Path(image), image)
        if (whole.height, whole.width) == space.shape[:2]:
            return None
        if (whole.height, whole.width) != expected[1:3]:
            (height, width), (low, narrow) = space.shape[:2], expected[1:3]
            raise UserError(
                f"{image} is {whole.width}x{whole.height}: expected the model's {width}x{height}, or {narrow}x{low}, "
                "which --factor makes of it"
            )
    levels = restoration.read_image(image, space._replace(shape=expected[1:]), exact=True)
    return np.asarray(space.encode(jax.random.key(0), levels))[None]


def load_operator(text: str | None) -> Callable:
    """The function that --operator=module:function names, x (B, H, W, C) -> y (B, ...), written with jax.numpy.

    This runs a file of the user's, which importing it is: it is looked for where Python looks and in this folder.
    """
    module, sign, name = (text or "").partition(":")
    if not (module and sign and name) or module.endswith(".py"):
        raise UserError(
            f"--operator={text}: expected module:function, as in --operator=mine:edges for def edges(x) in mine.py"
        )
    sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # it is anyone's code
        raise UserError(f"--operator={text}: {type(error).__name__}: {one_line(error)}") from None
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise UserError(f"--operator={text} is a {type(found).__name__}: expected a function of images")
    return found
