"""Models that enlarge small images (ADM-U): which images, which classes, and samples that belong to them.

A condition of such a model is the tree {"y": classes (B,) or None, "low_res": (B, h, w, C) in [-1, 1]}.
"""

import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runs import Model
from score_sde import sources
from score_sde.denoiser import Diffusion, by_turns
from score_sde.errors import UserError
from score_sde.metrics import features

FACTOR = 4  # by which the published ones enlarge


class BaseSamples(NamedTuple):
    """Small images to be enlarged, uint8 (N, h, w, C), and what is known of their classes (N,)."""

    images: np.ndarray
    labels: np.ndarray | None

    @property
    def identity(self) -> str:
        return features.hash_of(self.images, *([] if self.labels is None else [self.labels]))


def read(model: Model, path: str | None, label: int | None = None, count: int | None = None) -> BaseSamples | None:
    """The first `count` images, or all, of samples.npz of a base model, or of any data set; None for other models.

    Classes are `label`, or those of the data set, or those that sample.py drew: the `label` of run.json beside it, else
    all by turns. UserError where the model enlarges and has no images, or takes none and has.
    """
    if not model.config.model.get("low_res"):
        if path is not None:
            raise UserError(f"--base_samples={path}: {model.name} enlarges no images: leave it out")
        return None
    if path is None:
        raise UserError(
            f"{model.name} enlarges small images: give them, --base_samples=runs/base/samples/NAME/samples.npz or a "
            "folder of images"
        )
    source = sources.read_source(path)
    raw = sources.choose_split(source.splits, "all", path)
    if raw.size == 0:
        raise UserError(f"{path} holds no images")
    first, (height, _, channels) = raw.record(0)[0], model.diffusion.space.shape
    small = first.shape[0] if isinstance(first, np.ndarray) else sources.decode(first, path).height
    if small * FACTOR != height:
        raise UserError(
            f"{path} holds images of height {small}: {model.name} makes {height}x{height} of "
            f"{height // FACTOR}x{height // FACTOR}"
        )
    images = sources.load(path, "all", image_size=small, num_channels=channels, source=source)
    batch = images.take(np.arange(min(images.size, count or images.size)))
    classes = model.diffusion.num_classes
    return BaseSamples(batch["image"], classes_of(batch, path, classes, label) if classes else None)


def classes_of(batch: dict, path: str, classes: int, label: int | None) -> np.ndarray:
    """The class of each of these images, as `read` says."""
    n, record = len(batch["image"]), pathlib.Path(path).with_name("run.json")
    if label is None and "label" in batch:
        labels = batch["label"]
    elif label is None and record.is_file():
        told = json.loads(record.read_text()).get("label")
        labels = by_turns(classes)(np.arange(n)) if told is None else np.full(n, told)
        print(f"{path} was drawn of {'all classes by turns' if told is None else f'class {told}'}")
    elif label is None:
        raise UserError(f"{path} names no classes, of which the model is told: give one for all, as in --label=3")
    else:
        labels = np.full(n, label)
    if not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(f"{path}: labels are {labels.min()} to {labels.max()}, the model's are 0 to {classes - 1}")
    return np.asarray(labels, np.int32)


def with_base_samples(model: Model, base: BaseSamples | None) -> Model:
    """The model whose sample i enlarges image i modulo their number; its params are the pair (its own, the images)."""
    if base is None:
        return model
    n, inner = len(base.images), model.diffusion.noise_of

    def noise_of(params, condition, keys=None):
        own, images = params
        low_res = in_network_range(jnp.asarray(images)[condition["image"]])
        return inner(own, {"y": condition["y"], "low_res": low_res}, keys)

    labels = lambda index: None if base.labels is None else jnp.asarray(base.labels)[index % n]
    conditions = lambda index: {"y": labels(index), "image": index % n}
    diffusion = model.diffusion._replace(noise_of=noise_of, conditions=conditions)
    return model._replace(diffusion=diffusion, params=(model.params, base.images))


def of_data(images: np.ndarray, y) -> dict:
    """The condition of uint8 images (B, H, W, C) themselves: their means over squares of FACTOR x FACTOR, and classes.

    As published upsamplers are trained.
    """
    batch, height, width, channels = images.shape
    squares = in_network_range(images).reshape(batch, height // FACTOR, FACTOR, width // FACTOR, FACTOR, channels)
    return {"y": y, "low_res": np.asarray(squares.mean((2, 4)), np.float32)}


def with_conditions(diffusion: Diffusion, condition) -> Diffusion:
    """The model whose sample i has the condition of example i modulo their number, for samples that judge it."""
    turn = lambda index: jax.tree.map(lambda values: jnp.asarray(values)[index % len(values)], condition)
    return diffusion._replace(conditions=turn)


def in_network_range(images):
    """uint8 levels as networks see them, in [-1, 1]."""
    return images / np.float32(127.5) - 1
