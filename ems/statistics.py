"""The statistics l, s, b of a model (EMS), on a grid of half-log-SNR, and their file.

Zheng et al. 2023, sec. 3.2: l makes f = (sigma eps - l x) / alpha vary least with x; s and b fit f' = s f + b along the
ODE. All are per pixel.
"""

import dataclasses
import json
import pathlib
from typing import NamedTuple

import numpy as np

from score_sde import files
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
    errors: np.ndarray | None = None  # (3, N + 1) standard errors of l, s, b, root mean square over pixels


def describe_sde(sde: SDE) -> dict:
    """The SDE as plain values, for files."""
    return {"name": type(sde).__name__, **dataclasses.asdict(sde)}


def check_sde(ems: EMS, sde: SDE):
    """Refuse statistics of another SDE: their nodes' lam would silently mean other times."""
    theirs = ems.origin.get("sde", "an unnamed SDE")
    if not np.allclose(sde.lam(ems.t), ems.lam, rtol=1e-6, atol=1e-3):
        raise UserError(
            f"these EMS belong to another SDE: measured under {theirs}, asked for {describe_sde(sde)}: "
            "measure them again (python -m ems)"
        )
    if not np.isclose(ems.t[0], sde.t_max):
        raise UserError(
            f"these EMS start at t={ems.t[0]:g} (measured under {theirs}), sampling starts at t={sde.t_max:g}: "
            "measure them again (python -m ems)"
        )


def save(path, ems: EMS):
    """Write one .npz, atomically; every field under its name, `origin` as JSON text."""
    fields = {name: value for name, value in ems._asdict().items() if value is not None}
    files.save_npz(path, fields | {"origin": json.dumps(ems.origin)}, compressed=True)


def load(path) -> EMS:
    """Read what `save` wrote, now or before it wrote errors."""
    absent = f"no EMS file {path}: measure them with python -m ems"
    with files.reading(path, "is not an EMS file", "measure them again with python -m ems", absent=absent):
        fields = files.load_npz(path, EMS._fields)
        origin = _origin(fields.pop("origin"))
        fields = {name: np.asarray(value, np.float64) for name, value in fields.items()}
        ems = EMS(**fields, origin=origin)
    n, pixels = ems.t.size, ems.l.shape[1:]
    shapes = dict(t=(n,), lam=(n,)) | dict.fromkeys("lsb", (n, *pixels)) | dict(errors=(3, n))
    for name, value in fields.items():
        rising = name != "lam" or (value.shape == (n,) and n > 1 and (np.diff(value) > 0).all())
        pictures = name not in "lsb" or len(pixels) == 3
        if value.shape != shapes[name] or not pictures or not np.isfinite(value).all() or not rising:
            raise UserError(
                f"{path}: {name} is damaged (shape {value.shape}, {n} nodes expected, all finite, lam rising): "
                "measure them again with python -m ems"
            )
    return ems


def _origin(text: np.ndarray) -> dict:
    """The origin of an EMS file."""
    origin = json.loads(str(text))
    if not isinstance(origin, dict):
        raise ValueError("its origin is no dictionary")
    return origin


def load_origin(path) -> dict:
    """The origin alone of an EMS file, without reading its arrays."""
    with files.reading(path, "is not an EMS file", "delete it and measure again, python -m ems"):
        return _origin(files.load_npz(path, ["origin"])["origin"])


def from_published(l, s, b, sde: SDE, *, t_start: float, t_end: float, origin: dict) -> EMS:
    """Statistics in the published layout, arrays (N + 1, C, H, W) without a grid: nodes uniform in lam."""
    lam = np.linspace(sde.lam(np.float64(t_start)), sde.lam(np.float64(t_end)), len(l))
    t = sde.t_of_lam(lam)
    t[[0, -1]] = t_start, t_end
    return EMS(t, lam, *(np.moveaxis(np.asarray(value, np.float64), 1, -1) for value in (l, s, b)), origin)


def load_published(folder, sde: SDE, image_shape: tuple[int, int, int], *, t_end: float, origin: dict) -> EMS:
    """The statistics of a folder with the published files l.npz {l} and sb.npz {s, b}, from t_max to t_end.

    image_shape: (H, W, C) of the model, which tells whether the files have the published layout.
    """
    folder, arrays = pathlib.Path(folder), {}
    for name, keys in (("l.npz", "l"), ("sb.npz", "sb")):
        remedy = "expected l.npz with l, sb.npz with s and b"
        with files.reading(folder / name, "holds no published statistics", remedy):
            stored = files.load_npz(folder / name, keys)
            arrays |= {key: np.asarray(stored[key], np.float64) for key in keys}
    height, width, channels = image_shape
    expected = (channels, height, width)
    for key, values in arrays.items():
        if values.ndim == 4 and values.shape[1:] == tuple(image_shape) != expected:
            raise UserError(
                f"{folder}: {key} is (nodes, H, W, C) = {values.shape}, published files are (nodes, C, H, W): transpose"
            )
        if values.ndim != 4 or values.shape[1:] != expected or values.shape != arrays["l"].shape or len(values) < 2:
            raise UserError(
                f"{folder}: {key} has shape {values.shape}, expected (nodes, {channels}, {height}, {width})"
            )
        if not np.isfinite(values).all():
            raise UserError(f"{folder}: {key} is not finite: the file is damaged")
    return from_published(**arrays, sde=sde, t_start=sde.t_max, t_end=t_end, origin=origin)
