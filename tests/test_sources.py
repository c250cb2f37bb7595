"""Files as people have them: what is an image, a class and a split in them, and what is said of the rest.

Images of a class are flat, cat 40, dog 120 and eel 200, so that a wrong label shows in the pixels.
"""

import gzip
import io
import json
import os
import pathlib
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from experiments import build
from score_sde import data, sources
from score_sde.errors import UserError
from score_sde.sources import archives, cifar, pictures
from tests.test_data import everything, idx

LEVELS = dict(cat=40, dog=120, eel=200)
RNG = np.random.default_rng(0)


def level(name: str) -> int:
    """The level of the class that a path names; 5 if it names none."""
    return next((value for known, value in LEVELS.items() if known in name.lower()), 5)


def encoded(value: int, suffix: str = ".png") -> bytes:
    file = io.BytesIO()
    kind = {".jpg": "JPEG", ".jfif": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:])
    Image.new("L", (8, 8), value).save(file, kind)
    return file.getvalue()


def files_of(text: str) -> dict[str, bytes | None]:
    """What a row of CASES says is there.

    cat*3: images cat/0.png, ...; a name with a suffix: one image; name!: bytes that are no image; name/: a folder.
    """
    files = {}
    for word in text.split():
        if "*" in word:
            folder, _, count = word.partition("*")
            files |= {f"{folder}/{i}.png".lstrip("/"): encoded(level(folder)) for i in range(int(count))}
        elif word.endswith("!"):
            files[word[:-1]] = b"\0\5\x16\7 no image"
        elif word.endswith("/"):
            files[word] = None
        else:
            files[word] = encoded(level(word), pathlib.PurePath(word).suffix.lower())
    return files


def as_folder(root: pathlib.Path, files: dict) -> str:
    for name, content in files.items():
        path = root / name
        (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_bytes(content)
    return str(root)


def as_zip(root: pathlib.Path, files: dict) -> str:
    with zipfile.ZipFile(root / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content or b"")
    return f"{root}/a.zip"


def as_tar(root: pathlib.Path, files: dict, suffix: str = ".tar") -> str:
    mode = {".tar": "w", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}[suffix]
    with tarfile.open(root / f"a{suffix}", mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")  # as by tar -cf a.tar .
            info.size, info.type = len(content or b""), tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            archive.addfile(info, io.BytesIO(content or b""))
    return f"{root}/a{suffix}"


def load(dataset, split="all", **options):
    return sources.load(str(dataset), split, **dict(image_size=8, num_channels=1) | options)


def check(dataset, sizes: dict, classes: str, words=()):
    """That splits have these sizes, that labels are the classes of the pixels, and that notes have these words."""
    for split, size in sizes.items():
        images = load(dataset, split)
        batch = everything(images)
        assert images.size == size
        assert images.classes == (tuple(classes.split()) or None)
        assert ("label" in batch) == bool(classes)
        if classes and set(classes.split()) <= set(LEVELS):
            shown = [LEVELS[images.classes[label]] for label in batch["label"]]
            np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], shown)
        for word in words:
            assert word in " ".join(images.notes)
        if not words:
            assert not images.notes


BOTH = "cat*5 dog*5"
# situation: (files, {split: images}, classes in order, words that are told)
CASES = {
    "classes": (BOTH, {"all": 10, "train": 9, "test": 1}, "cat dog", []),
    "a notebook was opened": (
        f"{BOTH} .ipynb_checkpoints/0.png cat/.ipynb_checkpoints/0.png", {"all": 10}, "cat dog", ["2 hidden"],
    ),
    "copied from a Mac": (
        f"{BOTH} cat/._0.png! .DS_Store! __MACOSX/cat/._0.png!", {"all": 10}, "cat dog", ["3 hidden"],
    ),
    "copied from Windows": (
        f"{BOTH} cat/Thumbs.db! desktop.ini! $RECYCLE.BIN/eel.png", {"all": 10}, "cat dog", ["hidden"],
    ),
    "on a network disk": (f"{BOTH} @eaDir/cat/0.png #recycle/0.png lost+found/", {"all": 10}, "cat dog", ["3 hidden"]),
    "a cache of git and Python": (f"{BOTH} .git/cat.png __pycache__/cat.png", {"all": 10}, "cat dog", ["2 hidden"]),
    "an editor's lock": (f"{BOTH} cat/~$0.png!", {"all": 10}, "cat dog", ["1 hidden"]),
    "valid": ("train/cat*4 train/dog*4 valid/cat*1 valid/dog*1", {"train": 8, "test": 2, "valid": 2}, "cat dog", []),
    "validation": (
        "train/cat*4 train/dog*4 validation/dog*1", {"train": 8, "test": 1}, "cat dog", ["no images of cat"],
    ),
    "upper case": ("Train/cat*4 Train/dog*4 VAL/cat*1 VAL/dog*1", {"train": 8, "test": 2}, "cat dog", []),
    "training and testing": (
        "training/cat*4 training/dog*4 testing/dog*1", {"train": 8, "test": 1}, "cat dog", ["cat"],
    ),
    "dev and eval": ("train/cat*4 dev/cat*2 eval/cat*3", {"train": 4, "dev": 2, "test": 3, "all": 9}, "cat", []),
    "three splits": ("train/cat*4 val/cat*2 test/cat*3", {"train": 4, "validation": 2, "test": 3}, "cat", []),
    "training_set": ("training_set/cat*4 test_set/cat*2", {"train": 4, "test": 2}, "cat", []),
    "twice": ("train/train/cat*4 train/train/dog*4 test/test/dog*2", {"train": 8, "test": 2}, "cat dog", ["cat"]),
    "years": ("train2017*4 val2017*2", {"train": 4, "test": 2}, "", []),
    "flat splits": ("train*4 test*2", {"train": 4, "test": 2}, "", []),
    "labels in one split": ("train/cat*2 train/dog*2 test*2", {"train": 4}, "cat dog", []),
    "a class without validation": (
        "train/cat*3 train/dog*3 train/eel*3 val/dog*2 val/eel*2",
        {"train": 9, "test": 4}, "cat dog eel", ["no images of cat"],
    ),
    "a class in validation alone": (
        "train/dog*3 train/eel*3 val/cat*2", {"train": 6, "test": 2}, "cat dog eel", ["no images of cat"],
    ),
    "an empty class": (
        "train/cat/ train/dog*3 train/eel*3 val/cat*1 val/dog*1 val/eel*1",
        {"train": 6, "test": 3}, "cat dog eel", ["no images of cat"],
    ),
    "an empty class everywhere": (f"{BOTH} bird/", {"all": 10}, "cat dog", []),
    "an empty test split": (
        "train/cat*10 train/dog*10 test/", {"train": 18, "test": 2}, "cat dog", ["test holds no images"],
    ),
    "a training split alone": ("train/cat*10 train/dog*10", {"train": 18, "test": 2}, "cat dog", []),
    "a class called train": ("train*3 car*3 bus*3", {"all": 9}, "bus car train", ["train is taken for a class"]),
    "a split beside another folder": (
        "train/cat*3 train/dog*3 unlabeled*2", {"all": 8}, "train unlabeled", ["train is taken for a class, no split"],
    ),
    "outside of the splits": (
        "train/cat*4 test/cat*2 masks*3 top.png", {"train": 4, "test": 2}, "cat", ["4 images outside"],
    ),
    "splits below classes": ("cat/train*3 dog/train*3 cat/test*1 dog/test*1", {"train": 6, "test": 2}, "cat dog", []),
    "a folder in a folder": ("set/images/cat*5 set/images/dog*5", {"all": 10}, "cat dog", []),
    "splits in a folder": ("set/train/cat*5 set/test/cat*2", {"train": 5, "test": 2}, "cat", []),
    "one class": ("cat*5", {"all": 5}, "cat", []),
    "nested classes": ("cat/a*2 cat/b/c*2 dog*2 dog/d*2", {"all": 8}, "cat dog", []),
    "on top and below": (f"{BOTH} 0.png", {"all": 11}, "", ["no labels"]),
    "flat": ("0.png 1.png 2.png", {"all": 3}, "", []),
    "another type": ("0.png 1.png 2.gif 3.gif 4.avif! 5.heic!", {"all": 2}, "", ["2 .gif", "1 .avif", "1 .heic"]),
    "suffixes": ("0.PNG 1.jpeg 2.JPG 3.jfif 4.webp 5.BMP 6.tif", {"all": 7}, "", []),
    "notes beside images": (
        "0.png README.md! labels.csv! Makefile!", {"all": 1}, "", [".md", ".csv", "without a suffix"],
    ),
    "fewer than ten": ("0.png", {"all": 1}, "", []),
}  # fmt: skip


# an archive's only folder is its cover, and it has no empty folders
NO_ARCHIVE = ("one class", "an empty test split", "an empty class everywhere", "on a network disk")


@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, kind) for case in CASES for kind in (as_folder, as_zip) if kind is as_folder or case not in NO_ARCHIVE],
)
def test_folders_and_archives(tmp_path, case, kind):
    files, sizes, classes, words = CASES[case]
    check(kind(tmp_path, files_of(files)), sizes, classes, words)


def test_an_archive_in_a_folder_of_its_own(tmp_path):
    files = files_of("faces/cat*2 faces/dog*2 faces/.DS_Store! __MACOSX/faces/._0.png!")
    check(as_zip(tmp_path, files), {"all": 4}, "cat dog", ["2 hidden"])
    check(tmp_path, {"all": 4}, "cat dog", ["2 hidden"])  # the archive alone in a folder
    flat = tmp_path / "flat"
    flat.mkdir()
    check(as_zip(flat, files_of("faces*12")), {"all": 12, "train": 11, "test": 1}, "")


def test_links_are_followed_but_not_in_circles(tmp_path):
    as_folder(tmp_path, files_of("real/dog*3 linked/cat*3 real/one.png"))
    (tmp_path / "linked/dog").symlink_to(tmp_path / "real/dog")
    (tmp_path / "linked/cat/up").symlink_to(tmp_path / "linked")
    (tmp_path / "linked/cat/self.png").symlink_to(tmp_path / "linked/cat/self.png")
    (tmp_path / "linked/cat/gone.png").symlink_to(tmp_path / "none.png")
    (tmp_path / "linked/cat/one.png").symlink_to(tmp_path / "linked/cat/0.png")
    check(tmp_path / "linked", {"all": 7}, "cat dog", ["2 broken link", "1 link to a folder above"])


def test_few_images_serve_for_training_and_test(tmp_path):
    as_folder(tmp_path, files_of("0.png"))
    for split in ("train", "test"):
        images = load(tmp_path, split)
        assert images.size == 1
        assert "10 are divided" in images.notes[0]
    assert data.Stream(data.repeat(load(tmp_path, "test"), 8), batch_size=8, seed=0).batch(3)["image"].shape[0] == 8


# ------------------------------------------------------------------------------------------------ manifests

LABELLED = [["00000/cat0.png", 1], ["00000/cat1.png", 1], ["00001/dog0.png", 0]]
TREE = "00000/cat0.png 00000/cat1.png 00001/dog0.png"


@pytest.mark.parametrize("kind", [as_folder, as_zip, as_tar])
@pytest.mark.parametrize("root", ["", "ffhq/"])
@pytest.mark.parametrize(
    ("manifest", "labels", "words"),
    [
        ({"labels": LABELLED}, [1, 1, 0], "labels by dataset.json"),
        ({"labels": [[name.replace("/", "\\"), label] for name, label in LABELLED]}, [1, 1, 0], "labels by"),
        ({"labels": None}, None, "gives no labels"),
        ({"labels": [[name, [0.5, label]] for name, label in LABELLED]}, None, "vectors"),
        ({"labels": {"0": "background"}, "training": []}, [0, 0, 1], "passed over"),
    ],
)
def test_dataset_json(tmp_path, manifest, labels, words, root, kind):
    """StyleGAN's and EDM's sub-folders are no classes."""
    files = {f"{root}{name}": content for name, content in files_of(TREE).items()}
    images = load(kind(tmp_path, files | {f"{root}dataset.json": json.dumps(manifest).encode()}))
    assert images.size == 3
    assert any(words in note for note in images.notes)
    batch = everything(images)
    assert batch["label"].tolist() == labels if labels else "label" not in batch


def test_dataset_json_of_one_sub_folder(tmp_path):
    files = files_of("00000*4") | {"dataset.json": b'{"labels": null}'}
    assert "label" not in everything(load(as_folder(tmp_path, files)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"labels": LABELLED[:2]}), r"gives 00001/dog0.png the label None, expected a whole number"),
        (json.dumps({"labels": [[name, 0.5] for name, _ in LABELLED]}), "the label 0.5"),
        ("{", "is not JSON"),
    ],
)
def test_dataset_json_that_fails(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        load(as_folder(tmp_path, files_of(TREE) | {"dataset.json": content.encode()}))


SPLIT = "train/cat0.png train/cat1.png train/dog2.png test/cat3.png test/dog4.png"
FLAT = " ".join(name.partition("/")[2] for name in SPLIT.split())
# situation: (images, {table: rows}, {split: classes or numbers}, a word that is told)
TABLES = {
    "numbers": (FLAT, {"labels.csv": "filename,label\ncat0.png,7\ncat1.png,7\ndog2.png,0\ncat3.png,7\ndog4.png,0\n"},
        {"all": [7, 7, 7, 0, 0]}, "labels by labels.csv"),
    "names, without suffix, of Windows": (
        FLAT, {"labels.csv": "\ufeffid,breed\r\ncat0,cat\r\ncat1,cat\r\ndog2,dog\r\ncat3,cat\r\ndog4,dog\r\n"},
        {"all": ["cat", "cat", "cat", "dog", "dog"]}, "labels.csv"),
    "Kaggle's": (
        SPLIT, {"trainLabels.csv": "id,label\ncat0,cat\ncat1,cat\ndog2,dog\n", "sampleSubmission.csv": "id,label\n"},
        {"train": ["cat", "cat", "dog"], "test": None}, "1 .csv"),
    "of each split": (
        SPLIT, {"train/labels.csv": "image,x,class\ncat0.png,,cat\ncat1.png,,cat\ndog2.png,,dog\n",
                "test/labels.csv": "image,class\ndog4.png,dog\ncat3.png,cat\n"},
        {"train": ["cat", "cat", "dog"], "test": ["cat", "dog"]}, "labels by test/labels.csv"),
    "which name the splits": (
        FLAT, {"train.csv": "filename,label\ncat0.png,1\ndog2.png,3\n", "test.csv": "filename,label\ndog4.png,3\n"},
        {"train": [1, 3], "test": [3]}, "2 images outside of the splits"),
    "paths in a folder beside": (
        "images/cat.png images/dog.png", {"metadata.csv": "file_name,label\nimages/cat.png,1.0\nimages/dog.png,2.0\n"},
        {"all": [1, 2]}, "labels by metadata.csv"),
    "of Excel": (FLAT, {"labels.csv": "filename;label\r\n" + "".join(f"{name};2\r\n" for name in FLAT.split())},
        {"all": [2] * 5}, "labels by labels.csv"),
    "captions": ("cat/0.png dog/0.png", {"metadata.csv": "file_name,text\ncat/0.png,a cat\ndog/0.png,a dog\n"},
        {"all": ["cat", "dog"]}, "no columns `filename` and `label`: passed over"),
    "of other images": ("set/cat/0.png set/dog/0.png", {"labels.csv": "filename,label\n1.png,5\n"},
        {"all": ["cat", "dog"]}, "names none of the images"),
    "WebDataset": ("00.cat.png 01.dog.png", {"00.cls": "3", "01.cls": "4\n"}, {"all": [3, 4]}, "labels by .cls files"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [as_folder, as_tar])
@pytest.mark.parametrize("case", TABLES)
def test_tables_of_labels(tmp_path, case, kind):
    images, tables, splits, word = TABLES[case]
    where = kind(tmp_path, files_of(images) | {name: rows.encode() for name, rows in tables.items()})
    for split, labels in splits.items():
        images = load(where, split)
        batch = everything(images)
        found = batch["label"].tolist() if "label" in batch else None
        assert (found if None in (found, images.classes) else [images.classes[i] for i in found]) == labels
        assert word in " ".join(images.notes)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"labels.csv": b"filename,label\ncat0.png,1\n"}, r"labels.csv gives cat1.png no label"),
        ({"labels.csv": b"id,label\ncat0,1\ncat1,\n"}, "gives cat1.png no label"),
        ({"labels.csv": b"id,label\ncat0,1\ncat0,2\ncat1,1\n"}, "gives cat0 two labels, 1 and 2"),
        ({"labels.csv": b"id,label\ncat0,0.5\ncat1,1\n"}, "gives the label 0.5, expected whole numbers"),
        ({"labels.csv": b"id,label\ncat0,-1\ncat1,1\n"}, "gives the label -1, expected whole numbers"),
        ({"labels.csv": b"id,label\ncat0\n"}, "rows of fewer columns"),
        ({"labels.csv": b""}, "not a table in CSV"),
        ({"labels.csv": b"\xff\xfe\0"}, "not a table in CSV"),
        ({"cat0.cls": b"1"}, r"cat1.cls is 'absent', expected the number of a class"),
        ({"cat0.cls": b"1", "cat1.cls": b"cat"}, r"cat1.cls is 'cat'"),
        ({"train/0.png": encoded(9), "train/0.cls": b"1", "test/cat/0.png": encoded(9)}, "numbers, others' are names"),
    ],
)
def test_tables_that_fail(tmp_path, files, message):
    images = {} if "train/0.png" in files else files_of("cat0.png cat1.png")
    with pytest.raises(UserError, match=message):
        load(as_folder(tmp_path, images | files))


# ------------------------------------------------------------------------------------------------ one image

UPRIGHT = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
TURN = {  # EXIF's orientation: how an upright image is stored
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: np.transpose,
    6: np.rot90, 7: lambda x: np.rot90(x, 2).T, 8: lambda x: np.rot90(x, -1),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", TURN)
def test_images_are_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": dict(quality=100), "webp": dict(lossless=True)}.get(suffix, {})
    stored = Image.fromarray(np.ascontiguousarray(TURN[orientation](UPRIGHT)))
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **options)
    image = everything(load(tmp_path))["image"][0, ..., 0]
    np.testing.assert_allclose(image.astype(int), UPRIGHT, atol=3)


def test_damaged_exif_turns_nothing(tmp_path):
    Image.fromarray(UPRIGHT).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    np.testing.assert_array_equal(everything(load(tmp_path))["image"][0, ..., 0], UPRIGHT)


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda path: Image.new("I;16", (8, 8)).save(path), r"convert it first, as by Image.fromarray"),
        (lambda path: Image.new("F", (8, 8)).save(path), "more than 8 bits"),
        (lambda path: Image.new("L", (8, 8)).save(path, compression="tiff_lzw"), "compressed TIFF"),
        (lambda path: path.write_bytes(b""), "not a readable image"),
    ],
)
def test_tiff_that_is_not_read(tmp_path, save, message):
    save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_disk_that_stumbles_is_asked_again(tmp_path, monkeypatch):
    as_folder(tmp_path, files_of("0.png"))
    monkeypatch.setattr(pictures, "WAITS", (0, 0))
    read, failures = pathlib.Path.read_bytes, [OSError(5, "Input/output error")] * 2

    def stumbling(path):
        if failures:
            raise failures.pop()
        return read(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", stumbling)
    assert load(tmp_path).size == 1
    failures += [OSError(5, "Input/output error")] * 3
    with pytest.raises(UserError, match=r"0\.png cannot be read: .*Input/output error"):
        load(tmp_path)


@pytest.mark.parametrize("limit", [2**30, 0], ids=["in memory", "decoded batch by batch"])
def test_damaged_images_are_passed_over_and_counted(tmp_path, monkeypatch, limit):
    """The next image that is whole stands in for each, whatever was asked before."""
    monkeypatch.setattr(sources, "MEMORY_BYTES", limit)
    files = {f"{i}.png": encoded(10 * i) for i in range(6)}
    files |= {name: files[name][:40] for name in ("0.png", "2.png", "3.png", "5.png")}
    images = load(as_folder(tmp_path, files), skip_damaged=True)
    for _ in range(2):
        assert images.take(np.array([5, 2, 3, 0, 1]))["image"][:, 0, 0, 0].tolist() == [10, 40, 40, 10, 10]
    assert sorted(images.damaged) == [0, 2, 3, 5]
    assert "2.png is not a readable image" in images.damaged[2]
    with pytest.raises(UserError, match=r"0\.png is not a readable image"):
        load(tmp_path)
    for name in ("1.png", "4.png"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"0\.png is not a readable image.*nor is any other image"):
        load(tmp_path, skip_damaged=True)


# ------------------------------------------------------------------------------------------------ identity


def changed(images, without=()):
    return data.identity(images.marks(), without)


def test_identity_changes_with_any_image(tmp_path, monkeypatch):
    files = {f"{i % 2}/{i}.bmp": encoded(i, ".bmp") for i in range(20)}
    same = changed(load(as_folder(tmp_path, files), "train"))
    assert same == changed(load(tmp_path, "train"))
    images = load(tmp_path, "train")
    first = images.marks
    (tmp_path / "1/3.bmp").write_bytes(encoded(99, ".bmp"))  # of the same length
    other = load(tmp_path, "train")
    assert changed(other) != same
    (different,) = np.flatnonzero(first() != other.marks()) if (first() != other.marks()).any() else (None,)
    assert different is None  # both read the files as they are now
    (tmp_path / "1/3.bmp").write_bytes(files["1/3.bmp"])
    assert changed(load(tmp_path, "train")) == same
    (tmp_path / "1/3.bmp").rename(tmp_path / "1/30.bmp")
    assert changed(load(tmp_path, "train")) != same
    monkeypatch.setattr(sources, "MARKED", 10)
    monkeypatch.setattr(sources, "SPREAD", 5)
    sampled = changed(load(tmp_path, "all"))
    for name in list(tmp_path.rglob("*.bmp")):
        name.write_bytes(encoded(77, ".bmp"))
    assert changed(load(tmp_path, "all")) != sampled


def test_identity_leaves_out_damaged_images(tmp_path):
    files = {f"{i}.png": encoded(i) for i in range(12)}
    whole = load(as_folder(tmp_path, files))
    before = whole.marks()
    (tmp_path / "3.png").write_bytes(files["3.png"][:50])
    cut = load(tmp_path, skip_damaged=True)
    assert len(cut.damaged) == 1
    assert data.identity(before) != changed(cut)
    assert data.identity(before, cut.damaged) == changed(cut, cut.damaged)


@pytest.mark.parametrize("change", ["image", "label", "order"])
def test_identity_of_arrays(tmp_path, change):
    arrays = dict(images=RNG.integers(0, 256, (12, 8, 8), dtype=np.uint8), labels=np.arange(12))
    np.savez(tmp_path / "a.npz", **arrays)
    before = changed(load(tmp_path / "a.npz"))
    if change == "order":
        arrays = {name: array[::-1] for name, array in arrays.items()}
    else:
        arrays[f"{change}s"][3] += 1
    np.savez(tmp_path / "a.npz", **arrays)
    assert changed(load(tmp_path / "a.npz")) != before


# ------------------------------------------------------------------------------------------------ arrays

IMAGES = RNG.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(40) % 4
ARRAYS = {  # whose: (names and arrays, {split: images})
    "this": (dict(images=IMAGES, labels=LABELS), {"all": 40, "train": 36, "test": 4}),
    "samples": (dict(samples=IMAGES), {"all": 40}),
    "guided diffusion": (dict(arr_0=IMAGES), {"all": 40}),
    "guided diffusion, by class": (dict(arr_0=IMAGES, arr_1=LABELS), {"all": 40}),
    "Keras": (dict(x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:10], y_test=LABELS[:10]), {"train": 40, "test": 10}),
    "Keras, columns": (
        dict(x_train=IMAGES, y_train=LABELS[:, None], x_test=IMAGES[:9], y_test=LABELS[:9, None]),
        {"train": 40, "test": 9},
    ),
    "scikit-learn": (
        dict(X_train=IMAGES, y_train=LABELS, X_test=IMAGES[:10], y_test=LABELS[:10]), {"train": 40, "test": 10},
    ),
    "MedMNIST": (
        dict(
            train_images=IMAGES, train_labels=LABELS[:, None], val_images=IMAGES[:5], val_labels=LABELS[:5, None],
            test_images=IMAGES[:10], test_labels=LABELS[:10, None],
        ),
        {"train": 40, "validation": 5, "test": 10, "all": 55},
    ),
    "MedMNIST in gray": (dict(train_images=IMAGES[..., 0], train_labels=LABELS[:, None].astype(np.uint8)), {"all": 40}),
}  # fmt: skip


@pytest.mark.parametrize("case", ARRAYS)
@pytest.mark.parametrize("folder", [False, True], ids=["npz", "npy"])
def test_arrays_of_other_tools(tmp_path, case, folder):
    arrays, sizes = ARRAYS[case]
    if folder:
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}.npy", array)
    else:
        np.savez(tmp_path / "a.npz", **arrays)
    for split, size in sizes.items():
        images = load(tmp_path if folder else tmp_path / "a.npz", split, num_channels=3)
        assert images.size == size
        batch = everything(images)
        assert ("label" in batch) == (len(arrays) > 1)
        if split == "train" and len(sizes) > 1 and size == 40:
            np.testing.assert_array_equal(batch["image"], IMAGES)
            np.testing.assert_array_equal(batch["label"], LABELS)


def test_npy(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    np.testing.assert_array_equal(everything(load(tmp_path / "a.npy", num_channels=3))["image"], IMAGES)


def test_other_arrays_are_told(tmp_path):
    np.savez(tmp_path / "a.npz", IMAGES, LABELS, np.array([{}], object))
    assert "passed over arr_2" in load(tmp_path / "a.npz", num_channels=3).notes[0]


def test_levels_of_0_and_1_are_told(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES % 2)
    assert "save images * 255" in load(tmp_path / "a.npz", num_channels=3).notes[0]


@pytest.mark.parametrize(
    ("images", "conversion"),
    [
        (IMAGES / 255, "(images * 255).round().astype(np.uint8)"),
        (IMAGES / 127.5 - 1, "((images + 1) * 127.5).round().astype(np.uint8)"),
        (IMAGES.astype(np.float32), "images.round().astype(np.uint8)"),
        (IMAGES.astype(np.int64), "images.round().astype(np.uint8)"),
        (IMAGES.astype(np.uint16) * 257, "(images // 257).astype(np.uint8)"),
        (IMAGES > 99, "(images * 255).astype(np.uint8)"),
        (IMAGES * 10.0 - 100, "range -100..2450"),
        (IMAGES.transpose(0, 3, 1, 2), "images.transpose(0, 2, 3, 1)"),
        (IMAGES[0], "images[None]"),
    ],
)
def test_refused_arrays_name_their_conversion(tmp_path, images, conversion):
    """And done to the array, it makes it readable."""
    np.save(tmp_path / "a.npy", images)
    with pytest.raises(UserError) as refused:
        load(tmp_path / "a.npy", num_channels=3)
    assert conversion in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(np.eye(40, dtype=int), "labels.argmax"), (LABELS / 1, r"labels.astype\(int\)"), (np.ones((40, 14), int), "one")],
)
def test_refused_labels_name_their_conversion(tmp_path, labels, message):
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=labels)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.npz", num_channels=3)


# ------------------------------------------------------------------------------------------------ IDX

DIGITS = RNG.integers(0, 256, (6, 8, 8), dtype=np.uint8)
ROWS = np.stack([np.arange(6), *np.full((7, 6), 300)], axis=1).astype(">i4")
IDX = {  # whose: (name of training images, of their labels, of test images, labels)
    "MNIST": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", None),
    "MNIST by some archives": ("train-images.idx3-ubyte", "train-labels.idx1-ubyte", "t10k-images.idx3-ubyte", None),
    "MNIST, packed": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz", None),
    "EMNIST": (
        "emnist-balanced-train-images-idx3-ubyte.gz", "emnist-balanced-train-labels-idx1-ubyte.gz",
        "emnist-balanced-test-images-idx3-ubyte.gz", None,
    ),
    "QMNIST": (
        "qmnist-train-images-idx3-ubyte.gz", "qmnist-train-labels-idx2-int.gz",
        "qmnist-test-images-idx3-ubyte.gz", ROWS,
    ),
    "KMNIST": ("kmnist-train-imgs.npz", "kmnist-train-labels.npz", "kmnist-test-imgs.npz", None),
    "a folder of its own for each file": (
        "a/train-images-idx3-ubyte", "b/train-labels-idx1-ubyte", "c/t10k-images-idx3-ubyte", None,
    ),
    "labels unpacked": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", None),
}  # fmt: skip


@pytest.mark.parametrize("case", IDX)
def test_idx_by_every_name(tmp_path, case):
    train, labels, test, rows = IDX[case]
    header = b"\0\0\x0c\2" + np.array([6, 8], ">i4").tobytes()
    numbers = idx(np.arange(6, dtype=np.uint8)) if rows is None else header + rows.tobytes()
    for name, content in ((train, idx(DIGITS)), (labels, numbers), (test, idx(DIGITS[:2]))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        if name.endswith(".npz"):
            values = {train: DIGITS, labels: np.arange(6, dtype=np.uint8), test: DIGITS[:2]}
            np.savez(tmp_path / name, values[name])
    batch = everything(load(tmp_path, "train"))
    upright = DIGITS.transpose(0, 2, 1) if case == "EMNIST" else DIGITS
    np.testing.assert_array_equal(batch["image"][..., 0], upright)
    np.testing.assert_array_equal(batch["label"], np.arange(6))
    assert everything(load(tmp_path, "test")).keys() == {"image"}
    notes = " ".join(load(tmp_path, "train").notes)
    assert "no labels beside it" in notes
    assert ("transposed" in notes) == (case == "EMNIST")
    if "/" not in train:
        np.testing.assert_array_equal(everything(load(tmp_path / train))["label"], np.arange(6))


def test_several_idx_sets_in_one_folder(tmp_path):
    for name in ("digits", "letters"):
        (tmp_path / f"emnist-{name}-train-images-idx3-ubyte").write_bytes(idx(DIGITS))
    with pytest.raises(UserError, match=r"several data sets \(emnist-digits, emnist-letters\): give a folder"):
        load(tmp_path, "train")


def test_labels_that_begin_at_1_are_told(tmp_path):
    """As those of EMNIST's letters do; they stay, as elsewhere in the field."""
    (tmp_path / "emnist-letters-train-images-idx3-ubyte").write_bytes(idx(DIGITS))
    (tmp_path / "emnist-letters-train-labels-idx1-ubyte").write_bytes(idx(np.arange(1, 7, dtype=np.uint8)))
    images = load(tmp_path, "all")
    np.testing.assert_array_equal(everything(images)["label"], np.arange(1, 7))
    assert "labels are 1 to 6: no image is of class 0, and there are 7 classes" in " ".join(images.notes)


# ------------------------------------------------------------------------------------------------ CIFAR

PIXELS = RNG.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)


def python2(batch: dict) -> bytes:
    """A pickle as Python 2 wrote it, whose text and arrays are strings of bytes."""
    text = lambda value: b"U" + bytes([len(value)]) + value.encode()
    number = lambda value: b"K" + bytes([value])
    array = lambda value: (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01"
        + number(value.shape[0])
        + b"M\0\x0c\x86cnumpy\ndtype\nU\x02u1K\0K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89T"
        + value.size.to_bytes(4, "little")
        + value.tobytes()
        + b"tb"
    )
    values = {
        str: text,
        list: lambda v: b"](" + b"".join((text if isinstance(x, str) else number)(x) for x in v) + b"e",
        np.ndarray: array,
    }
    items = b"".join(text(name) + values[type(value)](value) for name, value in batch.items())
    return b"\x80\x02}(" + items + b"u."


def python3(batch: dict) -> bytes:
    return pickle.dumps(batch, 2)


def cifar_files(hundred: bool, binary: bool, dump=python2) -> dict[str, bytes]:
    """Four training images of the labels 3, 1, 2, 0, and two of them for test."""
    fine, coarse = [3, 1, 2, 0], [1, 0, 1, 0]
    names = ["cat", "dog", "eel", "fox"]
    labels = dict(fine_labels=fine, coarse_labels=coarse) if hundred else dict(labels=fine)
    if binary:
        columns = ([coarse] if hundred else []) + [fine]
        rows = np.concatenate([np.array(columns, np.uint8).T, PIXELS.reshape(4, -1)], axis=1)
        content = lambda start, stop: rows[start:stop].tobytes()
        meta = {("fine_label_names.txt" if hundred else "batches.meta.txt"): "\n".join([*names, ""]).encode()}
    else:
        content = lambda start, stop: dump(
            dict(data=PIXELS[start:stop].reshape(stop - start, -1))
            | {name: values[start:stop] for name, values in labels.items()}
        )
        meta = (
            {"meta": dump(dict(fine_label_names=names))} if hundred else {"batches.meta": dump(dict(label_names=names))}
        )
    suffix = ".bin" if binary else ""
    if hundred:
        return {f"train{suffix}": content(0, 4), f"test{suffix}": content(0, 2)} | meta
    batches = {f"data_batch_1{suffix}": content(0, 2), f"data_batch_2{suffix}": content(2, 4)}
    return batches | {f"test_batch{suffix}": content(0, 2)} | meta


@pytest.mark.parametrize("where", ["unpacked", "beside its archive", "archive"])
@pytest.mark.parametrize(
    ("hundred", "binary", "dump"),
    [(False, True, None), (True, True, None), (False, False, python2), (True, False, python2), (False, False, python3)],
)
def test_cifar_as_downloaded(tmp_path, hundred, binary, dump, where):
    name = f"cifar-10{'0' * hundred}-{'binary' if binary else 'python'}.tar.gz"
    path = tmp_path / name
    folder = "cifar-100-binary" if hundred else "cifar-10-batches"
    files = cifar_files(hundred, binary, dump)
    if where != "unpacked":
        with tarfile.open(path, "w:gz") as archive:
            for file, content in ({"readme.html": b"CIFAR"} | files).items():
                info = tarfile.TarInfo(f"{folder}/{file}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    if where != "archive":
        as_folder(tmp_path / folder, files)
        path = tmp_path if where == "beside its archive" else tmp_path / folder
    train, test = (load(path, split, image_size=32, num_channels=3) for split in ("train", "test"))
    np.testing.assert_array_equal(everything(train)["image"], PIXELS.transpose(0, 2, 3, 1))
    assert everything(train)["label"].tolist() == [3, 1, 2, 0]
    assert everything(test)["label"].tolist() == [3, 1]
    assert train.classes == ("cat", "dog", "eel", "fox")
    assert ("fine" in " ".join(train.notes)) == hundred


class Bomb:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_1.bin", b"x" * 100, "100 bytes long, expected a multiple of 3073"),
        ("data_batch_1", python3({"data": Bomb()}), "no pickle of arrays: .*posix.system"),
        ("data_batch_1", python3({"data": np.zeros(3), "labels": [1]}), "where unsigned bytes belong"),
        ("data_batch_1", python3({"labels": [1]}), "no batch of CIFAR"),
        ("data_batch_1", python3([1]), "no pickle of arrays"),
        ("data_batch_1", b"", "no pickle of arrays"),
        ("cifar-10-python.tar.gz", b"hello", "not a readable archive"),
    ],
)
def test_cifar_that_is_damaged(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(tmp_path, "train", image_size=32, num_channels=3)


@pytest.mark.parametrize("name", ["cifar-10-batches-py.tar.gz", "CIFAR-100-python.tgz", "cifar-10-binary.tar"])
def test_names_of_the_archives_of_cifar(tmp_path, name):
    """Keras calls them as the folder inside."""
    (tmp_path / name).touch()
    assert cifar.is_archive(tmp_path / name)


def test_an_archive_that_promises_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "MOST_BYTES", 1000)
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("data_batch_1.bin")
        info.size = 10**6
        archive.addfile(info, io.BytesIO(bytes(10**6)))
    with pytest.raises(UserError, match="more than 1000 bytes"):
        load(tmp_path, "train", image_size=32, num_channels=3)


# ------------------------------------------------------------------------------------------------ archives, Parquet


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:50], "not a readable zip archive"),
        (lambda content: b"", "not a readable zip archive"),
        (lambda content: content.replace(encoded(5)[20:60], bytes(40)), r"a\.zip/0\.png is (damaged|not a readable)"),
    ],
)
def test_zip_that_is_damaged(tmp_path, change, message):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("0.png", encoded(5))
    (tmp_path / "a.zip").write_bytes(change((tmp_path / "a.zip").read_bytes()))
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.zip")


def test_zip_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr("score_sde.sources.archives.MAX_ENCODED", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(10**6))
    with pytest.raises(UserError, match="promises 1000000 bytes"):
        load(tmp_path / "a.zip")


@pytest.mark.parametrize("suffix", [".tar", ".tgz", ".tar.bz2", ".tar.xz"])
def test_tar(tmp_path, suffix):
    where = as_tar(tmp_path, {"set/": None} | files_of("set/cat*3 set/dog*2 set/.x.png"), suffix)
    check(where, {"all": 5, "train": 5}, "cat dog", ["1 hidden"])


def test_tar_with_links_and_paths_upward(tmp_path):
    """They are passed over; of a file that was added twice the last counts."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind, value in (
            ("cat/0.png", tarfile.REGTYPE, 1),
            ("cat/0.png", tarfile.REGTYPE, 2),
            ("/cat/1.png", tarfile.REGTYPE, 3),
            ("../cat/2.png", tarfile.REGTYPE, 4),
            ("cat/../../3.png", tarfile.REGTYPE, 5),
            ("cat/4.png", tarfile.SYMTYPE, 0),
            ("cat/5.png", tarfile.LNKTYPE, 0),
            ("cat/6.png", tarfile.FIFOTYPE, 0),
        ):
            info, content = tarfile.TarInfo(name), encoded(value) if kind == tarfile.REGTYPE else b""
            info.type, info.size, info.linkname = kind, len(content), "/etc/passwd"
            archive.addfile(info, io.BytesIO(content))
    images = load(tmp_path / "a.tar")
    assert everything(images)["image"][:, 0, 0, 0].tolist() == [2, 3]
    assert "2 path upward" in " ".join(images.notes)
    assert "3 link" in " ".join(images.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:700], "is not a readable tar archive: unexpected end of data"),
        (lambda content: b"", "is not a readable tar archive"),
        (lambda content: content[:1024] + b"?" * 512 + content[1536:], "damaged in the middle, at byte 1024"),
        (lambda content: gzip.compress(content)[:90], "is not a readable tar archive"),
        (lambda content: content.replace(encoded(5)[20:60], bytes(40)), r"a\.tar/0\.png is not a readable image"),
    ],
)
def test_tar_that_is_damaged(tmp_path, change, message):
    as_tar(tmp_path, files_of("0.png 1.png"))
    (tmp_path / "a.tar").write_bytes(change((tmp_path / "a.tar").read_bytes()))
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.tar")


def test_tar_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_UNPACKED", 10**5)
    with pytest.raises(UserError, match="unpacks to more than 100000 bytes"):
        load(as_tar(tmp_path, {"0.png": bytes(10**6)}, ".tgz"))
    monkeypatch.setattr(archives, "MAX_ENCODED", 1000)
    with pytest.raises(UserError, match="has 2000 bytes: more than 1000 are not read"):
        load(as_tar(tmp_path, {"0.png": bytes(2000)}))


@pytest.mark.parametrize("named", [True, False])
def test_parquet_of_hugging_face(tmp_path, named):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()} if named else None
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("a card")
    for name, count in (("train-00000-of-00002", 3), ("train-00001-of-00002", 2), ("test-00000-of-00001", 2)):
        labels = [i % 2 for i in range(count)]
        rows = [{"bytes": encoded(LEVELS["dog" if label else "cat"]), "path": None} for label in labels]
        table = pyarrow.table({"image": rows, "label": labels}).replace_schema_metadata(metadata)
        parquet.write_table(table, tmp_path / "data" / f"{name}.parquet")
    check(tmp_path, {"train": 5, "test": 2}, "cat dog" if named else "", []) if named else None
    assert everything(load(tmp_path, "train"))["label"].tolist() == [0, 1, 0, 0, 1]
    (tmp_path / "data" / "test-00000-of-00001.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        load(tmp_path, "train")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="pip install pyarrow"):
        load(tmp_path, "train")


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        ("2.gif 3.gif README.md!", "all", r"holds no images .*; passed over: 2 \.gif, 1 \.md"),
        (".hidden/0.png", "all", "holds no images .*1 hidden"),
        ("train/cat*2 training/cat*2 test/cat*2", "train", "train and training, both of which mean train: rename one"),
        ("train/0.gif val/cat*3", "train", "folder train holds no images to train on"),
        ("train/ test/cat*2", "train", "folder train holds no images to train on"),
        ("train*2 test*2", "night", "no split 'night': choose one of test, train, all"),
        ("train/0.png! test*2", "train", r"train/0\.png is not a readable image"),
    ],
)
def test_folders_that_are_refused(tmp_path, files, split, message):
    with pytest.raises(UserError, match=message):
        load(as_folder(tmp_path, files_of(files)), split)


@pytest.mark.parametrize("name", ["a.csv", "a.7z", "a.rar", "photo.png"])
def test_files_that_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match="unpack other archives, and put single images into a folder"):
        load(tmp_path / name)


def test_a_name_that_is_a_folder_and_a_set(tmp_path, monkeypatch):
    """Both ways that the line offers lead on."""
    import tensorflow_datasets as tfds

    monkeypatch.chdir(tmp_path)
    as_folder(tmp_path / "mnist", files_of("cat*3"))
    as_folder(tmp_path / "digits", files_of("cat*3"))
    with pytest.raises(UserError, match=r"mnist is both .*: write \./mnist for the former, mnist:\*\.\*\.\* for the"):
        load("mnist")
    assert load("./mnist").size == 3
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", lambda self, **_: 1 / 0)
    with pytest.raises(UserError, match=r"mnist:\*\.\*\.\* could not be prepared"):
        load("mnist:*.*.*", data_dir=str(tmp_path / "tfds"))
    with pytest.raises(UserError, match=r"digits is both .*write \./digits"):
        load("digits")
    assert load("./digits").size == 3
    (tmp_path / "digits" / "config.json").write_text("{}")  # a run that is called so is no data set
    assert sources.load("digits", "train", image_size=8, num_channels=1).size == 1500


def test_class_lines():
    assert build.class_lines(("cat", "dog")) == ["classes: 0 cat, 1 dog"]
    assert build.class_lines(None) == build.class_lines(("0", "1", "2")) == []
    (line,) = build.class_lines([f"c{i}" for i in range(1000)])
    assert line.endswith("18 c18, ..., 999 c999")
