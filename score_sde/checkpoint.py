"""Checkpoints of a run: written by Orbax in the background, read back only if they are whole and fit."""

import contextlib
import hashlib
import json
import pathlib
import shutil
import zlib
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization
from flax.traverse_util import flatten_dict, path_aware_map

from score_sde import parallel
from score_sde.errors import UserError, one_line
from score_sde.training import State

T = TypeVar("T")


class Damaged(UserError):
    """A checkpoint that cannot be read, or does not hold what was written."""


class Checkpoints:
    """The folder <workdir>/checkpoints: one sub-folder a step, with `state`, `ema` and `meta` inside.

    keep_every: keep checkpoints at multiples of this many steps for good, besides the newest two; None to read only.

    Where several processes see the folder, the first writes, and each reads for itself.
    """

    def __init__(self, workdir, keep_every: int | None = None):
        self.folder = pathlib.Path(workdir).resolve() / "checkpoints"
        self._keep_every, self._writes = keep_every, keep_every is not None and parallel.writes()
        if self._writes:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        """Orbax's manager of the folder as it is now, for this process by itself."""
        me = parallel.process()["process_index"]
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            keep_period=self._keep_every,
            create=False,
            cleanup_tmp_directories=self._writes,  # what a killed run left half-written
            lightweight_initialize=True,  # reads no metadata, which may be damaged
            multiprocessing_options=alone,
        )
        arrays = lambda: ocp.StandardCheckpointHandler(multiprocessing_options=alone)
        meta = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
        handlers = {"state": arrays(), "ema": arrays(), "meta": meta}
        return ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Steps that can be restored, in order."""
        return sorted(self._manager.all_steps()) if self.folder.is_dir() else []

    def save(self, state: State, meta: dict):
        """Start writing a state of host arrays that nobody else changes; training goes on meanwhile."""
        step = int(state.step)
        if not self._writes or step in self.steps():
            return
        items = {"state": _rest(state), "ema": state.ema}
        sums = {name: [_crc(layout(tree)), checksum(tree)] for name, tree in items.items()} | {"meta": _crc(meta)}
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        with self._writing():
            self._manager.save(
                step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta | {"checksums": sums}), **arrays)
            )

    def wait(self):
        """Until what was started is on disk, in every process."""
        with self._writing():
            self._manager.wait_until_finished()
        parallel.wait_for_all("checkpoints are written")

    @contextlib.contextmanager
    def _writing(self):
        """A disk that refuses, told by Orbax's background writer as whatever it was, as one line."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            full = "RESOURCE_EXHAUSTED" in str(error)
            reason = "the disk is full" if full else one_line(error)
            raise UserError(
                f"cannot write a checkpoint to {self.folder}: {reason}: free some space, continue from the last one"
            ) from None

    def restore(self, step: int, template: State) -> tuple[State, dict]:
        """The state and meta of a step, of the template's tree and shapes, as host arrays of the types on disk."""
        arrays, meta = self._read(step, state=_rest(template), ema=template.ema)
        rest = serialization.to_state_dict(template) | arrays.state
        return serialization.from_state_dict(template, rest | {"ema": arrays.ema}), meta

    def restore_ema(self, step: int, template) -> dict:
        """The averaged parameters of a step alone."""
        return self._read(step, ema=template)[0].ema

    def step_or_last(self, step: int | None) -> int:
        """`step` if it can be restored, the last one if None."""
        steps = self.steps()
        if not steps:
            raise UserError(f"no finished checkpoint in {self.folder}: train first (python train.py --workdir=...)")
        if step is not None and step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self.folder}: there are {', '.join(map(str, steps))}")
        return steps[-1] if step is None else step

    def last(self, read: Callable[[int], T]) -> tuple[int, T] | None:
        """The last step that `read`, such as `restore`, does not find damaged, and what it returns; None if no steps.

        Says which steps are passed over; a writer puts them aside, so that their steps can be written again.
        Where there are several processes, all must arrive at the same step.
        """
        steps, found = self.steps(), None
        for step in reversed(steps):
            try:
                found = step, read(step)
                break
            except Damaged as error:
                print(f"passed over: {str(error).rpartition(': ')[0]}")
                if self._writes:
                    aside = self.folder / f"{step}.damaged"
                    shutil.rmtree(aside, ignore_errors=True)
                    (self.folder / str(step)).rename(aside)
                    self._manager = self._open()
        if steps and found is None:
            raise UserError(f"no checkpoint in {self.folder} is whole: start a new run in another --workdir")
        step = found[0] if found else -1
        if parallel.agreed(step) != step:
            raise UserError(
                f"this process finds step {step} last in {self.folder}, the first process another: "
                "give all processes one folder that all see, and start again"
            )
        return found

    def _read(self, step: int, **templates):
        """The items of a step and its meta, refused if they are not what was written, or do not fit."""
        folder = self.folder / str(step)
        with self._reading(folder):
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
            sums = meta.pop("checksums", None)  # older versions wrote none
            intact = sums is None or sums["meta"] == _crc(meta)
            trees = {name: self._manager.item_metadata(step)[name].tree for name in templates}
            stored = {name: layout(tree) for name, tree in trees.items()}
            if not intact or any(sums and sums[name][0] != _crc(found) for name, found in stored.items()):
                raise ValueError("its description is not what was written")
        for name, template in templates.items():
            check_fit(folder, name, layout(template), stored[name])
        items = {name: ocp.args.StandardRestore(_zeros(templates[name], tree)) for name, tree in trees.items()}
        with self._reading(folder):
            arrays = self._manager.restore(step, args=ocp.args.Composite(**items))
            if any(sums and sums[name][1] != checksum(arrays[name]) for name in templates):
                raise ValueError("its arrays are not what was written")
        return arrays, meta

    @contextlib.contextmanager
    def _reading(self, folder):
        """Whatever Orbax, TensorStore or json raise on damaged files, as one line."""
        try:
            yield
        except Exception as error:
            reason = one_line(error, 150)
            raise Damaged(
                f"checkpoint {folder} is damaged ({reason}): take another step, or name none for the last whole one"
            ) from None


def check_fit(folder, name: str, ours: dict, theirs: dict):
    """Refuse a checkpoint of another network by the first leaf that does not fit."""
    for leaf in sorted(ours.keys() | theirs.keys()):
        if ours.get(leaf) != theirs.get(leaf):
            raise UserError(
                f"checkpoint {folder} does not fit this config's network: {name}/{leaf} is "
                f"{theirs.get(leaf, 'absent')} there and {ours.get(leaf, 'absent')} here: use the run's own config"
            )


def layout(tree) -> dict[str, tuple[int, ...]]:
    """Shapes of a tree of nested dicts by path."""
    return {"/".join(path): tuple(leaf.shape) for path, leaf in flatten_dict(tree).items()}


def _zeros(template, stored) -> dict:
    """Host arrays of the template's tree and shapes, of the types of `stored`, a tree of the same leaves."""
    types = {path: leaf.dtype for path, leaf in flatten_dict(stored).items()}
    return path_aware_map(lambda path, leaf: np.zeros(leaf.shape, types[path]), template)


def _rest(state: State) -> dict:
    """All of a state but its EMA, as nested dicts that a reader understands without this code."""
    rest = serialization.to_state_dict(state)
    del rest["ema"]
    return rest if state.power_ema else {name: tree for name, tree in rest.items() if name != "power_ema"}


def _crc(plain: dict) -> int:
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def checksum(tree) -> int:
    """CRC-32 of the arrays of a tree and their paths: 4 GB/s, against 1.3 of a hash that resists intent."""
    total = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        total = zlib.crc32(jax.tree_util.keystr(path).encode(), total)
        total = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), total)
    return total


def identity(params) -> str:
    """A short hash of parameters, by which files made from them are known to belong to them."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:12]
