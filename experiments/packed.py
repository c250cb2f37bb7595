"""Averaged parameters in half precision, in one .npz that is small enough to be kept with the code.

A packed model is a folder of config.json, ema.npz, ems.npz and card.md (`python -m tools.pack`). Its parameters
are the rounded ones: whatever is measured of it is measured with these.
"""

import json
import pathlib

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from score_sde import checkpoint, files
from score_sde.errors import UserError

NAME = "ema.npz"


def is_packed(folder) -> bool:
    """Whether a folder holds a packed model, not a run."""
    return (pathlib.Path(folder) / NAME).is_file()


def rounded(params) -> dict:
    """Parameters as float16 holds them, in float32; UserError if any is beyond its range."""
    with np.errstate(over="ignore"):
        params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float16).astype(np.float32), params)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise UserError(f"half precision holds numbers up to {np.finfo(np.float16).max:g}: these parameters are beyond")
    return params


def save(folder, params, provenance: dict):
    """Write ema.npz: `rounded` parameters in float16 by path, and `provenance`, which names at least their step."""
    arrays = {name: leaf.astype(np.float16) for name, leaf in flatten_dict(params, sep="/").items()}
    provenance = provenance | dict(identity=checkpoint.identity(params))
    files.save_npz(
        pathlib.Path(folder) / NAME, arrays | {"provenance": json.dumps(provenance, sort_keys=True)}, compressed=True
    )


def provenance(folder) -> dict:
    """How a packed model came about, without its parameters."""
    path = pathlib.Path(folder) / NAME
    with files.reading(path, "holds no packed model", "pack it again, python -m tools.pack"):
        return dict(json.loads(str(files.load_npz(path, ["provenance"])["provenance"])))


def load(folder, template) -> tuple[dict, dict]:
    """The parameters, in float32, and their provenance; refused unless they are the template's and what was packed."""
    path = pathlib.Path(folder) / NAME
    with files.reading(path, "holds no packed model", "pack it again, python -m tools.pack"):
        arrays = files.load_npz(path)
        provenance = json.loads(str(arrays.pop("provenance")))
        params = unflatten_dict({name: leaf.astype(np.float32) for name, leaf in arrays.items()}, sep="/")
        if checkpoint.identity(params) != provenance["identity"]:
            raise ValueError("its arrays are not what was packed")
    if checkpoint.layout(params) != checkpoint.layout(template):
        raise UserError(f"{path} does not fit the network of config.json beside it: pack both again")
    return params, provenance
