"""Scalars read back from TensorBoard's event files.

A file is a sequence of records: length (uint64), its CRC, a protocol buffer of that length, its CRC.
"""

import pathlib
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event


class Curve(NamedTuple):
    """A scalar by step, rising."""

    steps: np.ndarray
    values: np.ndarray


def records(path: pathlib.Path) -> Iterator[Event]:
    """The whole records of a file up to a damaged one; a killed writer may have left part of one at its end."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        while len(head := file.read(12)) == 12 and (length := struct.unpack("<Q", head[:8])[0]) <= size:
            body = file.read(length)
            if len(file.read(4)) < 4:
                return
            try:
                event = Event.FromString(body)
            except DecodeError:
                return
            yield event


DEVICES = "devices"  # the tag of the text that names them


def scalars(folder: pathlib.Path, last_step: int) -> tuple[dict[str, Curve], float, list[str]]:
    """Curves by tag of all event files of a folder up to a step, their hours without pauses between files, the devices.

    Where a resumed run went over steps again, the later file counts.
    """
    found, seconds, devices = {}, 0.0, []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        times = []
        for event in records(path):
            if event.step > last_step:
                break
            times.append(event.wall_time)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
                elif value.tag.startswith(f"{DEVICES}/"):
                    devices.append(value.tensor.string_val[0].decode())
        seconds += times[-1] - times[0] if times else 0
    curves = {tag: Curve(*map(np.array, zip(*sorted(values.items()), strict=True))) for tag, values in found.items()}
    return curves, seconds / 3600, list(dict.fromkeys(devices))


MEAN_OF = 20  # the last values logged


def training(folder: pathlib.Path, last_step: int) -> tuple[dict, Curve, Curve | None] | None:
    """Read what train.py logged: a record of it, the loss, and the averaged parameters' on test images; or None."""
    curves, hours, devices = scalars(folder, last_step)
    if "loss" not in curves:
        return None
    loss, held_out = curves["loss"], curves.get("held-out_loss__EMA_")  # as TensorBoard spells train.py's tag
    last = loss.values[-MEAN_OF:]
    record = dict(steps=last_step, hours=hours, loss=float(last.mean()), loss_values=len(last), devices=devices)
    return record | dict(held_out_loss=None if held_out is None else float(held_out.values[-1])), loss, held_out
