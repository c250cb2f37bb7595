"""Images as files of a folder or of an archive: which are data, of what split, and of what class."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from score_sde.errors import UserError
from score_sde.sources import manifests, pictures
from score_sde.sources.manifests import Labels, Table
from score_sde.sources.raw import Parts, Raw, Source, Tree, count_line, is_hidden, split_called

# ------------------------------------------------------------------------------------------------ folders


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


# ------------------------------------------------------------------------------------------------ what they mean


def of_tree(tree: Tree) -> Source:
    """Splits and classes of the images in a tree.

    Folders that people call train, valid, test and the like are splits if there are two of them, or nothing beside one.
    The sub-folders of a split, sorted, are the classes, numbered over all splits; a split with images that are in none
    of them has no labels. Folders that hold nothing but one other are looked through. Files of labels beside the images
    decide in the place of folders (manifests.py).
    """
    images, others = [], []
    for parts in tree.files:
        (images if _suffix(parts) in pictures.SUFFIXES else others).append(parts)
    tables, notes = manifests.tables(tree, images)
    known = {parts for parts in others if parts[-1] == manifests.JSON} | {table.file for table in tables}
    known |= {manifests.beside(parts) for parts in images}
    passed = Counter(tree.passed) + Counter(
        _suffix(parts) or "without a suffix" for parts in others if parts not in known
    )
    if not images:
        over = f"; passed over: {count_line(passed)}: {_remedy(passed)}" if passed else ""
        raise UserError(f"{tree.root} holds no images ({', '.join(pictures.SUFFIXES)}){over}")

    jsons = {parts[:-1] for parts in others if parts[-1] == manifests.JSON}
    base = _looked_through(images, jsons | {table.file[:-1] for table in tables})
    parts_of, said = _by_split(tree, images, base, base in jsons)
    parts_of = _by_table(parts_of, tables)
    outside = len(images) - sum(map(len, parts_of.values()))
    if outside:
        passed["images outside of the splits"] += outside
    notes += said
    splits, files = {}, set(others)
    for split, paths in parts_of.items():
        told, said = _labels_of(tree, split, paths, jsons, tables, files)
        notes += said
        if told is None:
            told = Labels(names=_class_names(paths))
            if told.names is None and any(len(rest) > 1 for rest in paths.values()):
                notes.append(f"{tree.root} ({split}): no labels, since some images are in no class folder")
        splits[split] = told
    names = {name for told in splits.values() for name in told.names or ()}
    if names and any(told.numbers for told in splits.values()):
        raise UserError(f"{tree.root}: some splits' labels are numbers, others' are names: give them in one way")
    classes = tuple(sorted(names)) or None
    number = {name: label for label, name in enumerate(classes or ())}
    raws = {}
    for split, told in splits.items():
        labels = [number[name] for name in told.names] if told.names else told.numbers
        raws[split] = _raw(tree, list(parts_of[split]), labels)
        absent = sorted(names - set(told.names or names))
        if absent:
            notes.append(f"{tree.root} ({split}): no images of {', '.join(absent[:8])}{', ...' if absent[8:] else ''}")
    if passed:
        notes.append(f"{tree.root}: passed over {count_line(passed)}")
    return Source(raws, classes, tuple(notes))


def _suffix(parts: Parts) -> str:
    return os.path.splitext(parts[-1])[1].lower()


def _labels_of(
    tree: Tree, split: str, paths: dict[Parts, Parts], jsons: set[Parts], tables: list[Table], files: set[Parts]
) -> tuple[Labels | None, list[str]]:
    """What files of labels say of a split's images, None where there is none; and notes. Tables nearer to them win."""
    parts, inner = next(iter(paths.items()))
    root = parts[: len(parts) - len(inner)]
    if root in jsons:
        return manifests.of_json(tree, paths, root)
    above = [
        table for table in tables if table.split in (None, split) and root[: len(table.file) - 1] == table.file[:-1]
    ]
    for table in sorted(above, key=lambda table: len(table.file), reverse=True):
        if any(map(table.label, paths)):
            return manifests.of_table(table, paths), [f"{tree.root} ({split}): labels by {'/'.join(table.file)}"]
    if any(manifests.beside(parts) in files for parts in paths):
        return manifests.of_cls(tree, paths, files), [f"{tree.root} ({split}): labels by {manifests.CLS} files"]
    return None, []


def _by_table(parts_of: dict[str, dict[Parts, Parts]], tables: list[Table]) -> dict[str, dict[Parts, Parts]]:
    """The splits that tables such as train.csv and test.csv name where folders name none."""
    if set(parts_of) != {"train"} or not any(table.split for table in tables):
        return parts_of
    (paths,) = parts_of.values()
    named = {table.split: {} for table in tables if table.split}
    for table in tables:
        if table.split:
            named[table.split] |= {parts: inner for parts, inner in paths.items() if table.label(parts)}
    return named


def _remedy(passed: Counter) -> str:
    """What to do with files that are no images."""
    if {".npz", ".npy", ".zip", ".tar", ".parquet", ".gz", ".tgz"} & set(passed):
        return "give one of these files itself, unpacked if it is another archive than a .zip or .tar of images"
    return "convert other images, as to .png"


def _raw(tree: Tree, paths: Sequence[Parts], labels: Sequence[int] | None) -> Raw:
    return Raw(
        len(paths),
        lambda i: (tree.read(paths[i]), None if labels is None else labels[i]),
        name=lambda i: "/".join(paths[i]),
        length=lambda i: tree.length(paths[i]),
    )


def _looked_through(images: Sequence[Parts], told: set[Parts]) -> Parts:
    """The folder below which splits or classes are: the first that is more than the cover of one other.

    A single folder with images of its own is one class, and so is not looked through.
    """
    base = ()
    while True:
        tops = {parts[len(base)] for parts in images}
        if len(tops) > 1 or base in told or any(len(parts) == len(base) + 1 for parts in images):
            return base
        below = (*base, *tops)
        own = any(len(parts) == len(below) + 1 for parts in images)
        if split_called(below[-1]) or (own and below not in told):
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
            alone = [folder for folders in called.values() for folder in folders if folder in tops]
            note = f"{tree.root}: {', '.join(alone)} is taken for a class, no split, since other folders are beside it"
            return {"train": rest}, [note] if alone else []
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
