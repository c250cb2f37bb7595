"""Reads checkpoint files of published code, PyTorch's and JAX's, without running anything that they contain.

A PyTorch file is a zip archive (before PyTorch 1.6 a plain sequence) of raw arrays and of a pickle, a program that
builds the objects around them. Python's own unpickler calls whatever functions the program names; the interpreter here
calls none. It knows the two that checkpoints need, as data, and fails at the first other one. The archive's members may
not be compressed, and no array is larger than the bytes that the file holds for it, so memory is in proportion to the
file's size.

EDM's file is one pickle of the network itself, with the text of its program. The same interpreter reads it; of objects
it takes the attributes, and the text stays text.

A JAX file is msgpack and a .safetensors file is JSON and arrays, which have no programs; limits are set here, and by
the library, for the same reason.
"""

import io
import math
import mmap
import os
import pathlib
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgpack
import numpy as np
import safetensors
from flax import traverse_util
from jax import numpy as jnp

from score_sde.errors import UserError


class Foreign(NamedTuple):
    """What a checkpoint of the official code holds.

    kind: "torch", for models.published.from_torch or published_unets.from_guided_diffusion, "flax", for from_flax, or
        "edm", for published_unets.from_edm
    model, ema: the parameters and their moving average, by PyTorch name or as a Flax tree; None: not in the file
    step: of training; None: not in the file
    arguments: what the network of an EDM file was made with, without defaults, and its `class_name`; None: not told
    """

    kind: str
    model: dict | None
    ema: dict | None
    step: int | None
    arguments: dict | None = None


def read_checkpoint(path: str | os.PathLike) -> Foreign:
    """The contents of a .pth, .pt, .pkl (EDM) or .safetensors file, or a `checkpoint_<n>` of JAX, told by content.

    Bare parameters, without the rest of a training state, are read as well, as the model.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start.startswith(b"PK"):
            return _torch_checkpoint(path)
        if start[:2] == _SEQUENCE_START[:2]:
            return _torch_sequence(path)
        if start[:2] in (b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            return _edm_pickle(path)
        if start[8:] == b"{":
            return _safetensors(path)
        if start and (0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):  # the codes of msgpack's maps
            return _flax_checkpoint(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or _one_line(error)}") from None
    except _Malformed as error:
        raise UserError(f"cannot read the checkpoint {path}: {error}") from None
    raise UserError(
        f"{path} is neither a PyTorch checkpoint (a zip archive), nor EDM's (a pickle), nor .safetensors, nor a Flax "
        "checkpoint (a msgpack map)"
    )


class _Malformed(Exception):
    """A file is not what it should be; says how in one line."""


# -- PyTorch --


class _Global(NamedTuple):
    """A function or class that a pickle names."""

    module: str
    name: str


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements, as the offset


class _Object(NamedTuple):
    """An object of EDM's file: the name of its class, which is never imported, and its attributes."""

    class_name: str
    attributes: dict


_ORDERED_DICT = _Global("collections", "OrderedDict")
_TENSOR = _Global("torch._utils", "_rebuild_tensor_v2")
_DTYPES = {
    _Global("torch", f"{name}Storage"): np.dtype(code)
    for name, code in (
        ("Half", "<f2"),
        ("Float", "<f4"),
        ("Double", "<f8"),
        ("Char", "<i1"),
        ("Byte", "<u1"),
        ("Short", "<i2"),
        ("Int", "<i4"),
        ("Long", "<i8"),
        ("Bool", "?"),
        ("BFloat16", jnp.bfloat16),
    )
}
_LARGEST_PICKLE = 2**24  # bytes; a thousand tensors take 0.1 MB, and the objects it builds up to a hundred times more


def _torch_checkpoint(path: pathlib.Path) -> Foreign:
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = _Arrays(archive, path.stat().st_size)
            if arrays.member("byteorder", b"little") != b"little":
                raise _Malformed("it was written on a big-endian machine")
            return _parts(_unpickled(io.BytesIO(arrays.member("data.pkl"))), lambda key: arrays.member(f"data/{key}"))
    except (zipfile.BadZipFile, struct.error, EOFError, OverflowError, RuntimeError, ValueError) as error:
        raise _Malformed(f"its archive is damaged ({_one_line(error)})") from None


_SEQUENCE_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickle of PyTorch's magic number


def _torch_sequence(path: pathlib.Path) -> Foreign:
    """The format before PyTorch 1.6: pickles of a magic number, the version 1001, the machine, the objects, and the
    keys of the arrays; then for each key the count of its numbers (int64) and the numbers."""
    content = memoryview(path.read_bytes())
    if content[: len(_SEQUENCE_START)] != _SEQUENCE_START:
        raise _Malformed("it is a pickle, but not by PyTorch")
    pickles = io.BytesIO(content[:_LARGEST_PICKLE])
    _, version, machine, saved, keys = (_unpickled(pickles) for _ in range(5))
    if version != 1001 or _expect(machine, dict).get("little_endian") is not True:
        raise _Malformed("it is of another version, or written on a big-endian machine")
    sizes = _storage_sizes(saved)
    data, position = {}, pickles.tell()
    for key in _expect(keys, list):
        if _expect(key, str) not in sizes:
            raise _Malformed("it stores numbers that belong to no tensor")
        end = position + 8 + sizes[key]
        data[key], position = content[position + 8 : end], end
    # each is handed out once, so that no more is built than the file is long
    return _parts(saved, lambda key: data.pop(key, b""))


def _storage_sizes(saved: Any) -> dict[str, int]:
    """Bytes of each storage, by key, that tensors in nested dicts and lists refer to."""
    sizes, seen, left = {}, set(), [saved]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        match value:
            case _Tensor(storage=storage):
                sizes[storage.key] = storage.size * storage.dtype.itemsize
            case dict():
                left += value.values()
            case list():
                left += value
    return sizes


class _Arrays:
    """The raw arrays of an archive, of which no more is read in all than the file is long."""

    def __init__(self, archive: zipfile.ZipFile, file_size: int):
        self._archive = archive
        self._members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
        self._left = file_size

    def member(self, name: str, default: bytes | None = None) -> bytes:
        member = self._members.get(name)
        if member is None:
            if default is None:
                raise _Malformed(f"its archive has no {name}")
            return default
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise _Malformed(f"{name} in its archive is compressed, which PyTorch does not do")
        self._left -= member.file_size
        if self._left < 0:
            raise _Malformed("its archive claims to hold more than it is long")
        return self._archive.read(member)


def _array(name: str, tensor: Any, data_of: Callable[[str], bytes]) -> np.ndarray:
    """The numbers of the tensor, which the checkpoint calls `name`."""
    if not isinstance(tensor, _Tensor):
        raise _Malformed(f"{name} is no tensor")
    storage, offset, shape, strides = tensor
    size = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if size else offset
    if last >= storage.size + (size == 0) or size > storage.size:
        raise _Malformed(f"{name} reaches beyond the numbers stored for it")
    data = data_of(storage.key)
    if len(data) != storage.size * storage.dtype.itemsize:
        raise _Malformed(f"{name} should have {storage.size} numbers, but {len(data)} bytes are stored for it")
    flat = np.frombuffer(data, storage.dtype)[offset:]
    return np.lib.stride_tricks.as_strided(flat, shape, [stride * flat.itemsize for stride in strides]).copy()


_CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,  # of which nobody asks more
    "EMPTY_TUPLE": tuple,
}
_LITERALS = (
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINSTRING", "SHORT_BINSTRING"),  # of Python 2, as one character a byte
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _unpickled(program: io.BytesIO | mmap.mmap, calls: dict[_Global, Callable] | None = None) -> Any:
    """What the next pickle builds, of None, bool, int, float, str, bytes, tuple, list, dict, _Tensor and _Object.

    calls: the globals that it may name, and what stands for calling each, a function of the tuple of arguments.
    """
    calls = _TORCH if calls is None else calls
    payload = 0  # bytes of arrays, which its length does not limit
    stack, marks, memo = [], [], {}

    def since_mark() -> list:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    try:
        for opcode, argument, position in pickletools.genops(program):
            payload += len(argument) if isinstance(argument, bytes) or opcode.name == "BINSTRING" else 0
            if position - payload > _LARGEST_PICKLE:
                raise _Malformed("its pickle is longer than any checkpoint's")
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case name if name in _CONSTANTS:
                    stack.append(_CONSTANTS[name]())
                case name if name in _LITERALS:
                    stack.append(argument)
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case name if name in _TUPLES:
                    items = [stack.pop() for _ in range(_TUPLES[name])]
                    stack.append(tuple(reversed(items)))
                case "APPEND":
                    item = stack.pop()
                    _expect(stack[-1], list).append(item)
                case "APPENDS" | "ADDITEMS":
                    items = since_mark()
                    _expect(stack[-1], list).extend(items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _expect(stack[-1], dict)[_expect(key, str, int, _Global)] = value
                case "SETITEMS":
                    items = since_mark()
                    for key, value in zip(items[::2], items[1::2], strict=True):
                        _expect(stack[-1], dict)[_expect(key, str, int, _Global)] = value
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    stack.append(_known(*argument.split(" ", 1), calls))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(_known(module, name, calls))
                case "BINPERSID":
                    stack.append(_storage(stack.pop()))
                case "REDUCE" | "NEWOBJ":
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(calls.get(_expect(function, _Global), _skipped)(_expect(arguments, tuple)))
                case "BUILD":
                    # Attributes of a dictionary: PyTorch gives a state_dict its `_metadata`, which is of no use here.
                    attributes = stack.pop()
                    if isinstance(_expect(stack[-1], dict, _Object), _Object):
                        stack[-1].attributes.update(attributes if isinstance(attributes, dict) else {"": attributes})
                case "STOP":
                    return stack.pop()
                case name:
                    raise _Malformed(f"its pickle uses {name}, which no checkpoint needs")
    except (IndexError, KeyError, ValueError, TypeError, UnicodeDecodeError) as error:
        raise _Malformed(f"its pickle is damaged ({_one_line(error)})") from None
    raise _Malformed("its pickle has no end")


def _known(module: Any, name: Any, calls: dict) -> _Global:
    """The global, if checkpoints need it, or if it is one of lightning's, which stand beside the parameters."""
    reference = _Global(module, name)
    if reference not in calls and str(module).split(".")[0] not in _BESIDE:
        raise _Malformed(f"its pickle asks for {_one_line(module)}.{_one_line(name)}, which no checkpoint needs")
    return reference


def _storage(identifier: Any) -> _Storage:
    match identifier:
        case ("storage", _Global() as kind, str() as key, str(), int() as size, *view) if (
            kind in _DTYPES and size >= 0 and view in ([], [None])
        ):
            return _Storage(_DTYPES[kind], key, size)
    raise _Malformed("its pickle refers to data in an unknown way")


def _ordered_dict(arguments: tuple) -> dict:
    if arguments:
        raise _Malformed("its pickle makes a call that no checkpoint needs")
    return {}


def _tensor(arguments: tuple) -> _Tensor:
    match arguments:
        case (_Storage() as storage, int() as offset, tuple() as shape, tuple() as strides, *_):
            natural = all(isinstance(n, int) and 0 <= n < 2**40 for n in (offset, *shape, *strides))
            if natural and len(shape) == len(strides) <= 8:
                return _Tensor(storage, offset, shape, strides)
    raise _Malformed("its pickle makes a call that no checkpoint needs")


# Packages of training, whose objects stand beside the parameters in the files of latent diffusion.
_BESIDE = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf")


def _skipped(arguments: tuple) -> _Object:
    """What stands for an object that no parameter depends on."""
    return _Object("", {})


def _refuse(arguments: tuple):
    raise _Malformed("its pickle makes a call that no checkpoint needs")


_TORCH = {_ORDERED_DICT: _ordered_dict, _TENSOR: _tensor} | dict.fromkeys(_DTYPES, _refuse)
# Numbers that callbacks keep; a file says so without a word of lightning where they are its last score.
_TORCH |= {
    _Global("numpy", "dtype"): _skipped,
    _Global("numpy.core.multiarray", "scalar"): _skipped,
    _Global("numpy._core.multiarray", "scalar"): _skipped,
    _Global("_codecs", "encode"): _skipped,
}


def _parts(saved: Any, data_of: Callable[[str], bytes]) -> Foreign:
    """The official structure, {model: state_dict, ema: {shadow_params: list}, step: int}, or a state_dict alone.

    Lightning's is {state_dict, global_step} and more.
    """
    lightning = "state_dict" in _expect(saved, dict)
    state = _expect(saved.get("state_dict" if lightning else "model", saved), dict)
    model = {_expect(name, str): _array(name, tensor, data_of) for name, tensor in state.items()}
    if lightning:
        return Foreign("torch", model, None, _expect(saved.get("global_step"), int, type(None)))
    if state is saved or "ema" not in saved:
        return Foreign("torch", model, None, None)
    step = _expect(saved.get("step"), int, type(None))
    # The averages are a list in the order of the trainable parameters: all but the buffer `sigmas` and the Fourier
    # frequencies, the only vector called W.
    shadow = _expect(_expect(saved["ema"], dict).get("shadow_params"), list)
    fixed = [
        name for name, array in model.items() if _last(name) == "sigmas" or (_last(name) == "W" and array.ndim == 1)
    ]
    trained = [name for name in model if name not in fixed]
    if len(shadow) != len(trained):
        raise _Malformed(f"it has averages of {len(shadow)} parameters, but {len(trained)} trainable parameters")
    averages = {}
    for name, tensor in zip(trained, shadow, strict=True):
        averages[name] = _array(f"the average of {name}", tensor, data_of)
        if averages[name].shape != model[name].shape:
            raise _Malformed(f"the average of {name} has shape {averages[name].shape} instead of {model[name].shape}")
    return Foreign("torch", model, model | averages, step)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


# -- EDM --


_DEEPEST = 16  # how far the modules of a network contain each other
_MOST_TENSORS = 10_000


def _persistent(arguments: tuple) -> _Object:
    """An object whose class comes as text beside it; the text is left alone."""
    match arguments:
        case ({"class_name": str() as name, "state": dict() as state},):
            return _Object(name, state)
    raise _Malformed("its pickle makes a call that no checkpoint needs")


def _parameter(arguments: tuple) -> Any:
    match arguments:
        case (_Tensor() as tensor, *_):
            return tensor
    raise _Malformed("it has a parameter that is no tensor")


def _stored(content: bytes) -> tuple[_Storage, memoryview]:
    """One storage and its numbers, from PyTorch's sequence of pickles for it alone."""
    if not content.startswith(_SEQUENCE_START):
        raise _Malformed("it has numbers that PyTorch did not write")
    pickles = io.BytesIO(content[: 2**12])
    _, version, machine, storage, keys = (_unpickled(pickles) for _ in range(5))
    if version != 1001 or _expect(machine, dict).get("little_endian") is not True:
        raise _Malformed("it is of another version, or written on a big-endian machine")
    if keys != [_expect(storage, _Storage).key]:
        raise _Malformed("it stores numbers that belong to no tensor")
    return storage, memoryview(content)[pickles.tell() + 8 :]


def _edm_pickle(path: pathlib.Path) -> Foreign:
    """EDM's dictionary, whose `ema` is the averaged network in its preconditioner."""
    data: dict[str, memoryview] = {}

    def storage(arguments: tuple) -> _Storage:
        match arguments:
            case (bytes() as content,):
                one, data[str(len(data))] = _stored(content)
                return one._replace(key=str(len(data) - 1))
        raise _Malformed("its pickle makes a call that no checkpoint needs")

    nothing = lambda arguments: _Object("", {})  # what no parameter depends on
    calls = _TORCH | {
        _Global("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
        _Global("torch._utils", "_rebuild_parameter"): _parameter,
        _Global("torch.storage", "_load_from_bytes"): storage,
        _Global("torch.nn.modules.container", "ModuleDict"): nothing,
        _Global("dnnlib.util", "EasyDict"): lambda arguments: {},
        _Global("numpy", "dtype"): nothing,
        _Global("numpy.core.multiarray", "scalar"): nothing,
        _Global("numpy._core.multiarray", "scalar"): nothing,
        _Global("builtins", "set"): nothing,
    }
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as program:
        try:
            network = _expect(_expect(_unpickled(program, calls), dict).get("ema"), _Object)
            arrays = {}
            for name, tensor in _tensors(network):
                if len(arrays) == _MOST_TENSORS:
                    raise _Malformed(f"it has more than {_MOST_TENSORS} tensors")
                arrays[name] = _array(name, tensor, lambda key: data.pop(key, b""))  # each is handed out once
        except (struct.error, EOFError, OverflowError, RuntimeError, ValueError) as error:
            raise _Malformed(f"its pickle is damaged ({_one_line(error)})") from None
    made_with = network.attributes.get("_init_kwargs", {})
    arguments = _expect(made_with, dict) | {"class_name": network.class_name}
    return Foreign("edm", None, arrays, None, arguments)


def _tensors(module: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Names and tensors of a module and of those that it contains, in PyTorch's order."""
    attributes = _expect(module, _Object).attributes
    if depth > _DEEPEST:
        raise _Malformed(f"its modules contain each other more than {_DEEPEST} times")
    for kind in ("_parameters", "_buffers"):
        for name, tensor in _expect(attributes.get(kind, {}), dict).items():
            if tensor is not None:
                yield f"{prefix}{name}", tensor
    for name, child in _expect(attributes.get("_modules", {}), dict).items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.", depth + 1)


# -- Safetensors --


_SAFE_TYPES = {"F16": np.float16, "BF16": jnp.bfloat16, "F32": np.float32, "F64": np.float64} | {
    "I64": np.int64,
    "I32": np.int32,
}


def _safetensors(path: pathlib.Path) -> Foreign:
    """A state_dict alone."""
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except (safetensors.SafetensorError, ValueError) as error:
        raise _Malformed(f"its header is damaged ({_one_line(error)})") from None
    arrays = {}
    for name, entry in entries:
        if entry["dtype"] not in _SAFE_TYPES:
            raise _Malformed(f"{_one_line(name)} has type {_one_line(entry['dtype'])}")
        arrays[name] = np.frombuffer(entry["data"], _SAFE_TYPES[entry["dtype"]]).reshape(entry["shape"])
    return Foreign("torch", arrays, None, None)


# -- Flax --


_MOST_AXES = 32
_ARRAY_TYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint32", "uint64", "bool")


def _flax_checkpoint(path: pathlib.Path) -> Foreign:
    """The official State, {optimizer: {target, state}, params_ema, step, ...}, or the tree of parameters alone."""
    limits = {"max_array_len": _MOST_AXES, "max_map_len": 100_000}
    try:
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=_extension, raw=False, strict_map_key=True, **limits)
        tree = _joined(tree)
        if "params_ema" not in tree:
            return Foreign("flax", _require_arrays(tree), None, None)
        target = _expect(tree.get("optimizer"), dict).get("target")
        step = np.asarray(tree.get("step")).reshape(()).astype(np.int64).item()
        return Foreign("flax", _require_arrays(target), _require_arrays(tree["params_ema"]), step)
    except (KeyError, ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise _Malformed(f"its msgpack is damaged ({_one_line(error)})") from None


def _extension(code: int, data: bytes) -> np.ndarray:
    """Flax's arrays (1) and NumPy scalars (3): shape, name of the type, bytes."""
    if code not in (1, 3):
        raise _Malformed(f"its msgpack uses extension {code}, which no checkpoint needs")
    shape, dtype, buffer = msgpack.unpackb(data, raw=False, max_array_len=_MOST_AXES)
    if dtype not in _ARRAY_TYPES:
        raise _Malformed(f"an array has type {_one_line(dtype)}")
    shape = tuple(_expect(n, int) for n in shape)
    if min(shape, default=0) < 0 or math.prod(shape) * np.dtype(dtype).itemsize != len(buffer):
        raise _Malformed(f"an array of shape {shape} has {len(buffer)} bytes")
    return np.frombuffer(buffer, dtype).reshape(shape)


def _joined(tree: Any) -> Any:
    """The tree with arrays above 2^30 bytes, which Flax writes in chunks, put together."""
    if not isinstance(tree, dict):
        return tree
    if not tree.get("__msgpack_chunked_array__"):
        return {key: _joined(value) for key, value in tree.items()}
    shape, chunks = ([entry[str(i)] for i in range(len(entry))] for entry in (tree["shape"], tree["chunks"]))
    return np.concatenate(chunks).reshape(shape)


def _require_arrays(tree: Any) -> dict:
    for path, leaf in traverse_util.flatten_dict(_expect(tree, dict)).items():
        if not isinstance(leaf, np.ndarray):
            raise _Malformed(f"{'/'.join(map(str, path))} is no array")
    return tree


def _expect(value: Any, *types: type) -> Any:
    """The value, if of one of the types."""
    if not isinstance(value, types):
        raise _Malformed(f"it has a {type(value).__name__} where a {' or '.join(t.__name__ for t in types)} belongs")
    return value


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())[:100]


# -- pickled arrays --


def read_arrays(content: bytes, where: str) -> dict:
    """A pickled dict of arrays of unsigned bytes, lists and text, as CIFAR's Python batches are; nothing is called."""
    made = lambda name: lambda arguments: _Object(name, {"arguments": arguments})
    calls = {
        **{_Global(f"numpy.{core}.multiarray", "_reconstruct"): made("ndarray") for core in ("core", "_core")},
        _Global("numpy", "ndarray"): made("ndarray"),
        _Global("numpy", "dtype"): made("dtype"),
        _Global("_codecs", "encode"): lambda arguments: _expect(arguments[0], str).encode("latin-1"),
    }
    try:
        return {key: _array_of(value) for key, value in _expect(_unpickled(io.BytesIO(content), calls), dict).items()}
    except (_Malformed, ValueError, IndexError) as error:
        raise UserError(f"{where} is no pickle of arrays: {_one_line(error)}") from None


def _array_of(value: Any) -> Any:
    """The array that NumPy's object stands for; any other value as it is."""
    match value:
        case _Object(
            "ndarray", {"": (_, tuple() as shape, _Object("dtype", {"arguments": (str() as code, *_)}), _, data)}
        ):
            data = data.encode("latin-1") if isinstance(data, str) else _expect(data, bytes)
            if code not in ("u1", "|u1") or not all(isinstance(n, int) and n >= 0 for n in shape):
                raise _Malformed(f"it has an array of {_one_line(code)} {shape} where unsigned bytes belong")
            return np.frombuffer(data, np.uint8).reshape(shape)
    return value
