"""Masks and images as people draw them: what is known, what is the hole, and what is said of it."""

import numpy as np
import pytest
from PIL import Image

from experiments import restoration
from score_sde import space
from score_sde.errors import UserError

GRAY, COLOUR = (space.pixels((8, 8, channels), centered=True, dequantize=False) for channels in (1, 3))
LEFT = np.zeros((8, 8), bool)
LEFT[:, :4] = True
PHOTO = np.random.default_rng(0).integers(1, 255, (8, 8, 3)).astype(np.uint8)


def two(known, hole, mode="L") -> Image.Image:
    """A mask whose left half has one colour and its right half another."""
    image = Image.new(mode, (8, 8), hole)
    image.paste(known, (0, 0, 4, 8))
    return image


def palette(known, hole) -> Image.Image:
    image = two(0, 1, "P")
    image.putpalette([*known, *hole])
    return image


def with_alpha(pixels, alpha) -> Image.Image:
    image = Image.fromarray(pixels).convert("RGB")
    image.putalpha(Image.fromarray(np.where(alpha, 255, 0).astype(np.uint8)))
    return image


def clear_palette() -> Image.Image:
    image = palette((255, 255, 255), (255, 255, 254))
    image.info["transparency"] = 1
    return image


TOP = np.arange(8)[:, None] < 4
MASKS = {  # how it is drawn: (the image, options of its file)
    "white and black": (two(255, 0), {}),
    "in colour": (two((255, 255, 255), (0, 0, 0), "RGB"), {}),
    "one bit": (two(1, 0, "1"), {}),
    "levels 0 and 1": (two(1, 0), {}),
    "levels 0 and 38": (two(38, 0), {}),
    "gray and white": (two(255, 200), {}),
    "palette": (palette((255, 255, 255), (0, 0, 0)), {}),
    "palette of a labelling": (palette((128, 0, 0), (0, 0, 0)), {}),
    "transparent palette": (clear_palette(), dict(transparency=1)),
    "the hole is transparent": (with_alpha(np.full((8, 8), 255, np.uint8), LEFT), {}),
    "the hole is transparent and black": (with_alpha(np.where(LEFT, 255, 0).astype(np.uint8), LEFT), {}),
    "white on transparent, with a black part": (
        with_alpha(np.where(LEFT, 255, 0).astype(np.uint8), LEFT | TOP), {},
    ),
    "a photo with a hole": (with_alpha(PHOTO, LEFT), {}),
    "opaque": (with_alpha(np.where(LEFT, 255, 0).astype(np.uint8), np.ones((8, 8), bool)), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("shape", [GRAY, COLOUR], ids=["gray model", "colour model"])
def test_masks(tmp_path, capsys, case, shape):
    image, options = MASKS[case]
    image.save(tmp_path / "mask.png", **options)
    np.testing.assert_array_equal(restoration.read_mask(f"{tmp_path}/mask.png", shape), LEFT)
    assert "mask: 50% of the pixels known" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_masks_are_upright(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown, its stored left is above
    two(255, 0).save(tmp_path / f"mask.{suffix}", exif=exif)
    np.testing.assert_array_equal(restoration.read_mask(f"{tmp_path}/mask.{suffix}", GRAY), LEFT.T)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (two(0, 0), "knows nothing of the image: make the known part white"),
        (two(255, 255), "leaves nothing to paint"),
        (with_alpha(PHOTO, np.zeros((8, 8), bool)), "knows nothing"),
        (with_alpha(np.zeros((8, 8), np.uint8), LEFT), "black or transparent everywhere"),
        (two(255, 0).resize((16, 8)), "is 16x8, the model's images are 8x8: resize it"),
        (Image.new("I;16", (8, 8)), "more than 8 bits"),
    ],
)
def test_masks_that_are_refused(tmp_path, image, message):
    image.save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=message):
        restoration.read_mask(f"{tmp_path}/mask.png", GRAY)


def test_transparent_pixels_of_an_image_are_told(tmp_path, capsys):
    with_alpha(PHOTO, LEFT).save(tmp_path / "a.png")
    np.testing.assert_array_equal(restoration.read_image(f"{tmp_path}/a.png", COLOUR, exact=True), PHOTO)
    assert "32 transparent pixels" in capsys.readouterr().out
    Image.fromarray(PHOTO).save(tmp_path / "b.png")
    restoration.read_image(f"{tmp_path}/b.png", COLOUR, exact=True)
    assert capsys.readouterr().out == ""


def test_gray_images_by_any_name(tmp_path):
    """A palette of grays is gray."""
    for mode in ("L", "P", "LA"):
        two(200, 100).convert(mode).save(tmp_path / "a.png")
        image = restoration.read_image(f"{tmp_path}/a.png", GRAY, exact=True)
        np.testing.assert_array_equal(image[..., 0], np.where(LEFT, 200, 100))
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="3 colour channel"):
        restoration.read_image(f"{tmp_path}/a.png", GRAY, exact=True)
