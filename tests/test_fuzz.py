"""Readers of anyone's files, fed with damaged and lying ones: they refuse in one line or succeed, and do nothing else.

Nothing in a file is executed, and no header makes a reader allocate what the file does not hold.
"""

import ast
import gzip
import io
import json
import pathlib
import pickle
import re
import struct
import sys
import tarfile
import tracemalloc
import types
import zipfile

import numpy as np
import pytest
from flax import serialization
from PIL import Image

from configs import digits
from ems import moments, statistics
from experiments import measuring, runs, samplers
from score_sde import sources
from score_sde.errors import UserError
from score_sde.foreign import read_checkpoint
from score_sde.metrics import features, resnet
from score_sde.sde import VP
from tests.test_data import idx
from tests.test_published_models import FOUR, archive, tensor_program
from tests.test_sources import python2

RNG = np.random.default_rng(0)
MUTATIONS = 100  # of each kind of file
MOST_BYTES = 2**26  # that a reader may hold beyond what it held before

# ------------------------------------------------------------------------------------------------ whole files


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def written(save, *arguments) -> bytes:
    """What save(path, ...) writes."""
    file = io.BytesIO()
    replaced = pytest.MonkeyPatch()
    with replaced.context() as patch:
        patch.setattr("score_sde.files.save_npz", lambda path, arrays, **options: np.savez(file, **arrays))
        save("unused", *arguments)
    return file.getvalue()


ORIGIN = dict(
    checkpoint="abc", step=8, sde={}, t_end=0.1, data="digits", num_data=16, images=[[0, 16]], nodes=2, seed=0,
    guidance_scale=None,
)  # fmt: skip
EMS = statistics.EMS(np.array([1.0, 0.5, 0.1]), np.array([-1.0, 0.0, 1.0]), *np.ones((3, 3, 8, 8, 1)), ORIGIN)
SAVED = moments.Saved(EMS.t, EMS.lam, moments.Moments.zeros((moments.BLOCKS, 3), (8, 8, 1)), ORIGIN)
EIGHT = RNG.integers(0, 256, (20, 8, 8), dtype=np.uint8)
OLD_TORCH = b"".join(  # as before PyTorch 1.6
    [
        *(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})),
        *(tensor_program((2, 2), (2, 1)), pickle.dumps(["a"], 2), struct.pack("<q", 4), FOUR),
    ]
)
TREE = {"Conv_0": {"kernel": np.ones((3, 3, 1, 4), np.float32), "bias": np.zeros(4, np.float32)}}
FLAX = serialization.msgpack_serialize({"params_ema": TREE, "optimizer": {"target": TREE, "state": {}}, "step": 7})
SEARCH = dict(solver="deis", steps=4, options={"order": 2, "grid": [1.0, 0.5, 0.001]}, checkpoint="abc")
CONFIG = digits.get_config().to_dict()
NETWORK = types.SimpleNamespace(name="fuzzed", dimension=4, identity=lambda: {"network": "fuzzed"})
MODEL = types.SimpleNamespace(identity="abc", num_classes=0, space=types.SimpleNamespace(shape=(8, 8, 1)))


def weights() -> bytes:
    shapes = resnet._shapes((8, 8, 1), 10)
    arrays = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
    return npz(**arrays, provenance=json.dumps(dict(image_shape=[8, 8, 1], num_classes=10)))


def published(path):
    (path.parent / "sb.npz").write_bytes(npz(s=np.ones((3, 1, 8, 8)), b=np.ones((3, 1, 8, 8))))
    statistics.load_published(path.parent, VP(), (8, 8, 1), t_end=1e-3, origin={})


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def encoded_gray(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(EIGHT[i]).save(file, "PNG")
    return file.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def manifest(path):
    (path.parent / "a.png").write_bytes(encoded_gray(0))
    images(path.parent)


CIFAR = RNG.integers(0, 256, (2, 3072), dtype=np.uint8)
cifar_images = lambda path: sources.load(str(path.parent), "all", image_size=32, num_channels=3)
images = lambda path: sources.load(str(path), "all", image_size=8, num_channels=1)
# kind of file: (its name, what a whole one holds, what reads it)
READERS = {
    "images in .npz": ("a.npz", npz(images=EIGHT, labels=np.arange(20)), images),
    "IDX": ("a-images-idx3-ubyte", idx(EIGHT), images),
    "IDX, compressed": ("a-images-idx3-ubyte.gz", gzip.compress(idx(EIGHT)), images),
    **{kind: (f"a.{kind.lower()}", encoded(kind), lambda path: sources.decode(path, "a")) for kind in sources.FORMATS},
    "images in .npy": ("a.npy", npy(EIGHT), images),
    "zip of images": ("a.zip", zipped({f"{i}.png": encoded_gray(i) for i in range(20)}), images),
    "tar of images": ("a.tar", tarred({f"{i}.png": encoded_gray(i) for i in range(20)}, "w"), images),
    "tar of images, packed": ("a.tgz", tarred({f"{i}.png": encoded_gray(i) for i in range(20)}), images),
    "table of labels": ("labels.csv", b"filename,label\na.png,1\n", manifest),
    "CIFAR, Python": ("data_batch_1", python2(dict(data=CIFAR, labels=[1, 2])), cifar_images),
    "CIFAR, archive": (
        "cifar-10-binary.tar.gz",
        tarred({"data_batch_1.bin": b"\1" + CIFAR[0].tobytes()}),
        cifar_images,
    ),
    "labels by dataset.json": (
        "dataset.json",
        json.dumps({"labels": [["a.png", 1]]}).encode(),
        manifest,
    ),
    "latents": ("a.npz", npz(latents=np.ones((4, 8, 8, 1))), lambda path: measuring.latents(MODEL, path)),
    "EMS": ("a.npz", written(statistics.save, EMS), statistics.load),
    "EMS, origin": ("a.npz", written(statistics.save, EMS), statistics.load_origin),
    "EMS, published": ("l.npz", npz(l=np.ones((3, 1, 8, 8))), published),
    "moments": (f"a{moments.SUFFIX}", written(moments.save, SAVED), moments.load),
    "statistics": (
        "a.npz",
        npz(mu=np.zeros(4), sigma=np.eye(4), n=10, features=np.ones((9, 4)), provenance=json.dumps(NETWORK.identity())),
        lambda path: features.load(path, NETWORK),
    ),
    "feature network": ("a.npz", weights(), resnet.load),
    "PyTorch": ("a.pth", archive(tensor_program((2, 2), (2, 1)), a=FOUR), read_checkpoint),
    "PyTorch, old": ("a.pth", OLD_TORCH, read_checkpoint),
    "Flax": ("checkpoint_1", FLAX, read_checkpoint),
    "search": ("a.json", json.dumps(SEARCH).encode(), lambda path: samplers.read_search(MODEL, path)),
    "config": ("config.json", json.dumps(CONFIG).encode(), lambda path: runs.read_config(path.parent)),
}

# ------------------------------------------------------------------------------------------------ damage


def damaged(content: bytes, rng) -> bytes:
    """Cut, bytes changed, put in, left out, set to the largest numbers, or moved."""
    place, length = (int(rng.integers(1, size)) for size in (len(content) + 1, min(64, len(content)) + 1))
    before, after = content[:place], content[place:]
    match rng.integers(6):
        case 0:
            return before
        case 1:
            changed = bytearray(content)
            for i in rng.integers(0, len(content), 4):
                changed[i] = rng.integers(256)
            return bytes(changed)
        case 2:
            return before + rng.bytes(length) + after
        case 3:
            return before + after[length:]
        case 4:
            return before + rng.choice([b"\xff", b"\x7f"]) * (length % 9) + after[length % 9 :]
        case _:
            return before + content[:length] + after[length:]


SHAPES = [b"(10000000000,)", b"(9999999, 999999)", b"(-1,)", b"(1e9,)", b"()", b"(2**64,)", b"(99999999999999999999,)"]
TYPES = [b"'|O'", b"'<U0'", b"'<U99999999'", b"'|V0'", b"'<c16'", b"'<M8[s]'", b"[('a', '<f8')]"]


def lying(content: bytes, rng) -> bytes:
    """The header of an .npy with another shape or type, of the same length."""
    end = 10 + int.from_bytes(content[8:10], "little")
    pattern, values = ((rb"\([\d, ]*\)", SHAPES), (rb"'[|<=>]\w+'", TYPES))[rng.integers(2)]
    header = re.sub(pattern, lambda _: rng.choice(np.array(values, object)), content[10:end].rstrip(), count=1)
    return content[:10] + header.ljust(end - 11)[: end - 11] + b"\n" + content[end:]


def within_archive(content: bytes, rng) -> bytes:
    """One member damaged, or its header lying, in an archive that is whole."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    name = rng.choice(list(members))
    change = lying if name.endswith(".npy") and rng.random() < 0.6 else damaged
    members[name] = change(members[name], rng)
    file = io.BytesIO()
    method = zipfile.ZIP_STORED if not name.endswith(".npy") or rng.random() < 0.5 else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return file.getvalue()


VALUES = [None, -1, 0, 1.5, 1e400, float("nan"), 10**30, "x", "", True, [], {}, [[1]], {"a": 1}]


def within_json(content: bytes, rng) -> bytes:
    """One value replaced, or left out, in text that is whole."""
    whole = fields = json.loads(content)
    while True:
        key = rng.choice(list(fields))
        if not (isinstance(fields[key], dict) and fields[key]) or rng.random() < 0.1:
            break
        fields = fields[key]
    value = VALUES[rng.integers(len(VALUES))]
    fields.pop(key) if rng.random() < 0.2 else fields.update({key: value})
    return json.dumps(whole).encode()


# ------------------------------------------------------------------------------------------------ the test

DEEDS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "socket.connect")
watched = []
sys.addaudithook(lambda event, _: watched.append(event) if event in DEEDS else None)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_and_lying_files(kind, tmp_path):
    name, content, read = READERS[kind]
    path = tmp_path / name
    path.write_bytes(content)
    read(path)  # whole, it is read
    within = {b"PK": within_archive, b'{"': within_json}.get(content[:2], damaged)
    changes = [(damaged, within)[i % 2] for i in range(MUTATIONS)]
    assert refusals(read, path, content, changes) > MUTATIONS / 10


def refusals(read, path, content: bytes, changes) -> int:
    """How many of these changes of a file are refused; each in one line, in bounded memory, and nothing is executed."""
    rng, refused = np.random.default_rng(0), 0
    tracemalloc.start()
    try:
        for change in changes:
            path.write_bytes(change(content, rng))
            watched.clear()
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            try:
                read(path)
            except UserError as error:
                refused += 1
                assert "\n" not in str(error)
                assert len(str(error)) < 1000
            assert tracemalloc.get_traced_memory()[1] - before < MOST_BYTES
            assert not watched
    finally:
        tracemalloc.stop()
    return refused


def test_the_watch_sees_what_it_is_for():
    """A pickle that calls, and an array of objects, would be told."""
    watched.clear()
    pickle.loads(pickle.dumps(UserError))
    assert watched == ["pickle.find_class"]


def test_a_bomb_that_is_honest_is_bounded_by_its_length(tmp_path):
    """Zeros compress a thousand times, no more; what promises more is refused before anything is made for it."""
    path = tmp_path / "a.npz"
    path.write_bytes(npz(images=np.zeros((20, 8, 8), np.uint8)))
    with zipfile.ZipFile(path) as archive:
        (member,) = archive.infolist()
    claimed = member.file_size.to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(claimed, (2**31).to_bytes(4, "little")))
    tracemalloc.start()
    with pytest.raises(UserError):
        images(path)
    assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    tracemalloc.stop()


RUNS_WHAT_IT_READS = {"pickle", "dill", "joblib", "marshal", "shelve", "subprocess", "pty", "ctypes"}
CALLS_WHAT_IT_READS = {"eval", "exec", "compile", "__import__", "system", "popen", "spawnv", "execv", "unsafe_load"}


def test_nothing_in_the_tree_could_run_what_it_reads():
    """No module but the tests imports or calls what executes data or starts programs; arrays of objects stay unread."""
    root = pathlib.Path(__file__).resolve().parents[1]
    modules = [
        path for path in root.rglob("*.py") if path.relative_to(root).parts[0][0] != "." and "tests" not in path.parts
    ]
    assert root / "train.py" in modules
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names=names):
                    assert not RUNS_WHAT_IT_READS & {name.name.split(".")[0] for name in names}, path
                case ast.ImportFrom(module=str(module)):
                    assert module.split(".")[0] not in RUNS_WHAT_IT_READS, path
                case ast.Call(func=ast.Name(id=name)):
                    assert name not in CALLS_WHAT_IT_READS, path
                case ast.Call(func=ast.Attribute(value=ast.Name(id="os" | "yaml"), attr=name)):
                    assert name not in CALLS_WHAT_IT_READS, path
                case ast.keyword(arg="allow_pickle" | "shell", value=value):
                    assert isinstance(value, ast.Constant) and value.value is False, path
