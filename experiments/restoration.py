"""Images completed and coloured: what is known of samples, read, made a condition, and shown beside them."""

import hashlib
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from experiments import build, figures, runs
from score_sde import sources
from score_sde.errors import UserError
from score_sde.sde import SDE
from score_sde.space import Space
from solvers import conditioning

PER_IMAGE = 4  # samples of each test image


class Known(NamedTuple):
    """What is known of the samples of --task=inpaint and --task=colorize."""

    space: Space  # the model's, of the shape of images
    sde: SDE
    images: Callable  # indices of samples (b,) -> uint8 (b, H, W, C)
    mask: np.ndarray | None  # (1, H, W, 1), true where known; None: the gray of every pixel is
    by_image: bool  # whether each image has PER_IMAGE samples, else one has all
    latent_mask: np.ndarray | None = None  # (1, h, w, 1), true for latents of known pixels alone; None: x are pixels

    def identity(self) -> list[str]:
        """Hashes of the mask and the first image."""
        arrays = [self.images(np.arange(1))] + ([] if self.mask is None else [self.mask])
        return [hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for array in arrays]

    def in_data_range(self, index):
        """The images of samples numbered `index` as the model sees them; only what is known of them will count.

        An encoder sees beyond a latent's own pixels: it is shown gray in the hole, and each image once.
        """
        if self.latent_mask is None:
            keys = jax.numpy.broadcast_to(jax.random.key(0), index.shape)
            return np.asarray(jax.vmap(self.space.encode)(keys, self.images(index)))
        first, which = np.unique(index // PER_IMAGE * PER_IMAGE if self.by_image else 0 * index, return_inverse=True)
        encoded = [self.space.encode(jax.random.key(0), image) for image in self.shown(self.images(first))]
        return np.stack(encoded)[which]

    def condition(self, images):
        """The condition of the predictor-corrector sampler (solvers/conditioning.py)."""
        if self.mask is None:
            return conditioning.colorization(self.sde, images)
        return conditioning.inpainting(self.sde, images, self.known_x)

    @property
    def known_x(self) -> np.ndarray | None:
        """The mask of x, pixels or latents."""
        return self.mask if self.latent_mask is None else self.latent_mask

    def put_back(self, samples):
        """uint8 samples whose known pixels have exactly their known levels."""
        return samples if self.mask is None else np.where(self.mask, self.images(np.arange(len(samples))), samples)

    def shown(self, images):
        """uint8 images as far as they are known: gray where nothing is, or their gray."""
        if self.mask is None:
            return np.broadcast_to(images.mean(-1, keepdims=True), images.shape).astype(np.uint8)
        return np.where(self.mask, images, np.uint8(128))

    def save_grid(self, path, samples):
        """Images, what was known of them, and the samples, side by side; test images a row each."""
        per_image = PER_IMAGE if self.by_image else 256
        samples = samples[:256]
        starts = range(0, len(samples), per_image)
        rows = [
            part
            for start in starts
            for image in [self.images(np.array([start]))]
            for part in (image, self.shown(image), samples[start : start + per_image])
        ]
        figures.save_grid(path, np.concatenate(rows), 2 + PER_IMAGE if self.by_image else None)


def known_of(model: runs.Model, task: str, image: str | None = None, mask: str | None = None) -> Known:
    """What is known where task is "inpaint" or "colorize".

    image: a file; test images, PER_IMAGE samples each, if None. mask: a file as for `read_mask`; if None, the upper
    half is known.
    """
    if model.config.autoencoder and task != "inpaint":
        raise UserError(f"--task={task} works on pixels, {model.name} on latents: use a model of pixels")
    height, width, channels = image_shape(model)
    space, known, latent_mask = model.diffusion.space._replace(shape=(height, width, channels)), None, None
    if task == "inpaint":
        known = np.broadcast_to(np.arange(height)[:, None] < height // 2, (height, width))
        if mask is not None:
            known = read_mask(mask, space)
        if model.config.autoencoder:
            latent_mask = mask_of_latents(known, height // model.diffusion.space.shape[0])
        known = known[None, :, :, None]
    elif channels == 1:
        raise UserError(f"--task=colorize: the images of {model.config.data.dataset} are gray: use another model")
    if image is None:
        test = build.images_of(model.config, "test")
        images = lambda index: test.take(index // PER_IMAGE % test.size)["image"]
    else:
        one = read_image(image, space, exact=task == "inpaint")
        images = lambda index: np.broadcast_to(one, (len(index), *one.shape))
    return Known(space, model.diffusion.sde, images, known, image is None, latent_mask)


def image_shape(model: runs.Model) -> tuple[int, int, int]:
    """Height, width and channels of the images that a model draws."""
    height, width, channels = model.diffusion.space.shape
    if not model.config.autoencoder:
        return height, width, channels
    first = build.autoencoder_of(model.config)
    return first.factor * height, first.factor * width, first.channels


def mask_of_latents(known: np.ndarray, factor: int) -> np.ndarray:
    """A mask (H, W) at the latents' resolution, (1, h, w, 1): true where all pixels of a latent are known."""
    height, width = known.shape
    blocks = known.reshape(height // factor, factor, width // factor, factor)
    mask = blocks.all((1, 3))[None, :, :, None]
    if not mask.any():
        raise UserError(
            f"the mask knows no latent, which takes {factor}x{factor} known pixels: know more, or use a model of pixels"
        )
    return mask


def read_image(path: str, space: Space, *, exact: bool = False) -> np.ndarray:
    """A file as uint8 (H, W, C), refused unless its size is the model's.

    exact: refuse an image of other colours than the model's instead of converting it.
    """
    image, channels = open_image(path, space), space.shape[2]
    pixels = np.asarray(image.convert("RGBA"))
    clear = int((pixels[..., 3] < 255).sum())
    if clear:
        print(f"{path}: {clear} transparent pixels have the colours stored below; --mask={path} makes them the hole")
    gray = image.mode in ("1", "L", "LA") or (image.mode == "P" and (pixels[..., :3] == pixels[..., :1]).all())
    theirs = 1 if gray else 3
    if exact and theirs != channels:
        raise UserError(f"{path} has {theirs} colour channel(s), the model's images have {channels}: convert it")
    return np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(space.shape)


def read_mask(path: str, space: Space) -> np.ndarray:
    """True where a mask says that an image is known: bool (H, W). Says how much that is.

    Transparent pixels are the hole. If the others have two levels, as in files of 0 and 1, the lighter is known. If
    they have one or many, all of them are known where some pixels are transparent, as in an image with a hole, and
    their upper half where none is. Refuses a mask that knows nothing or everything.
    """
    pixels = np.asarray(open_image(path, space).convert("RGBA"))
    level, opaque = np.asarray(Image.fromarray(pixels[..., :3]).convert("L")), pixels[..., 3] > 127
    levels = np.unique(level[opaque])
    known = level > (127 if len(levels) != 2 else levels.mean())
    if not opaque.all():
        if len(levels) and levels.max() <= 1:
            raise UserError(f"{path} is black or transparent everywhere: make the known part white, the hole black")
        known = opaque & (known if len(levels) == 2 else True)
    share = known.mean()
    if share in (0, 1):
        what = "knows nothing of the image" if share == 0 else "leaves nothing to paint"
        raise UserError(f"{path} {what}: make the known part white, and the hole black or transparent")
    how = f", levels {levels[0]} and {levels[1]}" if len(levels) == 2 and levels.max() < 128 else ""
    print(f"mask: {share:.0%} of the pixels known{how}")
    return known


def open_image(path: str, space: Space) -> Image.Image:
    """An image file of the model's size."""
    height, width, _ = space.shape
    if pathlib.Path(path).is_dir():
        raise UserError(f"{path} is a folder: give one image file of it")
    if not pathlib.Path(path).is_file():
        raise UserError(f"no such image {path}")
    image = sources.decode(pathlib.Path(path), path)
    if (image.height, image.width) != (height, width):
        raise UserError(f"{path} is {image.width}x{image.height}, the model's images are {width}x{height}: resize it")
    return image
