"""Reads checkpoint files of published code, PyTorch's and JAX's, without running anything that they contain.

A PyTorch file is a zip archive (before PyTorch 1.6 a plain sequence) of raw arrays and of a pickle, a program that
builds the objects around them. Python's own unpickler calls whatever functions the program names; the interpreter here
calls none. It knows those that build tensors and dictionaries, as data; of every other object it keeps the name and the
attributes. The archive's members may not be compressed, and arrays are views of the bytes that the file holds, so
memory is in proportion to the file's size.

EDM's file is one pickle of the network itself, with the text of its program. The same interpreter reads it, and the
text stays text.

A JAX file is msgpack or a folder of Orbax, a .safetensors file is JSON and arrays, and an .npz is arrays: these have no
programs; limits are set here, and by the libraries, for the same reason.

Whatever the format, entries are told apart by the words on their way: averages, what belongs to the optimizer, and the
parameters. Which of a file's networks is meant, and what wraps its names, models.names.unwrapped tells.
"""

import functools
import io
import math
import mmap
import os
import pathlib
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import safetensors
from flax import traverse_util
from jax import numpy as jnp

from score_sde import files
from score_sde.errors import UserError, one_line
from score_sde.models.names import bare


class Foreign(NamedTuple):
    """What a checkpoint of the official code holds.

    kind: "torch", for models.published.from_torch or published_unets.from_guided_diffusion, "flax", for from_flax, or
        "edm", for published_unets.from_edm
    model, ema: the parameters and their moving average, by PyTorch name or as a Flax tree; None: not in the file
    step: of training; None: not in the file
    arguments: what the network of an EDM file was made with, without defaults, and its `class_name`; None: not told
    skipped: classes and functions of objects beside the parameters, which were neither imported nor called
    """

    kind: str
    model: dict | None
    ema: dict | None
    step: int | None
    arguments: dict | None = None
    skipped: tuple[str, ...] = ()


# What lies where a checkpoint should: (how it begins, what to do).
_NO_CHECKPOINTS = (
    (b"version h", "is a pointer that Git LFS left in the file's place: fetch the file, git lfs pull"),
    (b"<", "is a web page that was saved in the file's place: download the file itself"),
    (b"\x89HDF", "is HDF5, as Keras writes it, which is not read: save its arrays by their names as .npz"),
    (b"{", "is text in JSON, as an index or a config beside a checkpoint is: give the file with the parameters"),
)


def read_checkpoint(path: str | os.PathLike) -> Foreign:
    """The contents of a .pth, .pt, .ckpt, .pkl (EDM), .safetensors or .npz file, or of JAX's, told by content.

    JAX's are a `checkpoint_<n>` of msgpack and a folder of Orbax. Bare parameters, without the rest of a training
    state, are read as well, as the model.
    """
    path = pathlib.Path(path)
    try:
        if path.is_dir():
            return _orbax(path)
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise UserError(f"{path} is no file: expected a checkpoint")
        with path.open("rb") as file:
            start = file.read(9)
        if remedy := next((line for beginning, line in _NO_CHECKPOINTS if start.startswith(beginning)), None):
            raise UserError(f"{path} {remedy}")
        if start.startswith(b"PK"):
            return _npz(path) if _is_npz(path) else _torch_checkpoint(path)
        if start[:2] == _SEQUENCE_START[:2]:
            return _torch_sequence(path)
        if start[:2] in (b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            return _edm_pickle(path)
        if start[8:] == b"{":
            return _safetensors(path)
        if start and (0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):  # the codes of msgpack's maps
            return _flax_checkpoint(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or one_line(error)}") from None
    except _Malformed as error:
        raise UserError(f"cannot read the checkpoint {path}: {error}") from None
    raise UserError(
        f"{path} is neither a PyTorch checkpoint (a zip archive), nor EDM's (a pickle), nor .safetensors, nor .npz, "
        "nor a Flax checkpoint (a msgpack map or a folder of Orbax)"
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
    """An object: the name of its class or of what makes it, neither of which is imported, and its attributes."""

    class_name: str
    attributes: dict


_TYPES = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "bool": np.dtype("?"),
    **{f"int{8 * n}": np.dtype(f"<i{n}") for n in (1, 2, 4, 8)},
    **{f"uint{8 * n}": np.dtype(f"<u{n}") for n in (1, 2, 4, 8)},
    **{name: np.dtype(getattr(jnp, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")},
}
_STORAGES = {  # PyTorch's words for them
    "Half": "float16",
    "Float": "float32",
    "Double": "float64",
    "BFloat16": "bfloat16",
    "Bool": "bool",
    "Char": "int8",
    "Byte": "uint8",
    "Short": "int16",
    "Int": "int32",
    "Long": "int64",
}
_DTYPES = {_Global("torch", f"{word}Storage"): _TYPES[name] for word, name in _STORAGES.items()}
_DTYPES |= {_Global(module, "UntypedStorage"): _TYPES["uint8"] for module in ("torch", "torch.storage")}
_LARGEST_PICKLE = 2**24  # bytes; a thousand tensors take 0.1 MB, and the objects it builds up to a hundred times more


def _torch_checkpoint(path: pathlib.Path) -> Foreign:
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = _Arrays(archive, path.stat().st_size)
            if arrays.member("byteorder", b"little") != b"little":
                raise _Malformed("it was written on a big-endian machine")
            built = _unpickled(io.BytesIO(arrays.member("data.pkl")))
            return _parts(built, functools.cache(lambda key: arrays.member(f"data/{key}")))
    except (zipfile.BadZipFile, struct.error, EOFError, OverflowError, RuntimeError, ValueError) as error:
        raise _Malformed(f"its archive is damaged ({one_line(error)})") from None


_SEQUENCE_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickle of PyTorch's magic number


def _torch_sequence(path: pathlib.Path) -> Foreign:
    """The format before PyTorch 1.6: pickles of a magic number, the version 1001, the machine, the objects, and the
    keys of the arrays; then for each key the count of its numbers (int64) and the numbers."""
    content = memoryview(path.read_bytes())
    if content[: len(_SEQUENCE_START)] != _SEQUENCE_START:
        raise _Malformed("it is a pickle, but not by PyTorch")
    pickles = io.BytesIO(content[:_LARGEST_PICKLE])
    _, version, machine, saved, keys = (_unpickled(pickles) for _ in range(5))
    if version.value != 1001 or _expect(machine.value, dict).get("little_endian") is not True:
        raise _Malformed("it is of another version, or written on a big-endian machine")
    data, position = {}, pickles.tell()
    for key in _expect(keys.value, list):
        if _expect(key, str) not in saved.storages:
            raise _Malformed("it stores numbers that belong to no tensor")
        storage = saved.storages[key]
        end = position + 8 + storage.size * storage.dtype.itemsize
        data[key], position = content[position + 8 : end], end
    return _parts(saved, lambda key: data.get(key, b""))


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
    """The numbers of the tensor, which the checkpoint calls `name`: a view of those that are stored."""
    if not isinstance(tensor, _Tensor):
        raise _Malformed(f"{name} is no tensor")
    storage, offset, shape, strides = tensor
    size = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if size else offset
    if last >= storage.size + (size == 0) or size > max(storage.size, _MOST_REPEATED):
        raise _Malformed(f"{name} reaches beyond the numbers stored for it")
    data = data_of(storage.key)
    if len(data) != storage.size * storage.dtype.itemsize:
        raise _Malformed(f"{name} should have {storage.size} numbers, but {len(data)} bytes are stored for it")
    flat = np.frombuffer(data, storage.dtype)[offset:]
    strides = [stride * flat.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)


_MOST_REPEATED = 2**16  # numbers of a tensor that repeats fewer (`expand`)


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
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Built(NamedTuple):
    """What a pickle builds, of None, bool, int, float, str, bytes, tuple, list, dict, _Tensor and _Object.

    storages: those that its tensors refer to, by key
    skipped: names of the functions and classes that it names for other objects
    """

    value: Any
    storages: dict[str, _Storage]
    skipped: set[str]


def _unpickled(
    program: io.BytesIO | mmap.mmap, calls: dict[_Global, Callable] | None = None, *, strict: bool = False
) -> _Built:
    """What the next pickle builds.

    calls: what stands for calling each of these globals, a function of the tuple of arguments.
    strict: refuse other globals, which else become an _Object of their name.
    """
    calls = _TORCH if calls is None else calls
    payload = 0  # bytes of arrays, which its length does not limit
    stack, marks, memo, storages, skipped = [], [], {}, {}, set()

    def since_mark() -> list:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def named(module: Any, name: Any) -> _Global:
        if strict and _Global(module, name) not in calls:
            raise _Malformed(f"its pickle asks for {one_line(module)}.{one_line(name)}, which no checkpoint needs")
        return _Global(_expect(module, str), _expect(name, str))

    def made_by(function: Any, arguments: Any) -> Any:
        if isinstance(function, _Object):  # a method, or what a function has made
            return _Object(function.class_name, {})
        name = _expect(function, _Global)
        if name in calls:
            return calls[name](_expect(arguments, tuple))
        if name == _RECONSTRUCTOR and arguments and isinstance(arguments[0], _Global):
            name = arguments[0]
        skipped.add(one_line(".".join(name)))
        return _Object(".".join(name), {})

    def add_items(target: Any, items: list):
        if isinstance(target, _Object):
            target = target.attributes
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, (str, int, float, _Global)):  # others are slow to hash, or cannot be
                _expect(target, dict)[key] = value

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
                case "POP":
                    stack.pop()
                case "POP_MARK":
                    since_mark()
                case "DUP":
                    stack.append(stack[-1])
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "LIST" | "FROZENSET":
                    stack.append(since_mark())
                case "DICT":
                    items = since_mark()
                    stack.append({})
                    add_items(stack[-1], items)
                case name if name in _TUPLES:
                    items = [stack.pop() for _ in range(_TUPLES[name])]
                    stack.append(tuple(reversed(items)))
                case "APPEND":
                    item = stack.pop()
                    if isinstance(_expect(stack[-1], list, _Object), list):
                        stack[-1].append(item)
                case "APPENDS" | "ADDITEMS":
                    items = since_mark()
                    if isinstance(_expect(stack[-1], list, _Object), list):
                        stack[-1].extend(items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    add_items(stack[-1], [key, value])
                case "SETITEMS":
                    items = since_mark()
                    add_items(stack[-1], items)
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    stack.append(named(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(named(module, name))
                case "BINPERSID":
                    storage = _storage(stack.pop())
                    if isinstance(storage, _Storage):
                        storages[storage.key] = storage
                    stack.append(storage)
                case "REDUCE" | "NEWOBJ":
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(made_by(function, arguments))
                case "NEWOBJ_EX":
                    _, arguments, function = stack.pop(), stack.pop(), stack.pop()
                    stack.append(made_by(function, arguments))
                case "BUILD":
                    # Attributes: those of a dictionary (PyTorch gives a state_dict its `_metadata`) are of no use here.
                    attributes = stack.pop()
                    if isinstance(stack[-1], _Object):
                        parts = attributes if isinstance(attributes, tuple) else (attributes,)  # slots come apart
                        named_parts = [part for part in parts if isinstance(part, dict)] or [{"": attributes}]
                        for part in named_parts:
                            stack[-1].attributes.update(part)
                case "STOP":
                    return _Built(stack.pop(), storages, skipped)
                case name:
                    raise _Malformed(f"its pickle uses {name}, which no checkpoint needs")
    except (IndexError, KeyError, ValueError, TypeError, UnicodeDecodeError) as error:
        raise _Malformed(f"its pickle is damaged ({one_line(error)})") from None
    raise _Malformed("its pickle has no end")


def _storage(identifier: Any) -> _Storage | _Object | _Global:
    match identifier:
        case ("storage", _Global() as kind, str() as key, str(), int() as size, *view) if size >= 0 and view in (
            [],
            [None],
        ):
            return _Storage(_DTYPES[kind], key, size) if kind in _DTYPES else _Object(".".join(kind), {})
        case ("module", _Global() as module, *_):  # with the text of its program, before PyTorch 1.6
            return module
    raise _Malformed("its pickle refers to data in an unknown way")


# -- What stands for the functions that a PyTorch file may name --


_UNKNOWN = "its pickle makes a call that no checkpoint needs"
_RECONSTRUCTOR = _Global("copy_reg", "_reconstructor")


def _dict(arguments: tuple) -> dict:
    """A dictionary of pairs, or of another one; what a defaultdict makes does not matter."""
    built = {}
    for given in arguments:
        if isinstance(given, dict):
            built |= given
        elif isinstance(given, list):
            built |= {_expect(key, str, int): value for key, value in given}
    return built


def _tensor(arguments: tuple) -> _Tensor | _Object:
    match arguments:
        case (_Storage() as storage, int() as offset, tuple() as shape, tuple() as strides, *_):
            natural = all(isinstance(n, int) and 0 <= n < 2**40 for n in (offset, *shape, *strides))
            if natural and len(shape) == len(strides) <= 8:
                return _Tensor(storage, offset, shape, strides)
        case (_Object() as unknown, *_):  # of numbers that NumPy has not
            return unknown
    raise _Malformed(_UNKNOWN)


def _tensor_of_type(arguments: tuple) -> _Tensor | _Object:
    """A tensor over bytes, whose type is the seventh argument."""
    tensor = _tensor(arguments)
    match tensor, arguments:
        case _Tensor(), (_, _, _, _, _, _, _Global(name=name), *_) if name in _TYPES:
            dtype = _TYPES[name]
            size = tensor.storage.size // dtype.itemsize
            return tensor._replace(storage=tensor.storage._replace(dtype=dtype, size=size))
    return _Object("torch.Tensor", {})


def _wrapped_tensor(arguments: tuple) -> Any:
    """A parameter: a tensor, and what does not matter here."""
    match arguments:
        case (_Tensor() | _Object() as tensor, *_):
            return tensor
    raise _Malformed("it has a parameter that is no tensor")


def _subclass(arguments: tuple) -> Any:
    """A tensor of a class of its own, made by one of PyTorch's functions."""
    match arguments:
        case (_Global() as function, _, tuple() as inner, *_) if function in _TENSORS:
            return _TENSORS[function](inner)
    return _Object("torch.Tensor", {})


def _numpy_type(arguments: tuple) -> Any:
    match arguments:
        case (str() as code, *_) if re.fullmatch("[fiu][1248]", code):
            return np.dtype(f"<{code}")
    return _Object("numpy.dtype", {})


def _numpy_scalar(arguments: tuple) -> Any:
    match arguments:
        case (np.dtype() as dtype, bytes() as number) if len(number) == dtype.itemsize:
            return np.frombuffer(number, dtype)[0].item()
    return _Object("numpy.generic", {})


def _encoded(arguments: tuple) -> Any:
    match arguments:
        case (str() as text, "latin1"):
            return text.encode("latin1")
    raise _Malformed(_UNKNOWN)


def _refuse(arguments: tuple):
    raise _Malformed(_UNKNOWN)


_TENSORS = {
    _Global("torch._utils", "_rebuild_tensor"): _tensor,
    _Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    _Global("torch._utils", "_rebuild_tensor_v3"): _tensor_of_type,
    _Global("torch._utils", "_rebuild_parameter"): _wrapped_tensor,
    _Global("torch._utils", "_rebuild_parameter_with_state"): _wrapped_tensor,
}
_TORCH = {
    **_TENSORS,
    **dict.fromkeys(_DTYPES, _refuse),
    _Global("torch._tensor", "_rebuild_from_type_v2"): _subclass,
    **{_Global("collections", name): _dict for name in ("OrderedDict", "defaultdict", "Counter")},
    # numbers that callbacks and loops keep
    _Global("numpy", "dtype"): _numpy_type,
    _Global("numpy.core.multiarray", "scalar"): _numpy_scalar,
    _Global("numpy._core.multiarray", "scalar"): _numpy_scalar,
    _Global("_codecs", "encode"): _encoded,
}


# -- What of a checkpoint is what --


_STEPS = ("step", "global_step", "steps", "iteration", "iterations", "iters", "iter", "n_iter", "num_steps")
_AVERAGES = re.compile(r"(^|_)(ema|swa|shadow|averages?|averaged)($|[_\d])")
_OPTIMIZER = re.compile(r"(^|_)opt($|_)|optim|^collected_params$")
_BESIDE = re.compile(r"^(callbacks|loops|((lr|grad|amp)_)?(scaler|scheduler)s?|hyper_parameters|rng_state)$")
_COUNTERS = ("decay", "num_updates", "n_averaged", "initted", *_STEPS)  # numbers that stand among averages


def _roles(leaves: list[tuple[tuple[str, ...], Any]]) -> tuple[dict, dict]:
    """(parameters, averages) among the leaves of a checkpoint, by their ways into it.

    What was averaged more than once is told from what stands beside it, such as the online model of an average's own
    state. Entries of the optimizer are left out; Flax once kept the parameters as its `target`.
    """
    model, averages = {}, {}
    for way, leaf in leaves:
        words = [word.lower() for part in way for word in part.split(".")]
        depth = sum(_AVERAGES.search(word) is not None for word in words)
        if words[-1] in _COUNTERS or (any(map(_OPTIMIZER.search, words)) and "target" not in words):
            continue
        if depth:
            averages.setdefault(depth, {})[way] = leaf
        elif not any(map(_BESIDE.search, words)):
            model[way] = leaf
    return model, averages[max(averages)] if averages else {}


def _inside(entries: dict[tuple, Any]) -> dict[tuple, Any]:
    """The entries without the containers that hold them all."""
    while entries and all(len(way) > 1 for way in entries) and len({way[0] for way in entries}) == 1:
        entries = {way[1:]: leaf for way, leaf in entries.items()}
    return entries


def _step_of(leaves: list[tuple[tuple[str, ...], Any]]) -> int | None:
    """The number of training steps: the outermost entry of such a name."""
    ours = lambda way: way[-1] in _STEPS and not any(map(_OPTIMIZER.search, way))
    named = [(len(way), _STEPS.index(way[-1]), leaf) for way, leaf in leaves if ours(way)]
    for *_, leaf in sorted(named, key=lambda entry: entry[:2]):
        value = np.asarray(leaf).reshape(-1)[:1] if isinstance(leaf, (int, float, np.ndarray)) else np.zeros(0)
        if value.size and value.dtype.kind in "iuf" and np.isfinite(value[0]) and 0 <= value[0] < 2**31:
            return int(value[0])
    return None


_MOST_LEAVES = 100_000


def _leaves(value: Any) -> list[tuple[tuple[str, ...], Any]]:
    """What nested dictionaries, lists and objects hold, with the way to it; the tensors of a module by its names."""
    leaves, seen = [], set()

    def visit(value: Any, way: tuple[str, ...]):
        if isinstance(value, _Object) and "_parameters" in value.attributes and "_modules" in value.attributes:
            leaves.extend(((*way, name), tensor) for name, tensor in _tensors(value))
        elif isinstance(value, (dict, list, _Object)) or (isinstance(value, tuple) and type(value) is tuple):
            if id(value) in seen or len(way) > _DEEPEST:
                return
            seen.add(id(value))
            inner = value.attributes if isinstance(value, _Object) else value
            for key, entry in inner.items() if isinstance(inner, dict) else enumerate(inner):
                visit(entry, (*way, key.name if isinstance(key, _Global) else str(key)))
        elif way:
            leaves.append((way, value))
        if len(leaves) > _MOST_LEAVES:
            raise _Malformed(f"it has more than {_MOST_LEAVES} entries")

    visit(value, ())
    return leaves


def _parts(built: _Built, data_of: Callable[[str], bytes]) -> Foreign:
    """The parameters and averages of whatever structure PyTorch saved."""
    leaves = _leaves(built.value)
    tensors, averages = _roles([(way, leaf) for way, leaf in leaves if isinstance(leaf, _Tensor)])
    named = lambda entries: {bare(".".join(way)): _array(".".join(way), leaf, data_of) for way, leaf in entries.items()}
    model, ema = named(_inside(tensors)), named(_inside(averages))
    skipped = tuple(sorted(built.skipped))
    if not model and not ema:
        raise _Malformed("it holds no tensors" + (f", but objects of {', '.join(skipped)}" if skipped else ""))
    if ema and all(name.isdecimal() for name in ema):
        ema = _averages_by_name(model, [ema[name] for name in sorted(ema, key=int)])
    steps = [(way, _scalar(leaf, data_of)) for way, leaf in leaves if way[-1] in _STEPS]
    return Foreign("torch", model or None, _filled(ema, model) or None, _step_of(steps), skipped=skipped)


def _filled(ema: dict[str, np.ndarray], model: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The averages, and of entries that are not trained, which have none, the entries themselves."""
    return model | ema if ema and ema.keys() < model.keys() else ema


def _scalar(leaf: Any, data_of: Callable[[str], bytes]) -> Any:
    return _array("the step", leaf, data_of) if isinstance(leaf, _Tensor) and not math.prod(leaf.shape) > 1 else leaf


def _averages_by_name(model: dict[str, np.ndarray], shadow: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Averages that are a list in the order of the trainable parameters, which have their shapes.

    An average has all entries, or all but buffers such as `sigmas` and the Fourier frequencies, the only vector W.
    """
    fixed = ("sigmas", "running_mean", "running_var", "num_batches_tracked")
    trained = {
        name: array
        for name, array in model.items()
        if _last(name) not in fixed and not (_last(name) == "W" and array.ndim == 1)
    }
    tops = {name.partition(".")[0] for name in model}
    alone = [{name: array for name, array in trained.items() if name.startswith(f"{top}.")} for top in sorted(tops)]
    for named in (trained, model, *alone):
        if [array.shape for array in named.values()] == [average.shape for average in shadow]:
            return model | dict(zip(named, shadow, strict=True))
    if len(shadow) != len(trained):
        raise _Malformed(f"it has averages of {len(shadow)} parameters, but {len(trained)} trainable parameters")
    name, average = next((n, a) for n, a in zip(trained, shadow, strict=True) if a.shape != trained[n].shape)
    raise _Malformed(f"the average of {name} has shape {average.shape} instead of {trained[name].shape}")


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


def _stored(content: bytes) -> tuple[_Storage, memoryview]:
    """One storage and its numbers, from PyTorch's sequence of pickles for it alone."""
    if not content.startswith(_SEQUENCE_START):
        raise _Malformed("it has numbers that PyTorch did not write")
    pickles = io.BytesIO(content[: 2**12])
    _, version, machine, storage, keys = (_unpickled(pickles).value for _ in range(5))
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
        _Global("torch.storage", "_load_from_bytes"): storage,
        _Global("torch.nn.modules.container", "ModuleDict"): nothing,
        _Global("dnnlib.util", "EasyDict"): lambda arguments: {},
        _Global("builtins", "set"): nothing,
    }
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as program:
        try:
            network = _expect(_expect(_unpickled(program, calls, strict=True).value, dict).get("ema"), _Object)
            arrays = {}
            for name, tensor in _tensors(network):
                if len(arrays) == _MOST_TENSORS:
                    raise _Malformed(f"it has more than {_MOST_TENSORS} tensors")
                arrays[name] = _array(name, tensor, lambda key: data.get(key, b""))
        except (struct.error, EOFError, OverflowError, RuntimeError, ValueError) as error:
            raise _Malformed(f"its pickle is damaged ({one_line(error)})") from None
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


_SAFE_TYPES = {"BF16": "bfloat16", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"} | {
    f"{letter}{8 * n}": f"{kind}{8 * n}"
    for letter, kind, sizes in (("F", "float", (2, 4, 8)), ("I", "int", (1, 2, 4, 8)), ("U", "uint", (1, 2, 4, 8)))
    for n in sizes
}


def _safetensors(path: pathlib.Path) -> Foreign:
    """A state_dict alone, or with averages, told by the first words of their names."""
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except (safetensors.SafetensorError, ValueError) as error:
        raise _Malformed(f"its header is damaged ({one_line(error)})") from None
    arrays = {}
    for name, entry in entries:
        if entry["dtype"] not in _SAFE_TYPES:
            raise _Malformed(f"{one_line(name)} has type {one_line(entry['dtype'])}")
        arrays[name] = np.frombuffer(entry["data"], _TYPES[_SAFE_TYPES[entry["dtype"]]]).reshape(entry["shape"])
    return _named_arrays(arrays)


def _named_arrays(arrays: dict[str, np.ndarray]) -> Foreign:
    leaves = [((name,), array) for name, array in arrays.items()]
    model, ema = ({bare(name): array for (name,), array in entries.items()} for entries in _roles(leaves))
    return Foreign("torch", model or None, _filled(ema, model) or None, _step_of(leaves))


# -- .npz --


def _is_npz(path: pathlib.Path) -> bool:
    """Whether a zip archive holds NumPy's arrays and nothing else."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return False
    return all(name.endswith(".npy") for name in names) and (bool(names) or path.suffix == ".npz")


def _npz(path: pathlib.Path) -> Foreign:
    """Arrays by the names of PyTorch, as this package exports them, or by paths of Flax, joined by "/"."""
    try:
        arrays = files.load_npz(path)
    except ValueError as error:
        raise _Malformed(f"its archive is damaged ({one_line(error)})") from None
    if not arrays:
        raise _Malformed("it holds no arrays")
    if any("/" in name for name in arrays):
        return _flax_tree(traverse_util.unflatten_dict(arrays, sep="/"))
    return _named_arrays(arrays)


# -- Flax --


_MOST_AXES = 32


def _flax_checkpoint(path: pathlib.Path) -> Foreign:
    limits = {"max_array_len": _MOST_AXES, "max_map_len": 100_000}
    try:
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=_extension, raw=False, strict_map_key=True, **limits)
        return _flax_tree(_joined(tree))
    except (KeyError, ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise _Malformed(f"its msgpack is damaged ({one_line(error)})") from None


def _flax_tree(tree: Any) -> Foreign:
    """The official State, {optimizer: {target, state}, params_ema, step, ...}, a TrainState, {params, opt_state, step},
    what a module's init returns, {params}, or the tree of parameters alone."""
    leaves = _leaves(_expect(tree, dict))
    model, ema = _roles([(way, leaf) for way, leaf in leaves if isinstance(leaf, np.ndarray)])
    if not model and not ema:
        raise _Malformed("it holds no arrays that could be parameters of a config's network")
    nested = lambda entries: traverse_util.unflatten_dict(entries) if entries else None
    return Foreign("flax", nested(model), nested(ema), _step_of(leaves))


_ORBAX = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "checkpoint")  # what marks a folder of Orbax


def _orbax(folder: pathlib.Path) -> Foreign:
    """The last step of a folder of Orbax, or the one that it is; its items as one tree."""
    folder = folder.absolute()  # Orbax finds no description by a relative path
    marked = lambda path: any((path / name).is_file() for name in _ORBAX)
    while not marked(folder):
        inside = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        steps = [path for path in inside if re.fullmatch(r"(.*_)?\d+", path.name)]
        if not steps:
            break
        folder = max(steps, key=lambda path: int(path.name.rpartition("_")[2]))
    if all((folder / item).is_dir() for item in ("state", "ema", "meta")):
        raise _Malformed(f"it is a run of this code, which needs no import: --workdir={folder.parent.parent} opens it")
    trees = [path for path in (folder, *sorted(folder.iterdir())) if path.is_dir() and (path / "_METADATA").is_file()]
    reader = ocp.PyTreeCheckpointer()

    def read_tree(path: pathlib.Path) -> Any:
        """The arrays, wherever the devices are that wrote them."""
        described = reader.metadata(path).item_metadata.tree
        return reader.restore(path, restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), described))

    try:
        read = {path.name: read_tree(path) for path in trees}
    except Exception as error:  # Orbax, TensorStore and json raise many types on damaged files
        raise _Malformed(f"its folder of Orbax is damaged ({one_line(error)})") from None
    if not read:
        raise _Malformed("it is a folder, but none of Orbax")
    arrays = jax.tree.map(np.asarray, next(iter(read.values())) if len(read) == 1 else read)
    found = _flax_tree(arrays)
    number = re.search(r"\d+$", folder.name)
    return found._replace(step=int(number[0]) if found.step is None and number else found.step)


def _extension(code: int, data: bytes) -> np.ndarray:
    """Flax's arrays (1) and NumPy scalars (3): shape, name of the type, bytes."""
    if code not in (1, 3):
        raise _Malformed(f"its msgpack uses extension {code}, which no checkpoint needs")
    shape, dtype, buffer = msgpack.unpackb(data, raw=False, max_array_len=_MOST_AXES)
    if dtype not in _TYPES:
        raise _Malformed(f"an array has type {one_line(dtype)}")
    shape = tuple(_expect(n, int) for n in shape)
    if min(shape, default=0) < 0 or math.prod(shape) * _TYPES[dtype].itemsize != len(buffer):
        raise _Malformed(f"an array of shape {shape} has {len(buffer)} bytes")
    return np.frombuffer(buffer, _TYPES[dtype]).reshape(shape)


def _joined(tree: Any) -> Any:
    """The tree with arrays above 2^30 bytes, which Flax writes in chunks, put together."""
    if not isinstance(tree, dict):
        return tree
    if not tree.get("__msgpack_chunked_array__"):
        return {key: _joined(value) for key, value in tree.items()}
    shape, chunks = ([entry[str(i)] for i in range(len(entry))] for entry in (tree["shape"], tree["chunks"]))
    return np.concatenate(chunks).reshape(shape)


def _expect(value: Any, *types: type) -> Any:
    """The value, if of one of the types."""
    if not isinstance(value, types):
        raise _Malformed(f"it has a {type(value).__name__} where a {' or '.join(t.__name__ for t in types)} belongs")
    return value


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
        return {
            key: _array_of(value)
            for key, value in _expect(_unpickled(io.BytesIO(content), calls, strict=True).value, dict).items()
        }
    except (_Malformed, ValueError, IndexError) as error:
        raise UserError(f"{where} is no pickle of arrays: {one_line(error)}") from None


def _array_of(value: Any) -> Any:
    """The array that NumPy's object stands for; any other value as it is."""
    match value:
        case _Object(
            "ndarray", {"": (_, tuple() as shape, _Object("dtype", {"arguments": (str() as code, *_)}), _, data)}
        ):
            data = data.encode("latin-1") if isinstance(data, str) else _expect(data, bytes)
            if code not in ("u1", "|u1") or not all(isinstance(n, int) and n >= 0 for n in shape):
                raise _Malformed(f"it has an array of {one_line(code)} {shape} where unsigned bytes belong")
            return np.frombuffer(data, np.uint8).reshape(shape)
    return value
