"""Checkpoints of a run: written by Orbax in the background, read back only if they fit."""

import contextlib
import hashlib
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization
from flax.traverse_util import flatten_dict

from score_sde.errors import UserError
from score_sde.training import State


class Checkpoints:
    """The folder <workdir>/checkpoints: one sub-folder a step, with `state`, `ema` and `meta` inside.

    keep_every: keep checkpoints at multiples of this many steps for good, besides the newest two.
    """

    def __init__(self, workdir, keep_every: int | None = None):
        self.folder = pathlib.Path(workdir).resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=2, keep_period=keep_every, create=keep_every is not None)
        arrays = ocp.StandardCheckpointHandler
        handlers = {"state": arrays(), "ema": arrays(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Steps that can be restored, in order."""
        return sorted(self._manager.all_steps()) if self.folder.is_dir() else []

    def save(self, state: State, meta: dict):
        """Start writing a state of host arrays that nobody else changes; training goes on meanwhile."""
        step = int(state.step)
        if step in self.steps():
            return
        save = ocp.args.StandardSave
        items = {"state": save(_rest(state)), "ema": save(state.ema)}
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items))

    def wait(self):
        """Until what was started is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self):
        """A disk that refuses, told by Orbax's background writer as whatever it was, as one line."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            full = "RESOURCE_EXHAUSTED" in str(error)
            reason = "the disk is full" if full else " ".join(str(error).split())[:200]
            raise UserError(
                f"cannot write a checkpoint to {self.folder}: {reason}: free some space, continue from the last one"
            ) from None

    def restore(self, step: int, template: State) -> tuple[State, dict]:
        """The state and meta of a step, of the template's tree, shapes and types, as host arrays."""
        restored = self._read(step, state=_rest(template), ema=template.ema)
        return serialization.from_state_dict(template, restored.state | {"ema": restored.ema}), restored.meta

    def restore_ema(self, step: int, template) -> dict:
        """The averaged parameters of a step alone."""
        return self._read(step, ema=template).ema

    def step_or_last(self, step: int | None) -> int:
        """`step` if it can be restored, the last one if None."""
        steps = self.steps()
        if not steps:
            raise UserError(f"no finished checkpoint in {self.folder}: train first (python train.py --workdir=...)")
        if step is not None and step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self.folder}: there are {', '.join(map(str, steps))}")
        return steps[-1] if step is None else step

    def _read(self, step: int, **templates):
        for name, template in templates.items():
            self._check(step, name, template)
        as_numpy = lambda tree: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
        items = {name: ocp.args.StandardRestore(as_numpy(template)) for name, template in templates.items()}
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore(), **items))

    def _check(self, step: int, name: str, template):
        """Refuse a checkpoint of another network by the first leaf that does not fit."""
        ours = {"/".join(path): tuple(leaf.shape) for path, leaf in flatten_dict(template).items()}
        stored = flatten_dict(self._manager.item_metadata(step)[name].tree)
        theirs = {"/".join(path): tuple(leaf.shape) for path, leaf in stored.items()}
        for leaf in sorted(ours.keys() | theirs.keys()):
            if ours.get(leaf) != theirs.get(leaf):
                raise UserError(
                    f"checkpoint {self.folder / str(step)} does not fit this config's network: {name}/{leaf} is "
                    f"{theirs.get(leaf, 'absent')} there and {ours.get(leaf, 'absent')} here: use the run's own config"
                )


def _rest(state: State) -> dict:
    """All of a state but its EMA, as nested dicts that a reader understands without this code."""
    rest = serialization.to_state_dict(state)
    del rest["ema"]
    return rest


def identity(params) -> str:
    """A short hash of parameters, by which files made from them are known to belong to them."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:12]
