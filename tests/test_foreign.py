"""Checkpoints as people have them: whatever wraps the names, whatever type numbers have, whatever stands beside them.

Files are written by stand-ins for PyTorch's tensors, which pickle as those do; PyTorch itself is not needed.
"""

import argparse
import collections
import datetime
import io
import pathlib
import pickle
import struct
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import serialization

from score_sde.errors import UserError
from score_sde.foreign import read_checkpoint
from score_sde.models import names
from score_sde.models.published import from_torch
from tests import reference

# The network whose parameters the files hold: what it calls them, and their averages.
AVERAGE = {
    "all_modules.0.W": np.float32([3, 4]),
    "all_modules.1.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
    "all_modules.1.bias": np.float32([1, 2, 3, 4]),
    "end.weight": np.arange(4, dtype=np.float32).reshape(2, 2),
}
MODEL = {name: array + (name != "all_modules.0.W") for name, array in AVERAGE.items()}  # no average of frequencies
SHADOW = [array for name, array in AVERAGE.items() if name != "all_modules.0.W"]
PATHS = {"Fourier/W": "all_modules.0.W", "Dense_0/kernel": "all_modules.1.weight"}
PATHS |= {"Dense_0/bias": "all_modules.1.bias", "end/kernel": "end.weight"}
SHAPES = {"Fourier/W": (2,), "Dense_0/kernel": (3, 4), "Dense_0/bias": (4,), "end/kernel": (2, 2)}


def parameters(found) -> dict[str, np.ndarray]:
    """What the network makes of a file: its averages, or what else there is."""
    state = found.model if found.ema is None else found.ema
    tree = names.parameters(names.unwrapped(state, PATHS.values()), PATHS, SHAPES, dtype="float32")
    return {path: tree[path.split("/")[0]][path.split("/")[1]] for path in PATHS}


def as_ours(state: dict) -> dict[str, np.ndarray]:
    return {path: np.float32(state[name]).T for path, name in PATHS.items()}


# ------------------------------------------------------------------------------------------------ PyTorch's format

STORAGES = dict(float16="Half", float32="Float", float64="Double", bfloat16="BFloat16", int64="Long", bool="Bool")


class Storage:
    def __init__(self, array: np.ndarray):
        self.array = array


class Tensor:
    """A view of a storage, which pickles as PyTorch's does."""

    def __init__(self, array, storage=None, offset: int = 0, *, is_parameter: bool = False):
        self.array = np.asarray(array)
        self.storage, self.offset, self.is_parameter = storage, offset, is_parameter
        if storage is None:
            contiguous = self.array.flags.c_contiguous or self.array.ndim < 2
            self.storage = Storage(self.array.copy() if contiguous else np.array(self.array.T, order="C"))

    def __reduce__(self):
        torch, steps = sys.modules["torch._utils"], [n // self.array.itemsize for n in self.array.strides]
        whole = (self.storage, self.offset, self.array.shape, tuple(steps), False, collections.OrderedDict())
        if self.is_parameter:
            return torch._rebuild_parameter, (Tensor(self.array), True, collections.OrderedDict())
        return torch._rebuild_tensor_v2, whole


def fake_torch(monkeypatch):
    """Modules that a pickle of PyTorch names; all they do is to be named."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        kind = type(f"{name}Storage", (), {"__module__": "torch"})
        setattr(torch, kind.__name__, kind)
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        function = types.FunctionType((lambda *arguments: None).__code__, {}, name)
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(utils, name, function)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)


def torch_file(saved, *, legacy: bool = False, protocol: int = 2) -> bytes:
    """The file that torch.save writes, now or before PyTorch 1.6. Under `fake_torch`."""
    storages, program = {}, io.BytesIO()
    pickler = pickle.Pickler(program, protocol)

    def persistent_id(value):
        if not isinstance(value, Storage):
            return None
        key = str(list(storages).index(id(value))) if id(value) in storages else str(len(storages))
        storages.setdefault(id(value), value)
        kind = getattr(sys.modules["torch"], f"{STORAGES[value.array.dtype.name]}Storage")
        number = (value.array.size,) if not legacy else (value.array.size, None)
        return "storage", kind, key, "cuda:0", *number

    pickler = type("Pickler", (pickle.Pickler,), {"persistent_id": lambda self, value: persistent_id(value)})
    pickler(program, protocol).dump(saved)
    arrays = [storage.array for storage in storages.values()]
    if legacy:
        start = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
        parts = [*(pickle.dumps(part, 2) for part in start), program.getvalue()]
        parts += [pickle.dumps([str(i) for i in range(len(arrays))], 2)]
        parts += [struct.pack("<q", array.size) + array.tobytes() for array in arrays]
        return b"".join(parts)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as members:
        members.writestr("archive/data.pkl", program.getvalue())
        for i, array in enumerate(arrays):
            members.writestr(f"archive/data/{i}", array.tobytes())
    return file.getvalue()


def tensors(state: dict, prefix: str = "", dtype="float32") -> dict:
    return collections.OrderedDict((prefix + name, Tensor(array.astype(dtype))) for name, array in state.items())


def views() -> dict:
    flat, at, state = Storage(np.concatenate([array.ravel() for array in AVERAGE.values()])), 0, {}
    for name, array in AVERAGE.items():
        state[name], at = Tensor(array, flat, at), at + array.size
    return state


class Averager:
    """Averages as an object of somebody's class."""

    def __init__(self):
        self.decay, self.shadow_params, self.collected_params = 0.999, [Tensor(array) for array in SHADOW], []


class Module:
    """A whole network as an object: what torch.nn.Module keeps in attributes."""

    def __init__(self, state: dict):
        self._parameters, self._buffers, self._modules = collections.OrderedDict(), {}, {}
        for name, array in state.items():
            first, _, rest = name.partition(".")
            if rest:
                inside = {n.partition(".")[2]: a for n, a in state.items() if n.startswith(f"{first}.")}
                self._modules[first] = Module(inside)
            else:
                self._parameters[name] = Tensor(array, is_parameter=True)


MOMENT = {"step": Tensor(np.float32(9)), "exp_avg": Tensor(MODEL["end.weight"])}
OPTIMIZER = {"state": {0: MOMENT}, "param_groups": [{}]}
UNDOTTED = {f"model_ema.{('diffusion_model.' + name).replace('.', '')}": array for name, array in AVERAGE.items()}
OFFICIAL = dict(model=tensors(MODEL), ema=dict(decay=0.9, num_updates=70, shadow_params=[*map(Tensor, SHADOW)]), step=7)
BESIDE = dict(  # objects beside the weights
    args=argparse.Namespace(lr=1e-3),
    best=np.float64(3.2),
    when=datetime.datetime(2024, 1, 1),
    where=pathlib.PurePosixPath("/data"),
    seen={1, 2},
    counts=collections.Counter("aab"),
    default=collections.defaultdict(list, a=[1]),
    number=1j,
    noise=np.zeros(3),
    keys={(1, 2): 3, None: 4},
)
# what is saved: (it, the step that it tells)
STATES = {
    "bare": (tensors(AVERAGE), None),
    "of the official code": (OFFICIAL, 7),
    "compiled": (OFFICIAL | dict(model=tensors(MODEL, "_orig_mod.")), 7),
    "parallel and compiled": (OFFICIAL | dict(model=tensors(MODEL, "module._orig_mod.")), 7),
    "Lightning": (dict(state_dict=tensors(AVERAGE, "model."), global_step=7, loops={}, callbacks={}), 7),
    "any word before names": (tensors(AVERAGE, "denoise_fn.net."), None),
    "averages as a state_dict": (dict(model=tensors(MODEL), ema=tensors(AVERAGE), step=7), 7),
    "averages as a list": (dict(model=tensors(MODEL, "module."), ema=[*map(Tensor, SHADOW)], step=7), 7),
    "averages in an object": (dict(model=tensors(MODEL), ema=Averager(), step=7), 7),
    "averages of averages": (
        dict(
            model=tensors(MODEL, "model."),
            ema=tensors(MODEL, "online_model.model.") | tensors(AVERAGE, "ema_model.model."),
            opt=OPTIMIZER,
            step=7,
        ),
        7,
    ),
    "model_ema": (dict(model=tensors(MODEL), model_ema=tensors(AVERAGE, "module."), iteration=7), 7),
    "params_ema": (dict(params=tensors(MODEL), params_ema=tensors(AVERAGE)), None),
    "averages without dots": (
        dict(state_dict=tensors(MODEL, "model.diffusion_model.") | tensors(UNDOTTED), global_step=7),
        7,
    ),
    "averaged weights": ({"n_averaged": Tensor(np.int64(5))} | tensors(AVERAGE, "module."), None),
    "the optimizer first": (dict(optimizer=OPTIMIZER, net=tensors(AVERAGE), step=Tensor(np.int64(7))), 7),
    "a step of NumPy": (dict(state_dict=tensors(AVERAGE), step=np.int64(7)), 7),
    "deep inside": ({"checkpoint": [{"generator": tensors(AVERAGE)}], "meta": {"iters": 7}}, 7),
    "beside another network": (tensors(AVERAGE, "net.") | {f"loss.{i}.w": Tensor(np.ones(2)) for i in range(20)}, None),
    "a buffer": (OFFICIAL | dict(model={"sigmas": Tensor(np.ones(9, np.float32))} | tensors(MODEL)), 7),
    "float16": (tensors(AVERAGE, dtype="float16"), None),
    "float64": (tensors(AVERAGE, dtype="float64"), None),
    "bfloat16": (tensors(AVERAGE, dtype=ml_dtypes.bfloat16), None),
    "views of one buffer": (views(), None),
    "parameters": ({name: Tensor(array, is_parameter=True) for name, array in AVERAGE.items()}, None),
    "not contiguous": ({name: Tensor(np.asfortranarray(array)) for name, array in AVERAGE.items()}, None),
    "a whole network": (Module(AVERAGE), None),
    "two whole networks": (dict(model=Module(MODEL), ema=Module(AVERAGE), step=7), 7),
    "objects beside": (OFFICIAL | BESIDE, 7),
}


@pytest.mark.parametrize("how", ["now", "legacy", "protocol 4"])
@pytest.mark.parametrize("name", STATES)
def test_pytorch_files_give_the_averages(name, how, tmp_path, monkeypatch):
    saved, step = STATES[name]
    fake_torch(monkeypatch)
    path = tmp_path / "a.pth"
    path.write_bytes(torch_file(saved, legacy=how == "legacy", protocol=4 if how == "protocol 4" else 2))
    found = read_checkpoint(path)
    assert found.step == step
    expected = as_ours(AVERAGE | ({"sigmas": None} if name == "a buffer" else {}))
    state = {key: array for key, array in (found.ema or found.model).items() if key != "sigmas"}
    for key, array in parameters(found._replace(model=state, ema=None)).items():
        assert np.array_equal(array, expected[key]), key
        assert array.dtype == np.float32


def test_objects_beside_the_weights_are_named_and_never_called(tmp_path, monkeypatch):
    fake_torch(monkeypatch)
    path, called = tmp_path / "a.pth", tmp_path / "called"

    class Evil:
        def __reduce__(self):
            return pathlib.Path.touch, (called,)

    path.write_bytes(torch_file(OFFICIAL | BESIDE | dict(evil=Evil(), averager=Averager())))
    found = read_checkpoint(path)
    assert not called.exists()
    told = ("argparse.Namespace", "datetime.datetime", "PurePosixPath", "getattr", "Averager", "set", "_reconstruct")
    for name in told:
        assert any(name in skipped for skipped in found.skipped), name


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ({}, "holds no tensors"),
        (dict(args=argparse.Namespace()), "no tensors, but objects of argparse.Namespace"),
        (dict(optimizer=OPTIMIZER), "holds no tensors"),
        (dict(model=tensors(MODEL), ema=[Tensor(SHADOW[0])]), "averages of 1 parameters, but 3 trainable"),
        (dict(model=tensors(MODEL), ema=[Tensor(SHADOW[0].T), *map(Tensor, SHADOW[1:])]), "has shape"),
        (dict(encoder=tensors(AVERAGE, "layer.")) | dict(x=tensors(MODEL)), "twice, as encoder.layer. and as x."),
        (dict(encoder=Tensor(np.ones(3)), w=Tensor(np.ones(2))), r"2 entries, encoder \(3,\), w \(2,\)"),
        (tensors(AVERAGE) | {"extra": Tensor(np.ones(3))}, "no place for 1 entries, such as extra"),
        (tensors(AVERAGE, dtype="int64"), "type int64"),
    ],
)
def test_what_fits_nothing_is_refused_by_what_it_holds(saved, told, tmp_path, monkeypatch):
    fake_torch(monkeypatch)
    (tmp_path / "a.pth").write_bytes(torch_file(saved))
    with pytest.raises(UserError, match=told) as refusal:
        parameters(read_checkpoint(tmp_path / "a.pth"))
    assert "\n" not in str(refusal.value)


# ------------------------------------------------------------------------------------------------ JAX's formats


def nested(state: dict) -> dict:
    tree = {}
    for path, array in as_ours(state).items():
        layer, leaf = path.split("/")
        tree.setdefault(layer, {})[leaf] = array
    return tree


MOMENTS = {"0": {"count": np.int32(9), "mu": nested(MODEL), "nu": nested(MODEL)}, "1": {}}
TREES = {
    "bare": (nested(AVERAGE), None),
    "variables": ({"params": nested(AVERAGE)}, None),
    "TrainState": ({"step": 7, "params": {"params": nested(AVERAGE)}, "opt_state": MOMENTS}, 7),
    "with averages": ({"step": np.int32(7), "params": nested(MODEL), "ema_params": nested(AVERAGE)}, 7),
    "of the official code": (
        {"step": 7, "optimizer": {"target": nested(MODEL), "state": MOMENTS}, "params_ema": nested(AVERAGE)},
        7,
    ),
}


def flax_parameters(found) -> dict:
    tree = found.model if found.ema is None else found.ema
    flat = {"/".join(way): leaf for way, leaf in names.traverse_util.flatten_dict(tree).items()}
    return names.unwrapped(flat, PATHS, "/")


@pytest.mark.parametrize("name", TREES)
def test_flax_files_and_orbax_folders_give_the_averages(name, tmp_path):
    tree, step = TREES[name]
    (tmp_path / "checkpoint_7").write_bytes(serialization.msgpack_serialize(tree))
    half = serialization.msgpack_serialize(nested({n: a.astype(ml_dtypes.bfloat16) for n, a in AVERAGE.items()}))
    (tmp_path / "half").write_bytes(half)
    ocp.PyTreeCheckpointer().save(tmp_path / "orbax", tree)
    for path, told in ((tmp_path / "checkpoint_7", step), (tmp_path / "half", None), (tmp_path / "orbax", step)):
        found = read_checkpoint(path)
        assert (found.kind, found.step) == ("flax", told)
        for key, array in as_ours(AVERAGE).items():
            assert np.array_equal(np.float32(flax_parameters(found)[key]), array), key


def test_the_last_step_of_a_folder_of_orbax_is_taken(tmp_path, monkeypatch):
    for step, state in ((9, MODEL), (10, AVERAGE)):
        ocp.PyTreeCheckpointer().save(tmp_path / str(step) / "default", {"params": nested(state)})
    monkeypatch.chdir(tmp_path.parent)
    for folder in (tmp_path, tmp_path.name):
        found = read_checkpoint(folder)
        assert found.step == 10
        assert np.array_equal(flax_parameters(found)["end/kernel"], AVERAGE["end.weight"].T)
    for file in (tmp_path / "10").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:5])
    for folder in (tmp_path, tmp_path / "10" / "default", tmp_path / "9" / "default" / "d"):
        with pytest.raises(UserError, match="Orbax"):
            read_checkpoint(folder)


def test_a_checkpoint_of_this_code_needs_no_import(tmp_path):
    for item in ("state", "ema", "meta"):
        ocp.PyTreeCheckpointer().save(tmp_path / "run" / "checkpoints" / "8" / item, {"params": nested(MODEL)})
    with pytest.raises(UserError, match=rf"--workdir={tmp_path / 'run'} opens it"):
        read_checkpoint(tmp_path / "run" / "checkpoints")


def test_safetensors_and_npz(tmp_path):
    average = {f"module.{name}": array for name, array in AVERAGE.items()}
    both = {f"model.{name}": array for name, array in MODEL.items()} | {f"ema.{n}": a for n, a in AVERAGE.items()}
    safetensors.numpy.save_file(both, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **average)
    np.savez(tmp_path / "paths.npz", **as_ours(AVERAGE))
    for file in ("a.safetensors", "a.npz"):
        for key, array in parameters(read_checkpoint(tmp_path / file)).items():
            assert np.array_equal(array, as_ours(AVERAGE)[key]), key
    found = read_checkpoint(tmp_path / "paths.npz")
    assert found.kind == "flax"
    assert flax_parameters(found).keys() == SHAPES.keys()


def test_names_of_a_file_are_told_where_a_network_is_another(tmp_path):
    """As `from_torch` says it, with a network of the package."""
    from tests.test_published_models import TINY

    state = {"encoder.weight": reference.normal("w", (3, 3))}
    with pytest.raises(UserError, match=r"has no all_modules.* it holds 1 entries, encoder.weight \(3, 3\)"):
        from_torch(state, TINY["ddpm"], (8, 8, 1))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "is HDF5, as Keras writes it"),
        (b'{"weight_map": {"a": "model-00001.safetensors"}}', "is text in JSON"),
    ],
)
def test_what_lies_in_the_place_of_a_checkpoint(tmp_path, content, words):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_checkpoint(tmp_path / "model.pt")
