"""Read images from any of five sources: scikit-learn's digits, tensorflow-datasets, .npz, IDX files, folders."""

import difflib
import functools
import gzip
import io
import math
import os
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from score_sde import files
from score_sde.data import Images, gather, permutation
from score_sde.errors import UserError, one_line

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `decode` refuses them by name
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # of the decoders behind Pillow's many others, one starts a program
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name for 8-bit images of that many channels
RESIZE_RULES = ("none", "pad", "crop_resize", "resize_crop")
MAX_PIXELS = 2**26  # of one encoded image: a few bytes of a hostile file can ask for gigabytes
MEMORY_BYTES = 2**30  # larger splits are decoded batch by batch


class Raw(NamedTuple):
    """A split as stored: record(i) -> (image, label), where the image is uint8 (h, w, c), encoded bytes, or a path.

    label is an int or None. arrays: the same records in one piece, {"image", "label"}, if they are in memory.
    """

    size: int
    record: Callable[[int], tuple[np.ndarray | bytes | Path, int | None]]
    arrays: dict[str, np.ndarray] | None = None


def load(
    dataset: str,
    split: str,
    *,
    image_size: int,
    num_channels: int,
    resize: str = "none",
    crop: int | None = None,
    data_dir: str | None = None,
) -> Images:
    """One split of a data set, as square images.

    dataset: "digits" (8x8 gray, in scikit-learn); the name of a tensorflow-datasets set, such as "cifar10" or
        "lsun/bedroom", kept under `data_dir`; or a path to an .npz, an IDX file or folder, or a folder of images. A
        folder named like a tensorflow-datasets set is written "./name".
    split: "train", "test" (the validation split of sets that lack a test split), or any name of the set's own. A set
        with one split only is divided: the last tenth of a fixed permutation is "test"; "all" is the whole.
    crop: side of a central square taken first (140 for the published CelebA).
    resize: "none", images must have image_size already; "pad", black borders; "crop_resize", central square, then
        bicubic (published LSUN); "resize_crop", shorter side to image_size bilinear, then central square (published
        LSUN at 128, and CelebA after its crop). Both antialias and round to uint8, where the published code keeps
        floats or truncates.
    num_channels: 1 or 3. Gray repeats to RGB, RGB becomes gray by luma (ITU-R 601), alpha is dropped: the conventions
        of Pillow, hence of the field's folder readers. 16-bit gray and float images are refused.

    Splits under 1 GiB decoded are decoded now; of larger ones the first image is, as a check, and the rest by threads
    as batches ask, so a bad image deep inside is reported when it is reached. Raises UserError for any unusable input.
    """
    if resize not in RESIZE_RULES:
        raise UserError(f"unknown resize rule {resize!r}: choose one of {', '.join(RESIZE_RULES)}")
    if num_channels not in (1, 3):
        raise UserError(f"num_channels is {num_channels}, expected 1 or 3")
    if image_size < 1 or (crop is not None and crop < 1):
        raise UserError(f"image_size is {image_size} and crop is {crop}: expected positive numbers of pixels")
    raw = choose_split(read_splits(dataset, data_dir), split, dataset)
    if raw.size == 0:
        raise UserError(f"{dataset}: split {split} holds no images")
    name, shape = f"{dataset} ({split})", (image_size, image_size, num_channels)

    if raw.arrays and raw.arrays["image"].shape[1:] == shape and not crop:
        return Images(name, raw.size, functools.partial(gather, raw.arrays))

    def fitted(i):
        image, label = raw.record(int(i))
        where = str(image) if isinstance(image, Path) else f"{name}, image {i}"
        if label is not None and label < 0:
            raise UserError(f"{where} has the label {label}; labels count from 0")
        return fit(image, where, image_size, num_channels, resize, crop), label

    pool = ThreadPoolExecutor(os.cpu_count())
    apply = map if raw.arrays else pool.map  # decoding leaves the interpreter's lock, array work does not

    def take(indices):
        images, labels = zip(*apply(fitted, indices), strict=True)
        batch = {"image": np.stack(images)}
        return batch if labels[0] is None else batch | {"label": np.array(labels, np.int32)}

    take([0])
    if raw.size * math.prod(shape) < MEMORY_BYTES:
        take = functools.partial(gather, take(range(raw.size)))
        pool.shutdown()
    return Images(name, raw.size, take)


def choose_split(splits: dict[str, Raw], split: str, dataset: str) -> Raw:
    """The split of that name, by the rules in `load`."""
    if len(splits) == 1 and split in ("train", "test", "all"):
        (whole,) = splits.values()
        cut = whole.size - whole.size // 10
        order = permutation(0, 0, whole.size)
        return whole if split == "all" else subset(whole, order[:cut] if split == "train" else order[cut:])
    if split == "test" and "test" not in splits:
        split = next((name for name in ("validation", "val") if name in splits), split)
    if split not in splits:
        names = splits if len(splits) > 1 else ("train", "test", "all")
        raise UserError(f"{dataset} has no split {split!r}: choose one of {', '.join(names)}")
    return splits[split]


def subset(raw: Raw, indices: np.ndarray) -> Raw:
    """The images `indices` of a split, in that order."""
    return Raw(len(indices), lambda i: raw.record(int(indices[i])), raw.arrays and gather(raw.arrays, indices))


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


def decode(encoded: bytes | Path, where: str) -> Image.Image:
    """An encoded image of at most MAX_PIXELS and 8 bits a channel."""
    try:
        # whole, since a file allocates what a damaged header asks it to read, and bytes do not
        content = encoded if isinstance(encoded, bytes) else encoded.read_bytes()
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{where} is {image.width}x{image.height}: more than {MAX_PIXELS} pixels")
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{where} has more than 8 bits a channel: convert it first")
            image.load()
            return image
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen types, some of them plain Exception's children
        raise UserError(f"{where} is not a readable image: {one_line(error)}") from error


# ---------------------------------------------------------------------------------------------------------- sources
# Each returns {split name: Raw}.


def read_splits(dataset: str, data_dir: str | None) -> dict[str, Raw]:
    """The splits of whichever source `dataset` names (see `load`)."""
    if dataset == "digits":
        return from_digits()
    path = Path(dataset).expanduser()
    if not dataset.startswith(("/", ".", "~")) and path.suffix not in (".npz", ".gz") and "-ubyte" not in path.name:
        splits = from_tfds(dataset, data_dir, missing_ok=os.path.exists(dataset))
        if splits is not None:
            return splits
    if not path.exists():
        raise UserError(f"{dataset}: no such file or folder")
    if path.is_dir():
        parts = {part.name.split("-")[0]: part for part in sorted(path.glob("*-images-idx3-ubyte*"))}
        if parts:
            return {{"t10k": "test"}.get(name, name): from_idx(part) for name, part in parts.items()}
        parts = {name: path / name for name in ("train", "test", "validation", "val") if (path / name).is_dir()}
        if len(parts) > 1:
            return {name: from_folder(part) for name, part in parts.items()}
        return {"train": from_folder(path)}
    if "-images-idx3-ubyte" in path.name:
        return {"train": from_idx(path)}
    if path.suffix == ".npz":
        return from_npz(path)
    raise UserError(f"{dataset}: expected a folder, an .npz, or a file named *-images-idx3-ubyte[.gz]")


def from_arrays(images: np.ndarray, labels: np.ndarray | None, where: str) -> Raw:
    """uint8 images (N, H, W, C) or (N, H, W), and integer labels (N,), after checking that they are."""
    if images.dtype != np.uint8:
        raise UserError(f"{where}: images are {images.dtype}, expected uint8 levels 0..255")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in MODES or 0 in images.shape[1:]:
        raise UserError(f"{where}: images have shape {images.shape}, expected (N, H, W) or (N, H, W, C) with C 1, 3, 4")
    if labels is None:
        return Raw(len(images), lambda i: (images[i], None), {"image": images})
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{where}: labels are {labels.dtype} {labels.shape}, expected one integer for each of {len(images)} images"
        )
    if len(labels) and (labels.min() < 0 or labels.max() >= 2**31):
        raise UserError(f"{where}: labels span {labels.min()}..{labels.max()}, expected int32 counting from 0")
    labels = labels.astype(np.int32)
    return Raw(len(images), lambda i: (images[i], labels[i]), {"image": images, "label": labels})


def from_digits() -> dict[str, Raw]:
    """scikit-learn's 1797 digits, levels 0..16 stretched to 0..255; 1500 of a fixed permutation are for training."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    whole = from_arrays(np.minimum(16 * digits.images, 255).astype(np.uint8), digits.target, "digits")
    order = permutation(0, 0, whole.size)
    return {"train": subset(whole, order[:1500]), "test": subset(whole, order[1500:])}


def from_npz(path: Path) -> dict[str, Raw]:
    """`images` [and `labels`], or `train_images`, `test_images` [and `train_labels`, `test_labels`]."""
    try:
        arrays = files.load_npz(
            path, [f"{split}{key}" for split in ("", "train_", "test_") for key in ("images", "labels")]
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable .npz of plain arrays: {one_line(error)}") from error
    prefixes = {"train": ""} if "images" in arrays else {"train": "train_", "test": "test_"}
    splits = {
        split: from_arrays(arrays[f"{prefix}images"], arrays.get(f"{prefix}labels"), str(path))
        for split, prefix in prefixes.items()
        if f"{prefix}images" in arrays
    }
    if not splits:
        raise UserError(f"{path} holds neither `images` nor `train_images`")
    return splits


def from_idx(path: Path) -> Raw:
    """A file *-images-idx3-ubyte[.gz], and its *-labels-idx1-ubyte[.gz] if that is beside it."""
    labels = path.with_name(path.name.replace("-images-idx3-", "-labels-idx1-"))
    return from_arrays(read_idx(path, 3), read_idx(labels, 1) if labels.exists() else None, str(path))


def read_idx(path: Path, rank: int) -> np.ndarray:
    """The uint8 array of an IDX file: bytes 0, 0, 8, rank, then big-endian int32 sizes, then the values."""
    most = path.stat().st_size * (files.MOST_DEFLATED if path.suffix == ".gz" else 1)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * rank)
            shape = np.frombuffer(header, ">i4", offset=4).tolist()
            if header[:4] != bytes([0, 0, 8, rank]) or len(shape) != rank or min(shape) < 0:
                raise UserError(f"{path} is not an IDX file of rank {rank} and unsigned bytes")
            size = math.prod(shape)
            values = file.read(size) if size <= most else b""
            if len(values) != size or file.read(1):
                raise UserError(f"{path}: its header promises {size} bytes, which is not what it holds")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path} is not a readable IDX file: {one_line(error)}") from error
    return np.frombuffer(values, np.uint8).reshape(shape)


def from_folder(folder: Path) -> Raw:
    """Images at any depth, sorted by path; if all are in sub-folders, the sorted sub-folders are the classes."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    parents = [path.relative_to(folder).parts[0] for path in paths]
    if any(path.parent == folder for path in paths):
        return Raw(len(paths), lambda i: (paths[i], None))
    classes = {name: label for label, name in enumerate(sorted(set(parents)))}
    return Raw(len(paths), lambda i: (paths[i], classes[parents[i]]))


def from_tfds(name: str, data_dir: str | None, *, missing_ok: bool) -> dict[str, Raw] | None:
    """A tensorflow-datasets set, prepared first if need be; None if there is none of that name and missing_ok.

    Reading needs no TensorFlow, preparing most sets does.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # a builder may be anyone's code
        if missing_ok:
            return None
        known = tfds.list_builders(with_community_datasets=False)
        base = name.split("/")[0].split(":")[0]
        if base in known or not isinstance(error, ValueError):  # a ValueError: no such name, or not even a name
            raise UserError(f"tensorflow-datasets cannot open {name}: {one_line(error)}") from error
        near = difflib.get_close_matches(name, ["digits", *known])
        hint = f"did you mean {' or '.join(near)}?" if near else "give digits, a tensorflow-datasets name or a path"
        raise UserError(f"unknown data set {name!r}: {hint}") from error
    features = dict(builder.info.features)
    if not isinstance(features.get("image"), tfds.features.Image):
        raise UserError(f"{name} has no feature `image` to train on; it has {', '.join(features)}")
    labelled = isinstance(features.get("label"), tfds.features.ClassLabel)
    command = f"tfds build {name} --file_format=array_record" + (f" --data_dir={data_dir}" if data_dir else "")
    try:
        builder.download_and_prepare(file_format="array_record")
        sources = builder.as_data_source(decoders={"image": tfds.decode.SkipDecoding()})
    except Exception as error:  # network, checksum, disk, a missing TensorFlow, another file format
        raise UserError(
            f"{name} could not be prepared ({one_line(error)}): run `pip install tensorflow-cpu`, then `{command}`, "
            "or give a folder of images or an .npz"
        ) from error

    def raw(source):
        def record(i):
            example = source[i]
            return example["image"], int(example["label"]) if labelled else None

        return Raw(len(source), record)

    return {split: raw(source) for split, source in sources.items()}
