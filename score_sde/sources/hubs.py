"""Data sets that a library keeps or reads: scikit-learn's digits, tensorflow-datasets, Hugging Face's Parquet files."""

import difflib
import json
from pathlib import Path

import numpy as np

from score_sde.data import permutation
from score_sde.errors import UserError, one_line
from score_sde.sources.raw import Raw, Source, concatenate, from_arrays, split_called, subset


def from_digits() -> Source:
    """scikit-learn's 1797 digits, levels 0..16 stretched to 0..255; 1500 of a fixed permutation are for training."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    whole = from_arrays(np.minimum(16 * digits.images, 255).astype(np.uint8), digits.target, "digits")
    order = permutation(0, 0, whole.size)
    return Source({"train": subset(whole, order[:1500]), "test": subset(whole, order[1500:])})


def from_tfds(name: str, data_dir: str | None, *, missing_ok: bool) -> Source | None:
    """A tensorflow-datasets set, prepared first if need be; None if there is none of that name and missing_ok.

    Reading needs no TensorFlow, preparing most sets does. missing_ok: a file or folder of that name is there, so that
    a set of that name is refused.
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
    if missing_ok:
        raise UserError(
            f"{name} is both a file or folder here and a set of tensorflow-datasets: write ./{name} for the former, "
            f"{name}:*.*.* for the latter"
        )
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

    classes = tuple(features["label"].names) if labelled else None
    return Source({split: raw(source) for split, source in sources.items()}, classes)


# ------------------------------------------------------------------------------------------------ Parquet

MAX_PARQUET = 2**32  # bytes of the images of one data set, which are held in memory
_IMAGES, _LABELS = ("image", "img", "images"), ("label", "labels", "fine_label", "class")


def from_parquet(paths: list[Path], where: str) -> Source:
    """An image data set of the Hugging Face hub: files train-00000-of-00002.parquet and the like, encoded images."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{where}: to read Parquet files, pip install pyarrow") from None
    if int(pyarrow.__version__.split(".")[0]) < 15:  # before, a file could have code executed (CVE-2023-47248)
        raise UserError(f"{where}: pyarrow {pyarrow.__version__} is not safe: pip install --upgrade pyarrow")
    parts, classes, left = {}, None, MAX_PARQUET
    for path in paths:
        try:
            with parquet.ParquetFile(path) as file:
                names = file.schema_arrow.names
                image, label = (next((n for n in known if n in names), None) for known in (_IMAGES, _LABELS))
                if image is None:
                    raise UserError(f"{path} has no column of images ({', '.join(_IMAGES)}), but {', '.join(names)}")
                groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
                left -= sum(group.total_byte_size for group in groups)
                if left < 0:
                    raise UserError(
                        f"{where} holds more than {MAX_PARQUET} bytes: make a folder or a zip of its images"
                    )
                table = file.read(columns=[image] + ([label] if label else []))
            classes = classes or _class_names(table.schema.metadata or {}, label)
            split = split_called(path.name.split("-")[0].split(".")[0]) or "train"
            parts.setdefault(split, []).append(_raw(table, image, label))
        except UserError:
            raise
        except Exception as error:  # of pyarrow's many types
            raise UserError(f"{path} is not a readable Parquet file of images: {one_line(error)}") from error
    return Source({split: concatenate(raws, where) for split, raws in parts.items()}, classes)


def _raw(table, image: str, label: str | None) -> Raw:
    column = table[image].combine_chunks()
    encoded = column.field("bytes")
    if encoded.null_count:
        raise UserError(f"{encoded.null_count} images are not in the file itself: make a folder of them")
    labels = None if label is None else np.asarray(table[label].to_numpy()).astype(np.int32)
    return Raw(len(table), lambda i: (encoded[i].as_py(), None if labels is None else int(labels[i])))


def _class_names(metadata: dict, label: str | None) -> tuple[str, ...] | None:
    """The names of labels that Hugging Face's library writes beside the schema."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
        return tuple(map(str, names))
    except (KeyError, TypeError, ValueError):
        return None
