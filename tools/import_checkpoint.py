"""Import a published checkpoint as an ordinary run folder, or export a run to the PyTorch names.

    python -m tools.import_checkpoint CHECKPOINT --config=configs/ve/cifar10_ncsnpp_continuous.py --workdir=runs/new
    python -m tools.import_checkpoint --export=weights.npz --workdir=runs/published

CHECKPOINT is a file of the official code: PyTorch (.pth with model, EMA shadow list, step) or JAX (flax msgpack). It is
read, never executed. The averaged parameters become both parameters and EMA of the run; --raw takes the others.
"""

import pathlib
import shutil
from collections.abc import Callable

import numpy as np
from absl import flags

from experiments import build, program, runs
from experiments.config import package_configs
from score_sde import checkpoint, files, foreign, training
from score_sde.errors import UserError
from score_sde.models.published import from_flax, from_torch, to_torch

CONFIG = program.config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "The run folder to write, or with --export to read.")
RAW = flags.DEFINE_bool("raw", False, "Take the parameters themselves instead of their moving average.")
EXPORT = flags.DEFINE_string("export", None, "Write a run's averaged parameters to this .npz, under PyTorch names.")


def main(arguments: list[str]):
    if EXPORT.value is not None:
        export(runs.open_model(WORKDIR.value), EXPORT.value)
    elif len(arguments) != 1 or WORKDIR.value is None:
        raise UserError("give one checkpoint file, --config=... and --workdir=...")
    else:
        config, name = program.config_of(CONFIG), program.config_file()
        import_checkpoint(arguments[0], config, pathlib.Path(WORKDIR.value), raw=RAW.value, name=name)


def import_checkpoint(file: str, config, workdir: pathlib.Path, *, raw: bool = False, name: str = "the config"):
    """Read a checkpoint, check every name and shape, and only then write the run folder.

    raw: take the parameters themselves, not their averages; name: of the config, for messages.
    """
    network, shape = build.network_of(config), build.diffusion_of(config).space.shape
    read = foreign.read_checkpoint(file)
    params = read.model if raw else read.ema
    which = "parameters" if raw else "averaged parameters (EMA)"
    if params is None:
        other = "--raw takes the parameters" if read.model is not None else "it has neither"
        raise UserError(f"{file} holds no {which}: {other}")
    convert = {"torch": from_torch, "flax": from_flax}[read.kind]
    try:
        params = convert(params, network, shape)
    except UserError as error:
        print("the parameters do not fit this config; trying the others ...")
        fitting = fitting_configs(convert, params)
        advice = f"it fits {' and '.join(fitting)}" if fitting else "no config of configs/ has a network that it fits"
        raise UserError(f"{file} does not fit {name}: {error}; {advice}") from None
    if workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"{workdir} is not empty: choose another --workdir")
    try:
        runs.claim_workdir(workdir, config)
        checkpoints = checkpoint.Checkpoints(workdir, keep_every=1)
        state = training.init_state(params, training.make_optimizer(**config.optim))
        checkpoints.save(state._replace(step=np.int32(read.step or 0)), {"imported": str(file)})
        checkpoints.wait()
    except BaseException:
        shutil.rmtree(workdir, ignore_errors=True)
        raise
    print(f"{file}: {read.kind} checkpoint of step {read.step}, took the {which}")
    print(f"wrote {workdir}; now python sample.py --workdir={workdir}")


def fitting_configs(convert: Callable, params: dict) -> list[str]:
    """The files of configs/ whose network takes these parameters; the SDE is not told by them."""
    verdicts, fitting = {}, []
    for path, config in package_configs():
        if build.is_classifier(config):
            continue
        shape = build.space_of(config).shape
        key = (str(config.model), shape)
        if key not in verdicts:
            network = build.network_of(config)
            try:
                convert(params, network, shape)
                verdicts[key] = True
            except UserError:
                verdicts[key] = False
        if verdicts[key]:
            fitting.append(path)
    return fitting


def export(model: runs.Model, path: str):
    """Write a run's averaged parameters as arrays that PyTorch loads by name."""
    arrays = to_torch(model.params, build.network_of(model.config), model.diffusion.space.shape)
    files.save_npz(path, arrays)
    print(f"wrote {len(arrays)} arrays to {path}; load them with load_state_dict(..., strict=False)")


if __name__ == "__main__":
    program.run(main, files=True)
