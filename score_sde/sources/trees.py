"""Images as files of a folder or of a zip archive: which are data, of what split, and of what class."""

import json
import os
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from score_sde import files
from score_sde.errors import UserError, one_line
from score_sde.sources import pictures
from score_sde.sources.pictures import DamagedImage
from score_sde.sources.raw import Raw, Source, count_line, is_hidden, split_called

Parts = tuple[str, ...]  # a path within a tree
MANIFEST = "dataset.json"  # of StyleGAN's and EDM's dataset tools
MAX_ENCODED = 2**28  # bytes of one file of an archive, which may promise anything


class Tree(NamedTuple):
    """Files that may be data, in the order of their paths, and what else was met."""

    root: str
    files: list[Parts]
    folders: set[Parts]
    read: Callable[[Parts], bytes]
    length: Callable[[Parts], int]
    passed: Counter  # what was passed over, by kind


# ------------------------------------------------------------------------------------------------ folders and archives


def from_folder(folder: Path) -> Source:
    """The images of a folder, at any depth; links are followed, but not back to a folder above them."""
    found, folders, passed = [], set(), Counter()
    left = [((), (_inode(folder),))]
    while left:
        above, inodes = left.pop()
        path = folder.joinpath(*above)
        for entry in pictures.patiently(lambda path=path: list(os.scandir(path)), str(path)):
            parts = (*above, entry.name)
            if is_hidden(entry.name):
                passed["hidden"] += 1
            elif _is(entry.is_dir):
                inode = _inode(entry)
                if inode in inodes:
                    passed["link to a folder above it"] += 1
                else:
                    folders.add(parts)
                    left.append((parts, (*inodes, inode)))
            elif _is(entry.is_file):
                found.append(parts)
            else:
                passed["broken link" if entry.is_symlink() else "special file"] += 1
    path = lambda parts: folder.joinpath(*parts)
    read, length = (lambda parts: path(parts).read_bytes()), (lambda parts: path(parts).stat().st_size)
    return of_tree(Tree(str(folder), sorted(found), folders, read, length, passed))


def _is(test: Callable[[], bool]) -> bool:
    """The answer of a test of a file; no, where it is a link to itself."""
    try:
        return test()
    except OSError:
        return False


def _inode(entry) -> tuple[int, int]:
    status = entry.stat()
    return status.st_dev, status.st_ino


def from_zip(path: Path) -> Source:
    """The images of a zip archive, read without unpacking; a folder that holds all of them is the data set's own."""
    try:
        archive, size = zipfile.ZipFile(path), path.stat().st_size
        infos = [info for info in archive.infolist() if not info.is_dir()]
    except Exception as error:  # zipfile raises several types on a damaged file
        raise UserError(f"{path} is not a readable zip archive: {one_line(error)}") from error
    members, passed = {}, Counter()
    for info in infos:
        parts = tuple(part for part in info.filename.replace("\\", "/").split("/") if part)
        if any(map(is_hidden, parts)):
            passed["hidden"] += 1
        elif parts and not stat.S_ISLNK(info.external_attr >> 16):
            members[parts] = info
        else:
            passed["link"] += 1
    tops = {parts[0] for parts in members}
    if len(tops) == 1 and all(len(parts) > 1 for parts in members):
        members = {parts[1:]: info for parts, info in members.items()}
    folders = {parts[:depth] for parts in members for depth in range(1, len(parts))}

    def read(parts: Parts) -> bytes:
        info, where = members[parts], f"{path}/{'/'.join(parts)}"
        if info.flag_bits & 1:
            raise UserError(f"{where} is encrypted: make an archive without a password")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{where} is compressed by another method than deflate: unpack it and zip it again")
        inside = 0 <= info.header_offset < size and info.compress_size <= size
        if not inside or info.file_size > files.MOST_DEFLATED * info.compress_size:
            raise DamagedImage(f"{where} is damaged: it promises more than the archive holds")
        if info.file_size > MAX_ENCODED:
            raise UserError(f"{where} promises {info.file_size} bytes: more than {MAX_ENCODED} are not read")
        try:
            return archive.read(info)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
            raise DamagedImage(f"{where} is damaged: {one_line(error)}") from error

    return of_tree(Tree(str(path), sorted(members), folders, read, lambda parts: members[parts].file_size, passed))


# ------------------------------------------------------------------------------------------------ what they mean


def of_tree(tree: Tree) -> Source:
    """Splits and classes of the images in a tree.

    Folders that people call train, valid, test and the like are splits if there are two of them, or nothing beside one.
    The sub-folders of a split, sorted, are the classes, numbered over all splits; a split with images that are in none
    of them has no labels. Folders that hold nothing but one other are looked through. A dataset.json beside the images
    decides the labels in the place of folders.
    """
    images, passed = [], Counter(tree.passed)
    for parts in tree.files:
        suffix = os.path.splitext(parts[-1])[1].lower()
        if suffix in pictures.SUFFIXES:
            images.append(parts)
        elif parts[-1] != MANIFEST:
            passed[suffix or "without a suffix"] += 1
    if not images:
        over = f"; passed over: {count_line(passed)}: {_remedy(passed)}" if passed else ""
        raise UserError(f"{tree.root} holds no images ({', '.join(pictures.SUFFIXES)}){over}")

    manifests = {parts[:-1] for parts in tree.files if parts[-1] == MANIFEST}
    base = _looked_through(images, manifests)
    parts_of, notes = _by_split(tree, images, base, base in manifests)
    outside = len(images) - sum(map(len, parts_of.values()))
    if outside:
        passed["images outside of the splits"] += outside
    splits, names = {}, set()
    for split, paths in parts_of.items():
        manifest, said = _manifest(tree, paths, manifests)
        notes += said
        named = None if manifest else _class_names(paths)
        if named is None and not manifest and any(len(rest) > 1 for rest in paths.values()):
            notes.append(f"{tree.root} ({split}): no labels, since some images are in no class folder")
        splits[split] = (paths, manifest, named)
        names |= set(named or ())
    classes = tuple(sorted(names)) or None
    number = {name: label for label, name in enumerate(classes or ())}
    raws = {}
    for split, (paths, manifest, named) in splits.items():
        labels = manifest.labels if manifest else named and [number[name] for name in named]
        raws[split] = _raw(tree, list(paths), labels)
        absent = sorted(names - set(named or names))
        if absent:
            notes.append(f"{tree.root} ({split}): no images of {', '.join(absent[:8])}{', ...' if absent[8:] else ''}")
    if passed:
        notes.append(f"{tree.root}: passed over {count_line(passed)}")
    return Source(raws, classes, tuple(notes))


def _remedy(passed: Counter) -> str:
    """What to do with files that are no images."""
    if {".npz", ".npy", ".zip", ".parquet", ".gz", ".tgz"} & set(passed):
        return "give one of these files itself, unpacked if it is another archive than a .zip of images"
    return "convert other images, as to .png"


def _raw(tree: Tree, paths: Sequence[Parts], labels: Sequence[int] | None) -> Raw:
    return Raw(
        len(paths),
        lambda i: (tree.read(paths[i]), None if labels is None else labels[i]),
        name=lambda i: "/".join(paths[i]),
        length=lambda i: tree.length(paths[i]),
    )


def _looked_through(images: Sequence[Parts], manifests: set[Parts]) -> Parts:
    """The folder below which splits or classes are: the first that is more than the cover of one other.

    A single folder with images of its own is one class, and so is not looked through.
    """
    base = ()
    while True:
        tops = {parts[len(base)] for parts in images}
        if len(tops) > 1 or base in manifests or any(len(parts) == len(base) + 1 for parts in images):
            return base
        below = (*base, *tops)
        own = any(len(parts) == len(below) + 1 for parts in images)
        if split_called(below[-1]) or (own and below not in manifests):
            return base
        base = below


def _by_split(
    tree: Tree, images: Sequence[Parts], base: Parts, whole: bool
) -> tuple[dict[str, dict[Parts, Parts]], list[str]]:
    """For each split its images' paths, in order, each with its path within the split; and notes.

    whole: what is below `base` has one manifest, and so no splits.
    """
    depth = len(base)
    rest = {parts: parts[depth:] for parts in images}
    called = {}
    for folder in sorted(parts[depth] for parts in tree.folders if len(parts) == depth + 1 and parts[:depth] == base):
        if split_called(folder):
            called.setdefault(split_called(folder), []).append(folder)
    tops = {inner[0] for inner in rest.values()}
    if whole:
        return {"train": rest}, []
    if len(called) < 2 and not all(map(split_called, tops)):
        seconds = {inner[1] for inner in rest.values() if len(inner) > 2}
        roles = set(map(split_called, seconds))
        if None in roles or len(roles) < 2 or any(len(inner) < 3 for inner in rest.values()):
            return {"train": rest}, []
        # splits below classes, as in cat/train/0.png
        rest = {parts: (inner[1], inner[0], *inner[2:]) for parts, inner in rest.items()}
        called = {role: sorted(name for name in seconds if split_called(name) == role) for role in roles}
    splits, notes = {}, []
    for split, folders in called.items():
        if len(folders) > 1:
            raise UserError(f"{tree.root} holds {' and '.join(folders)}, both of which mean {split}: rename one")
        paths = {parts: inner[1:] for parts, inner in rest.items() if len(inner) > 1 and inner[0] == folders[0]}
        inside = {inner[0] for inner in paths.values()}
        covers = len(inside) == 1 and all(len(inner) > 1 for inner in paths.values())
        if covers and split_called(*inside) == split:  # as in training_set/training_set/cat/0.png
            paths = {parts: inner[1:] for parts, inner in paths.items()}
        if paths:
            splits[split] = dict(sorted(paths.items(), key=lambda item: item[1]))
        elif split == "train":
            raise UserError(f"{tree.root}: its folder {folders[0]} holds no images to train on: fill it, or remove it")
        else:
            notes.append(f"{tree.root}: its folder {folders[0]} holds no images")
    return splits, notes


def _class_names(paths: dict[Parts, Parts]) -> list[str] | None:
    """The class of each image, its folder below the split; None if some image is in none."""
    if any(len(inner) == 1 for inner in paths.values()):
        return None
    return [inner[0] for inner in paths.values()]


class _Manifest(NamedTuple):
    labels: list[int] | None


def _manifest(tree: Tree, paths: dict[Parts, Parts], manifests: set[Parts]) -> tuple[_Manifest | None, list[str]]:
    """The labels that a dataset.json at the root of these images gives them, if there is one; and notes."""
    parts, inner = next(iter(paths.items()))
    root = parts[: len(parts) - len(inner)]
    if root not in manifests:
        return None, []
    file = (*root, MANIFEST)
    where = f"{tree.root}/{'/'.join(file)}"
    if tree.length(file) > MAX_ENCODED:
        raise UserError(f"{where} is longer than {MAX_ENCODED} bytes: remove it, or make it again")
    try:
        told_labels = json.loads(pictures.patiently(lambda: tree.read(file), where))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {one_line(error)}: make it again, or remove it") from error
    match told_labels:
        case {"labels": None}:
            return _Manifest(None), [f"{where} gives no labels"]
        case {"labels": [*pairs]} if all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in pairs):
            labels = {name.replace("\\", "/"): label for name, label in pairs}
        case _:
            return None, [f"{where} has no list of labels as StyleGAN's and EDM's tools write it: passed over"]
    if any(isinstance(label, list) for label in labels.values()):
        return _Manifest(None), [f"{where} gives vectors, not classes: no labels"]
    names = ["/".join(inner) for inner in paths.values()]
    for name in names:
        if type(labels.get(name)) is not int:
            raise UserError(
                f"{where} gives {name} the label {labels.get(name)!r}, expected a whole number: make it again, or "
                "remove it"
            )
    return _Manifest([labels[name] for name in names]), [f"{tree.root}: labels by {MANIFEST}"]
