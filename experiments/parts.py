"""The parts of a latent model beside its network, each a file of its run folder: <name>.safetensors, by our paths."""

import pathlib
from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from score_sde import checkpoint, files
from score_sde.errors import UserError, one_line

AUTOENCODER, TEXT, CLASSES, TOKENIZER = "autoencoder", "text", "classes", "tokenizer"  # the last one is a folder


def file_of(name: str) -> str:
    """The name of a part's file."""
    return f"{name}.safetensors"


def save(folder, name: str, params: dict):
    """Write a part's parameters, in the floating-point types that they have, and their identity."""
    arrays = {path: np.ascontiguousarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    content = safetensors.numpy.save(arrays, metadata=dict(identity=checkpoint.identity(params)))
    files.write(pathlib.Path(folder) / file_of(name), content)


def load(folder, name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """A part's parameters; UserError unless they have these shapes, by path, and are what was written."""
    path = pathlib.Path(folder) / file_of(name)
    try:
        with safetensors.safe_open(path, "np") as file:
            identity = (file.metadata() or {}).get("identity")
            params = unflatten_dict({key: file.get_tensor(key) for key in file.keys()}, sep="/")  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {path.name}, which its config.json tells of: restore it, or import the model again"
        ) from None
    except Exception as error:  # the library and the disk raise many types on a damaged file
        raise UserError(f"{path} is damaged ({one_line(error, 100)}): import the model again") from None
    if checkpoint.layout(params) != dict(shapes):
        raise UserError(f"{path} does not fit config.json beside it: import the model again")
    if checkpoint.identity(params) != identity:
        raise UserError(f"{path} is damaged (its arrays are not what was written): import the model again")
    return params
