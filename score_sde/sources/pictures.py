"""One image: read from a disk that may stumble, decoded, turned upright, and made a square."""

import contextlib
import io
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from score_sde.errors import UserError, one_line

T = TypeVar("T")

# `decode` refuses bombs by name, and EXIF that is damaged is left alone
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module="PIL")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # of the decoders behind Pillow's many others, one starts a program
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name for 8-bit images of that many channels
RESIZE_RULES = ("none", "pad", "crop_resize", "resize_crop")
MAX_PIXELS = 2**26  # of one encoded image: a few bytes of a hostile file can ask for gigabytes
WAITS = (0.1, 0.5, 2.0)  # seconds before a read that failed is tried again
LASTING = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)  # errors that waiting does not mend


class DamagedImage(UserError):
    """An image whose bytes were read and are none."""


def patiently(read: Callable[[], T], where: str) -> T:
    """What read() returns. Tries again after an error of a disk or a network; UserError if it lasts."""
    for wait in (*WAITS, None):
        try:
            return read()
        except OSError as error:
            if wait is None or isinstance(error, LASTING):
                raise UserError(f"{where} cannot be read: {one_line(error)}") from error
            time.sleep(wait)
    raise AssertionError("the last wait is None")


def decode(encoded: bytes | Path, where: str) -> Image.Image:
    """An encoded image of at most MAX_PIXELS and 8 bits a channel, turned as its EXIF says.

    The upper 8 bits are taken of colour with 16. Raises DamagedImage for bytes that are no image.
    """
    # whole, since a file allocates what a damaged header asks it to read, and bytes do not
    content = encoded if isinstance(encoded, bytes) else patiently(encoded.read_bytes, where)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{where} is {image.width}x{image.height}: more than {MAX_PIXELS} pixels")
            if image.mode.startswith(("I", "F")):
                raise UserError(
                    f"{where} has more than 8 bits a channel: convert it first, as by "
                    "Image.fromarray((np.asarray(image) // 257).astype(np.uint8)) for levels 0..65535"
                )
            if image.format == "TIFF" and image.tile[0][0] != "raw":  # the others are libtiff's, not Pillow's own
                raise UserError(f"{where} is a compressed TIFF, which is not read: convert it, as to .png")
            image.load()
            return upright(image)
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen types, some of them plain Exception's children
        reason = re.sub(r" <\S+ object at \w+>", "", one_line(error))  # Pillow's name of bytes in memory
        raise DamagedImage(f"{where} is not a readable image: {reason}") from error


def upright(image: Image.Image) -> Image.Image:
    """The image as it is shown. EXIF that cannot be read turns nothing."""
    with contextlib.suppress(Exception):  # of whatever type damaged EXIF makes Pillow raise
        ImageOps.exif_transpose(image, in_place=True)
    return image


def fit(image, where: str, image_size: int, num_channels: int, resize: str, crop: int | None) -> np.ndarray:
    """Decode, convert, crop and resize one image by the rules in `load`: uint8 (image_size,) * 2 + (num_channels,)."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
    else:
        image = decode(image, where)
    image = image.convert(MODES[num_channels])

    if crop:
        if min(image.size) < crop:
            raise UserError(f"{where} is {image.width}x{image.height}: too small for crop {crop}")
        image = central(image, crop)
    if resize == "crop_resize":
        image = central(image, min(image.size)).resize((image_size, image_size), Image.Resampling.BICUBIC)
    elif resize == "resize_crop":
        ratio = image_size / min(image.size)
        sides = [round(side * ratio) for side in image.size]
        image = central(image.resize(sides, Image.Resampling.BILINEAR), image_size)
    elif resize == "pad" and max(image.size) <= image_size:
        image = central(image, image_size)
    if image.size != (image_size, image_size):
        rules = "crop_resize, resize_crop or pad" if max(image.size) < image_size else "crop_resize or resize_crop"
        size = f"{image.width}x{image.height}{' after the crop' if crop else ''}"
        raise UserError(f"{where} is {size}, but image_size is {image_size}: set resize to {rules}")
    return np.asarray(image).reshape(image_size, image_size, num_channels)


def central(image: Image.Image, side: int) -> Image.Image:
    """The central square; outside of the image it is black."""
    left, top = (int((length - side) / 2) for length in image.size)
    return image.crop((left, top, left + side, top + side))
