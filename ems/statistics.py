"""The statistics l, s, b of a model (EMS), on a grid of half-log-SNR, and their file.

Zheng et al. 2023, sec. 3.2: l makes f = (sigma eps - l x) / alpha vary least with x; s and b fit f' = s f + b along the
ODE. All are per pixel.
"""

import dataclasses
import json
import os
import pathlib
from typing import NamedTuple

import numpy as np

from score_sde.errors import UserError
from score_sde.sde import SDE


class EMS(NamedTuple):
    """Statistics at N + 1 nodes, from the prior to the end of sampling; float64 on the host."""

    t: np.ndarray  # (N + 1,)
    lam: np.ndarray  # (N + 1,), rising
    l: np.ndarray  # (N + 1, H, W, C)
    s: np.ndarray
    b: np.ndarray
    origin: dict  # what they were measured on: SDE, checkpoint, number of images, ...


def describe_sde(sde: SDE) -> dict:
    """The SDE as plain values, for files."""
    return {"name": type(sde).__name__, **dataclasses.asdict(sde)}


def check_sde(ems: EMS, sde: SDE):
    """Refuse statistics of another SDE: their nodes' lam would silently mean other times."""
    lam = sde.lam(ems.t)
    if not np.allclose(lam, ems.lam, rtol=1e-6, atol=1e-3):
        raise UserError(
            f"these EMS belong to another SDE: measured under {ems.origin.get('sde', 'an unnamed SDE')}, "
            f"asked for {describe_sde(sde)}: measure them again (python -m ems)"
        )


def save(path, ems: EMS):
    """Write one .npz, atomically; every field under its name, `origin` as JSON text."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **{**ems._asdict(), "origin": json.dumps(ems.origin)})
    os.replace(temporary, path)


def load(path) -> EMS:
    """Read what `save` wrote."""
    try:
        with np.load(path, allow_pickle=False) as file:
            fields = {name: file[name] for name in EMS._fields}
        origin = json.loads(str(fields.pop("origin")))
        fields = {name: np.asarray(value, np.float64) for name, value in fields.items()}
    except FileNotFoundError:
        raise UserError(f"no EMS file {path}: measure them with python -m ems") from None
    except Exception as error:
        raise UserError(f"{path} is not an EMS file ({error}): measure them again with python -m ems") from None
    n = len(fields["t"])
    for name in ("lam", "l", "s", "b"):
        if len(fields[name]) != n or not np.isfinite(fields[name]).all():
            raise UserError(f"{path}: {name} is damaged (shape {fields[name].shape}, {n} nodes expected, all finite)")
    return EMS(**fields, origin=origin)


def from_published(l, s, b, sde: SDE, *, t_start: float, t_end: float, origin: dict) -> EMS:
    """Statistics in the published layout, arrays (N + 1, C, H, W) without a grid: nodes uniform in lam."""
    lam = np.linspace(sde.lam(np.float64(t_start)), sde.lam(np.float64(t_end)), len(l))
    t = sde.t_of_lam(lam)
    t[0], t[-1] = t_start, t_end
    channels_last = lambda values: np.moveaxis(np.asarray(values, np.float64), 1, -1)
    return EMS(t, lam, channels_last(l), channels_last(s), channels_last(b), origin)
