"""Labels in files beside images: dataset.json of StyleGAN's and EDM's tools, tables .csv, and WebDataset's .cls."""

import csv
import io
import json
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from score_sde.errors import UserError, one_line
from score_sde.sources import pictures
from score_sde.sources.raw import MAX_ENCODED, Parts, Tree, split_called

JSON = "dataset.json"
CLS = ".cls"  # holds the number of the class of the image that is called like it
NUMBER = re.compile(r"\d+(\.0+)?")
_MEASURE = re.compile(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?")  # a number, of a class or not
# What people call a table's columns, and a table of all splits; another is called as its split is, as in trainLabels.
_IMAGES = (
    *("filename", "file_name", "filenames", "file", "fname", "filepath", "file_path", "path", "name", "id"),
    *("image", "img", "image_id", "image_name", "img_name", "image_path", "img_path"),
)
_LABELS = ("label", "labels", "label_id", "class", "class_id", "class_name", "target", "category", "y")
_TEXTS = ("text", "caption", "captions", "description", "prompt")  # which are no classes
_OF_ALL = ("labels", "label", "metadata", "annotations")


class Labels(NamedTuple):
    """The labels of some images, in order: numbers or names of classes; neither where there are said to be none."""

    numbers: list[int] | None = None
    names: list[str] | None = None


# ------------------------------------------------------------------------------------------------ dataset.json


def of_json(tree: Tree, paths: dict[Parts, Parts], root: Parts) -> tuple[Labels | None, list[str]]:
    """What the dataset.json in the folder `root` says of images, given each with its path below it; and notes."""
    where = f"{tree.root}/{'/'.join((*root, JSON))}"
    try:
        content = json.loads(_read(tree, (*root, JSON)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {one_line(error)}: make it again, or remove it") from error
    match content:
        case {"labels": None}:
            return Labels(), [f"{where} gives no labels"]
        case {"labels": [*pairs]} if all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in pairs):
            labels = {name.replace("\\", "/"): label for name, label in pairs}
        case _:
            return None, [f"{where} has no list of labels as StyleGAN's and EDM's tools write it: passed over"]
    if any(isinstance(label, list) for label in labels.values()):
        return Labels(), [f"{where} gives vectors, not classes: no labels"]
    names = ["/".join(inner) for inner in paths.values()]
    for name in names:
        if type(labels.get(name)) is not int:
            raise UserError(
                f"{where} gives {name} the label {labels.get(name)!r}, expected a whole number: make it again, or "
                "remove it"
            )
    return Labels([labels[name] for name in names]), [f"{tree.root}: labels by {JSON}"]


# ------------------------------------------------------------------------------------------------ tables


class Table(NamedTuple):
    """Rows of a table that name an image and its label."""

    where: str
    file: Parts
    split: str | None  # which it is of; None: all
    labels: dict[str, str]

    def label(self, parts: Parts) -> str | None:
        """The label of an image, named by its path from the table's folder or by its name, with its suffix or not."""
        inner = "/".join(parts[len(self.file) - 1 :])
        for name in (inner, parts[-1]):
            for called in (name, os.path.splitext(name)[0]):
                if called in self.labels:
                    return self.labels[called]
        return None


def tables(tree: Tree, images: list[Parts]) -> tuple[list[Table], list[str]]:
    """The tables of labels among a tree's files, such as labels.csv or train.csv; and notes on others called so."""
    found, notes = [], []
    for file in tree.files:
        stem, suffix = os.path.splitext(file[-1].lower())
        split = split_called(re.sub(r"[-_ ]?labels?$", "", stem))
        if suffix not in (".csv", ".tsv") or not (split or stem in _OF_ALL):
            continue
        where = f"{tree.root}/{'/'.join(file)}"
        columns = _columns(tree, file, where)
        table = None if columns is None else Table(where, file, split, _rows(*columns, where))
        if table is None:
            notes.append(f"{where} has no columns `filename` and `label`: passed over")
        elif not any(table.label(parts) for parts in images if parts[: len(file) - 1] == file[:-1]):
            notes.append(f"{where} names none of the images: passed over")
        else:
            found.append(table)
    return found, notes


def _columns(tree: Tree, file: Parts, where: str) -> tuple[list[str], list[str]] | None:
    """The columns of images and of labels; None if a table has no such. Of two, the one beside images is of labels."""
    try:
        text = _read(tree, file).decode("utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        head, *rows = csv.reader(io.StringIO(text), delimiter=delimiter)
    except (ValueError, csv.Error) as error:
        raise UserError(f"{where} is not a table in CSV: {one_line(error)}: make it again, or remove it") from None
    head = [name.strip().lower() for name in head]
    image = next((head.index(name) for name in _IMAGES if name in head), None)
    label = next((head.index(name) for name in _LABELS if name in head), None)
    if label is None and image is not None and len(head) == 2 and head[1 - image] not in _TEXTS:
        label = 1 - image
    if None in (image, label):
        return None
    rows = [row for row in rows if row]
    if any(len(row) <= max(image, label) for row in rows):
        raise UserError(f"{where} has rows of fewer columns than its first: make it again, or remove it")
    return [row[image].strip() for row in rows], [row[label].strip() for row in rows]


def _rows(names: Iterable[str], values: Iterable[str], where: str) -> dict[str, str]:
    labels = {}
    for name, value in zip(names, values, strict=True):
        name = name.replace("\\", "/").removeprefix("./")
        if labels.setdefault(name, value) != value:
            raise UserError(f"{where} gives {name} two labels, {labels[name]} and {value}: keep one, or remove it")
    return labels


def of_table(table: Table, images: Iterable[Parts]) -> Labels:
    """The labels that a table gives images, which it must name: numbers if all its labels are, else names."""
    labels = []
    for parts in images:
        labels.append(table.label(parts))
        if not labels[-1]:
            raise UserError(f"{table.where} gives {'/'.join(parts)} no label: add it, or remove one of them")
    values = table.labels.values()
    if all(map(NUMBER.fullmatch, values)):
        return Labels([int(float(label)) for label in labels])
    if all(map(_MEASURE.fullmatch, values)):
        others = [value for value in values if not NUMBER.fullmatch(value)]
        raise UserError(
            f"{table.where} gives the label {others[0]}, expected whole numbers from 0 on, or names of classes"
        )
    return Labels(names=labels)


# ------------------------------------------------------------------------------------------------ WebDataset


def of_cls(tree: Tree, images: Iterable[Parts], files: set[Parts]) -> Labels:
    """The labels in files called like the images, up to the first dot, with .cls."""
    labels = []
    for parts in images:
        file = beside(parts)
        where = f"{tree.root}/{'/'.join(file)}"
        content = _read(tree, file).decode(errors="replace").strip() if file in files else "absent"
        if not NUMBER.fullmatch(content):
            raise UserError(f"{where} is {content[:40]!r}, expected the number of a class: mend it, or remove all .cls")
        labels.append(int(float(content)))
    return Labels(labels)


def beside(parts: Parts) -> Parts:
    """The .cls that belongs to an image."""
    return (*parts[:-1], parts[-1].split(".")[0] + CLS)


def _read(tree: Tree, file: Parts) -> bytes:
    where = f"{tree.root}/{'/'.join(file)}"
    if tree.length(file) > MAX_ENCODED:
        raise UserError(f"{where} is longer than {MAX_ENCODED} bytes: remove it, or make it again")
    return pictures.patiently(lambda: tree.read(file), where)
