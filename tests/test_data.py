"""Data: the stream's invariants, every format, and a clear line for every bad input."""

import gzip
import io
import threading
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

from score_sde import sources
from score_sde.data import Images, Stream, permutation
from score_sde.errors import UserError
from score_sde.sources import load

RNG = np.random.default_rng(0)


def numbered(size):
    """A set whose image i has the label i."""
    return Images("numbered", size, lambda indices: {"image": np.zeros((len(indices), 1, 1, 1)), "label": indices})


def pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save_images(folder, names, size=(8, 8), mode="RGB"):
    """Random images written losslessly, as {name: array}."""
    written = {}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels(size[1], size[0], 4).squeeze()).convert(mode)
        image.save(folder / name)
        written[name] = np.asarray(image)
    return written


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
    return header + array.tobytes()


def everything(images):
    return images.take(np.arange(images.size))


# ------------------------------------------------------------------------------------------------------- the stream


@pytest.mark.parametrize(("size", "batch_size"), [(10, 10), (10, 4), (13, 5), (7, 1), (64, 48)])
@pytest.mark.parametrize("seed", [3, -1])
def test_each_epoch_is_a_new_permutation(size, batch_size, seed):
    stream = Stream(numbered(size), batch_size=batch_size, seed=seed)
    labels = np.concatenate([stream.batch(step)["label"] for step in range(4 * size // batch_size + 1)])[: 4 * size]
    epochs = labels.reshape(4, size)
    assert (np.sort(epochs, axis=1) == np.arange(size)).all()
    assert len(np.unique(epochs, axis=0)) == 4


@pytest.mark.parametrize("process_count", [1, 2, 3, 6])
def test_stream_does_not_depend_on_process_count(process_count):
    one = Stream(numbered(20), batch_size=12, seed=1)
    many = [
        Stream(numbered(20), batch_size=12, seed=1, process_index=i, process_count=process_count)
        for i in range(process_count)
    ]
    for step in (0, 1, 7, 10**6):
        joined = np.concatenate([stream.batch(step)["label"] for stream in many])
        np.testing.assert_array_equal(joined, one.batch(step)["label"])


def test_iteration_equals_random_access_and_resumes_anywhere():
    stream = Stream(numbered(11), batch_size=4, seed=5)
    for start in (0, 1, 9, 12345):
        batches = stream.batches(start)
        for expected_step in range(start, start + 5):
            step, batch = next(batches)
            assert step == expected_step
            np.testing.assert_array_equal(batch["label"], stream.batch(step)["label"])
        batches.close()


def test_seed_decides_order():
    order = lambda seed: Stream(numbered(100), batch_size=100, seed=seed).batch(0)["label"]
    np.testing.assert_array_equal(order(0), order(0))
    assert (order(0) != order(1)).mean() > 0.9


def test_permutation_is_fixed_for_ever():
    assert permutation(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(7, 2, 5).tolist() == [4, 0, 1, 3, 2]


def test_permutations_are_uniform():
    firsts = np.bincount([permutation(0, epoch, 5)[0] for epoch in range(5000)], minlength=5)
    assert (np.abs(firsts - 1000) < 150).all()  # five standard deviations


def test_closed_iterator_leaves_no_thread():
    before = threading.active_count()
    batches = Stream(numbered(10), batch_size=2, seed=0).batches()
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


def test_errors_in_the_thread_reach_the_caller():
    def broken(indices):
        raise UserError("broken image")

    with pytest.raises(UserError, match="broken image"):
        next(Stream(Images("broken", 4, broken), batch_size=2, seed=0).batches())


@pytest.mark.parametrize(
    ("batch_size", "process_count", "message"),
    [(11, 1, "exceeds the 10 images"), (9, 2, "multiple of the 2 processes"), (0, 1, "positive"), (-4, 2, "positive")],
)
def test_bad_batch_sizes(batch_size, process_count, message):
    with pytest.raises(UserError, match=message):
        Stream(numbered(10), batch_size=batch_size, seed=0, process_count=process_count)


# ---------------------------------------------------------------------------------------------------------- formats


def test_digits():
    train, test = (load("digits", split, image_size=8, num_channels=1) for split in ("train", "test"))
    assert (train.size, test.size) == (1500, 297)
    batch = everything(train)
    assert batch["image"].shape == (1500, 8, 8, 1) and batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32 and set(batch["label"]) == set(range(10))
    assert set(np.unique(batch["image"])) == {*range(0, 256, 16), 255}
    joined = np.concatenate([batch["image"], everything(test)["image"]]).reshape(1797, -1)
    from sklearn.datasets import load_digits

    expected = np.minimum(16 * load_digits().data, 255)
    np.testing.assert_array_equal(np.sort(joined, axis=0), np.sort(expected, axis=0))


def test_npz_with_splits(tmp_path):
    arrays = {
        "train_images": pixels(6, 4, 4, 3),
        "train_labels": np.arange(6, dtype=np.uint8),
        "test_images": pixels(2, 4, 4, 3),
        "test_labels": np.arange(2),
    }
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    for split in ("train", "test"):
        batch = everything(load(str(tmp_path / "a.npz"), split, image_size=4, num_channels=3))
        np.testing.assert_array_equal(batch["image"], arrays[f"{split}_images"])
        np.testing.assert_array_equal(batch["label"], arrays[f"{split}_labels"])
        assert batch["label"].dtype == np.int32


@pytest.mark.parametrize("key", ["images", "train_images"])
def test_undivided_set_gives_its_last_tenth_to_test(tmp_path, key):
    images = np.arange(50, dtype=np.uint8).reshape(50, 1, 1)
    np.savez(tmp_path / "a.npz", **{key: images})
    sets = {split: load(str(tmp_path / "a.npz"), split, image_size=1, num_channels=1) for split in ("train", "test")}
    assert (sets["train"].size, sets["test"].size) == (45, 5)
    assert "label" not in everything(sets["test"])
    values = [everything(sets[split])["image"].ravel() for split in ("train", "test")]
    np.testing.assert_array_equal(np.concatenate(values), permutation(0, 0, 50))
    whole = everything(load(str(tmp_path / "a.npz"), "all", image_size=1, num_channels=1))
    np.testing.assert_array_equal(whole["image"].ravel(), np.arange(50))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(tmp_path, suffix):
    write = (
        (lambda path, data: path.write_bytes(gzip.compress(data))) if suffix else (lambda p, data: p.write_bytes(data))
    )
    images = {"train": pixels(5, 4, 4), "t10k": pixels(3, 4, 4)}
    for name, array in images.items():
        write(tmp_path / f"{name}-images-idx3-ubyte{suffix}", idx(array))
        write(tmp_path / f"{name}-labels-idx1-ubyte{suffix}", idx(np.arange(len(array), dtype=np.uint8)))
    for split, name in (("train", "train"), ("test", "t10k")):
        batch = everything(load(str(tmp_path), split, image_size=4, num_channels=1))
        np.testing.assert_array_equal(batch["image"][..., 0], images[name])
        np.testing.assert_array_equal(batch["label"], np.arange(len(images[name])))
    one_file = load(str(tmp_path / f"t10k-images-idx3-ubyte{suffix}"), "all", image_size=4, num_channels=1)
    np.testing.assert_array_equal(everything(one_file)["image"][..., 0], images["t10k"])


def test_folder_with_classes(tmp_path):
    names = ["dog/b.png", "cat/deep/a.PNG", "cat/c.bmp"]
    written = save_images(tmp_path, names)
    (tmp_path / "notes.txt").write_text("not an image")
    batch = everything(load(str(tmp_path), "all", image_size=8, num_channels=3))
    np.testing.assert_array_equal(batch["label"], [0, 0, 1])
    np.testing.assert_array_equal(batch["image"], [written[name] for name in sorted(names)])


def test_flat_folder_has_no_labels(tmp_path):
    written = save_images(tmp_path, ["b.png", "a.png", "sub/c.png"])
    batch = everything(load(str(tmp_path), "all", image_size=8, num_channels=3))
    assert batch.keys() == {"image"}
    np.testing.assert_array_equal(batch["image"], [written[name] for name in ("a.png", "b.png", "sub/c.png")])


def test_folder_with_splits(tmp_path):
    written = save_images(tmp_path, ["train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png"])
    batch = everything(load(str(tmp_path), "test", image_size=8, num_channels=3))
    np.testing.assert_array_equal(batch["image"], [written["val/a/3.png"], written["val/b/4.png"]])
    np.testing.assert_array_equal(batch["label"], [0, 1])


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp", "bmp", "png"])
def test_encodings(tmp_path, suffix):
    Image.new("RGB", (8, 8), (200, 100, 50)).save(tmp_path / f"a.{suffix}")
    image = everything(load(str(tmp_path), "all", image_size=8, num_channels=3))["image"]
    assert np.abs(image.astype(int) - [200, 100, 50]).max() <= 4


@pytest.mark.parametrize("limit", [2**30, 0], ids=["in memory", "decoded batch by batch"])
def test_large_sets_are_read_as_small_ones(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(sources, "MEMORY_BYTES", limit)
    written = save_images(tmp_path, [f"{i % 2}/{i}.png" for i in range(10)])
    images = load(str(tmp_path), "all", image_size=8, num_channels=3)
    order = sorted(written)
    batch = Stream(images, batch_size=10, seed=0).batch(3)
    for place, i in enumerate(permutation(0, 3, 10)):
        np.testing.assert_array_equal(batch["image"][place], written[order[i]])
        assert batch["label"][place] == int(order[i][0])


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A small set prepared as array_record, without TensorFlow: 20 training and 7 validation images of value i."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")

    class TinyToy(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self):
            label = tfds.features.ClassLabel(num_classes=3)
            features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": label}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(0, 20), "validation": self._generate_examples(20, 27)}

        def _generate_examples(self, start, stop):
            for i in range(start, stop):
                yield i, {"image": Image.new("RGB", (6, 6), (i, i, i)), "label": i % 3}

    return str(folder)


def test_tfds(tfds_dir):
    train, test = (
        load("tiny_toy", split, image_size=6, num_channels=3, data_dir=tfds_dir) for split in ("train", "test")
    )
    assert (train.size, test.size) == (20, 7)
    for images, expected in ((train, range(20)), (test, range(20, 27))):
        batch = everything(images)
        values = batch["image"][:, 0, 0, 0]
        assert sorted(values) == list(expected)
        np.testing.assert_array_equal(batch["label"], values % 3)
    with pytest.raises(UserError, match="no split 'night': choose one of train, validation"):
        load("tiny_toy", "night", image_size=6, num_channels=3, data_dir=tfds_dir)
    with pytest.raises(UserError, match=r"tiny_toy \(train\), image 0 is 6x6, but image_size is 8"):
        load("tiny_toy", "train", image_size=8, num_channels=3, data_dir=tfds_dir)


def test_tfds_that_cannot_be_prepared_says_what_to_do(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def fail(self, **options):
        raise ModuleNotFoundError("No module named 'tensorflow'\n")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(UserError) as caught:
        load("cifar10", "train", image_size=32, num_channels=3, data_dir=str(tmp_path))
    assert "pip install tensorflow-cpu" in str(caught.value) and "\n" not in str(caught.value)
    assert f"tfds build cifar10 --file_format=array_record --data_dir={tmp_path}" in str(caught.value)


# ----------------------------------------------------------------------------------------------------- resize rules


def fitted(image, image_size, num_channels=3, resize="none", crop=None):
    return sources.fit(image, "image", image_size, num_channels, resize, crop)


def test_central_crop_and_padding():
    image = np.arange(20, dtype=np.uint8).reshape(4, 5, 1)
    np.testing.assert_array_equal(fitted(image, 2, 1, crop=2)[..., 0], [[6, 7], [11, 12]])
    padded = fitted(image, 7, 1, "pad")[..., 0]
    np.testing.assert_array_equal(padded[1:5, 1:6], image[..., 0])
    assert padded.sum() == image.sum()


def test_crop_resize_takes_the_central_square_first():
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 2:6] = 90  # just the central square
    np.testing.assert_array_equal(fitted(image, 2, resize="crop_resize"), np.full((2, 2, 3), 90))


def test_resize_crop_resizes_the_whole_first():
    """Halving with an antialiased triangle filter: weights 1, 3, 3, 1 over 8, and what falls outside is left out."""
    row = np.array([0, 0, 0, 0, 80, 80, 80, 80], np.uint8)
    image = np.repeat(np.broadcast_to(row[None, :, None], (4, 8, 1)), 3, axis=2)
    halved = [0, 80 / 8, 80 * 7 / 8, 80]
    np.testing.assert_array_equal(fitted(image, 2, resize="resize_crop")[0, :, 0], halved[1:3])


def test_published_celeb_a_rule_agrees_with_jax():
    image = pixels(218, 178, 3)
    square = image[39:179, 19:159].astype(np.float32)
    expected = np.asarray(jax.image.resize(square, (64, 64, 3), "bilinear", antialias=True))
    assert np.abs(fitted(image, 64, resize="resize_crop", crop=140) - expected).max() < 1.01  # 8-bit passes


def test_published_lsun_rule_agrees_with_jax():
    image = pixels(100, 160, 3)
    expected = np.asarray(jax.image.resize(image[:, 30:130].astype(np.float32), (32, 32, 3), "cubic", antialias=True))
    assert np.abs(fitted(image, 32, resize="crop_resize") - np.clip(expected, 0, 255)).max() < 1.01


def test_channels():
    gray, color = pixels(4, 4, 1), pixels(4, 4, 3)
    np.testing.assert_array_equal(fitted(gray, 4, 3), np.repeat(gray, 3, axis=2))
    np.testing.assert_allclose(fitted(color, 4, 1)[..., 0], color @ [0.299, 0.587, 0.114], atol=0.51)
    np.testing.assert_array_equal(fitted(np.concatenate([color, pixels(4, 4, 1)], 2), 4, 3), color)


def test_arrays_are_resized_too(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(10, 28, 28), labels=np.arange(10))
    batch = everything(load(str(tmp_path / "a.npz"), "all", image_size=32, num_channels=3, resize="pad"))
    assert batch["image"].shape == (10, 32, 32, 3) and not batch["image"][:, :2].any()
    np.testing.assert_array_equal(batch["label"], np.arange(10))


# -------------------------------------------------------------------------------------------------------- bad input


def npz(**arrays):
    return lambda folder: np.savez(folder / "a.npz", **arrays)


def truncated_npz(folder):
    buffer = io.BytesIO()
    np.savez(buffer, images=pixels(50, 4, 4, 3))
    (folder / "a.npz").write_bytes(buffer.getvalue()[:500])


def lying_npz(folder):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**14, 4, 4, 3)})
    with zipfile.ZipFile(folder / "a.npz", "w") as file:
        file.writestr("images.npy", header.getvalue() + bytes(100))


def raw(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def images(*names, **options):
    return lambda folder: save_images(folder, names, **options)


def corrupt_image(folder):
    save_images(folder, ["a.png", "b.png"])
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:80])


def bomb(folder):
    Image.new("1", (9000, 9000)).save(folder / "bomb.png")


def mixed_sizes(folder):
    save_images(folder, ["a.png"])
    save_images(folder, ["b.png"], size=(9, 8))


IDX_IMAGES = idx(np.zeros((2, 8, 8), np.uint8))
FOUR = pixels(4, 8, 8, 3)
BAD = {
    # name: (what to write, the data set's path in that folder, what the message must say)
    "missing npz": (None, "none.npz", "no such file"),
    "missing folder": (None, "none/", "no such file"),
    "file of another kind": (raw("a.csv", b"1,2"), "a.csv", "expected a folder, an .npz"),
    "npz without images": (npz(x=FOUR), "a.npz", "neither `images` nor `train_images`"),
    "float images": (npz(images=FOUR / 255), "a.npz", "images are float64, expected uint8"),
    "NCHW images": (npz(images=FOUR.transpose(0, 3, 1, 2)), "a.npz", r"shape \(4, 3, 8, 8\), expected \(N, H, W\)"),
    "rank 2": (npz(images=FOUR.reshape(4, -1)), "a.npz", r"shape \(4, 192\), expected"),
    "rank 5": (npz(images=FOUR[None]), "a.npz", r"shape \(1, 4, 8, 8, 3\), expected"),
    "empty images": (npz(images=FOUR[:0]), "a.npz", "holds no images"),
    "zero width": (npz(images=FOUR[:, :, :0]), "a.npz", r"shape \(4, 8, 0, 3\), expected"),
    "few labels": (npz(images=FOUR, labels=np.arange(3)), "a.npz", r"labels are int64 \(3,\), expected one integer"),
    "one-hot labels": (npz(images=FOUR, labels=np.eye(4, dtype=int)), "a.npz", r"\(4, 4\), expected one integer"),
    "float labels": (npz(images=FOUR, labels=np.ones(4)), "a.npz", "labels are float64"),
    "negative labels": (npz(images=FOUR, labels=np.arange(4) - 1), "a.npz", r"labels span -1..2"),
    "huge labels": (npz(images=FOUR, labels=np.full(4, 2**40)), "a.npz", "labels span"),
    "pickled npz": (
        npz(images=np.array([{}, 1], object)),
        "a.npz",
        "not a readable .npz of plain arrays: .*allow_pickle",
    ),
    "truncated npz": (truncated_npz, "a.npz", "not a readable .npz"),
    "lying npz header": (lying_npz, "a.npz", "not a readable .npz"),
    "npz that is not a zip": (raw("a.npz", b"hello" * 100), "a.npz", "not a readable .npz"),
    "empty npz": (raw("a.npz", b""), "a.npz", "not a readable .npz"),
    "npz of another size": (npz(images=FOUR[:, :5]), "a.npz", "image 0 is 8x5, but image_size is 8: set resize"),
    "idx magic": (raw("t-images-idx3-ubyte", b"\0\0\x0d\3" + IDX_IMAGES[4:]), "t-images-idx3-ubyte", "not an IDX file"),
    "idx empty": (raw("t-images-idx3-ubyte", b""), "t-images-idx3-ubyte", "not (an|a readable) IDX file"),
    "idx truncated": (raw("t-images-idx3-ubyte", IDX_IMAGES[:-1]), "t-images-idx3-ubyte", "promises 128 bytes"),
    "idx too long": (raw("t-images-idx3-ubyte", IDX_IMAGES + b"1"), "t-images-idx3-ubyte", "promises 128 bytes"),
    "idx lying": (raw("t-images-idx3-ubyte", b"\0\0\x08\3" + b"\x7f\0\0\0" * 3), "t-images-idx3-ubyte", "promises"),
    "idx negative": (
        raw("t-images-idx3-ubyte", b"\0\0\x08\3" + b"\xff" * 12),
        "t-images-idx3-ubyte",
        "not an IDX file",
    ),
    "idx gz lying": (
        raw("t-images-idx3-ubyte.gz", gzip.compress(b"\0\0\x08\3" + b"\x7f\0\0\0" * 3)),
        "t-images-idx3-ubyte.gz",
        "promises",
    ),
    "idx gz bomb": (raw("t-images-idx3-ubyte.gz", gzip.compress(IDX_IMAGES + bytes(10**7))), "", "promises 128 bytes"),
    "idx gz truncated": (raw("t-images-idx3-ubyte.gz", gzip.compress(IDX_IMAGES)[:-12]), "", "not a readable IDX file"),
    "idx not gz": (raw("t-images-idx3-ubyte.gz", IDX_IMAGES), "", "not a readable IDX file"),
    "empty folder": (None, "", "holds no images"),
    "corrupt image": (corrupt_image, "", r"b\.png is not a readable image"),
    "text named png": (raw("a.png", b"hello"), "", r"a\.png is not a readable image"),
    "image bomb": (bomb, "", r"bomb\.png is 9000x9000: more than"),
    "16-bit gray": (lambda f: Image.new("I;16", (8, 8)).save(f / "a.png"), "", "more than 8 bits a channel"),
    "mixed sizes": (mixed_sizes, "", r"b\.png is 9x8, but image_size is 8: set resize to crop_resize"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("error")
def test_bad_input_gives_one_line(tmp_path, case):
    write, path, message = BAD[case]
    if write:
        write(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load(f"{tmp_path}/{path}", "all", image_size=8, num_channels=3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "split", "options", "message"),
    [
        ("cifar11", "train", {}, "unknown data set 'cifar11': did you mean cifar10"),
        ("zzzzzzz", "train", {}, "give digits, a tensorflow-datasets name or a path"),
        ("two words", "train", {}, "unknown data set"),
        ("", "train", {}, "unknown data set"),
        ("lsun/bathtub", "train", {}, "cannot open lsun/bathtub: .*bathtub not found"),
        ("digits", "dev", {}, "no split 'dev': choose one of train, test"),
        ("digits", "train", {"resize": "stretch"}, "unknown resize rule 'stretch'"),
        ("digits", "train", {"num_channels": 2}, "num_channels is 2"),
        ("digits", "train", {"crop": 9}, "too small for crop 9"),
        ("digits", "train", {"image_size": 4, "resize": "pad"}, "8x8, but image_size is 4: set resize to crop_resize"),
        ("digits", "train", {"image_size": 0, "resize": "crop_resize"}, "image_size is 0"),
        ("digits", "train", {"crop": -8}, "crop is -8"),
    ],
)
def test_bad_requests_give_one_line(dataset, split, options, message):
    with pytest.raises(UserError, match=message) as caught:
        load(dataset, split, **({"image_size": 8, "num_channels": 1} | options))
    assert "\n" not in str(caught.value)
