"""Import a published checkpoint as an ordinary run folder, or export a run to the PyTorch names.

    python -m tools.import_checkpoint CHECKPOINT --config=configs/ve/cifar10_ncsnpp_continuous.py --workdir=runs/new
    python -m tools.import_checkpoint --export=weights.npz --workdir=runs/published

CHECKPOINT is a file of the official code: PyTorch (.pth with model, EMA shadow list, step) or JAX (flax msgpack). It is
read, never executed. The averaged parameters become both parameters and EMA of the run; --raw takes the others.
"""

import importlib
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
from absl import flags

import configs
from configs import base, models
from experiments import program, runs
from experiments.build import build, build_network, image_shape
from score_sde import checkpoint, files, foreign, training
from score_sde.errors import UserError
from score_sde.models.classifier import CLASSIFIERS
from score_sde.models.published import from_flax, from_torch, to_torch

CONFIG = program.config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "The run folder to write, or with --export to read.")
RAW = flags.DEFINE_bool("raw", False, "Take the parameters themselves instead of their moving average.")
EXPORT = flags.DEFINE_string("export", None, "Write a run's averaged parameters to this .npz, under PyTorch names.")


def main(arguments: list[str]):
    if EXPORT.value is not None:
        export()
    elif len(arguments) != 1 or WORKDIR.value is None:
        raise UserError("give one checkpoint file, --config=... and --workdir=...")
    else:
        load(arguments[0])


def load(file: str):
    """Read, check every name and shape, and only then write the run folder."""
    config = program.config_of(CONFIG)
    experiment = build(config)
    found = foreign.read_checkpoint(file)
    params = found.model if RAW.value else found.ema
    which = "parameters" if RAW.value else "averaged parameters (EMA)"
    if params is None:
        other = "--raw takes the parameters" if found.model is not None else "it has neither"
        raise UserError(f"{file} holds no {which}: {other}")
    convert = {"torch": from_torch, "flax": from_flax}[found.kind]
    try:
        params = convert(params, experiment.network, experiment.image_shape)
    except UserError as error:
        print("the parameters do not fit this config; trying the others ...")
        fitting = fitting_configs(convert, params)
        advice = f"it fits {' and '.join(fitting)}" if fitting else "no config of configs/ has a network that it fits"
        raise UserError(f"{file} does not fit {flags.FLAGS['config'].config_filename}: {error}; {advice}") from None
    workdir = pathlib.Path(WORKDIR.value)
    if workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"{workdir} is not empty: choose another --workdir")
    try:
        runs.claim_workdir(workdir, config)
        checkpoints = checkpoint.Checkpoints(workdir, keep_every=1)
        state = training.init_state(params, training.make_optimizer(**config.optim))
        checkpoints.save(state._replace(step=np.int32(found.step or 0)), {"imported": str(file)})
        checkpoints.wait()
    except BaseException:
        shutil.rmtree(workdir, ignore_errors=True)
        raise
    print(f"{file}: {found.kind} checkpoint of step {found.step}, took the {which}")
    print(f"wrote {workdir}; now python sample.py --workdir={workdir}")


def fitting_configs(convert: Callable, params: dict) -> list[str]:
    """The files of configs/ whose network takes these parameters; the SDE is not told by them."""
    folder, verdicts, fitting = pathlib.Path(configs.__file__).parent, {}, []
    for path in sorted(folder.rglob("[!_]*.py")):
        module = importlib.import_module(".".join(path.relative_to(folder.parent).with_suffix("").parts))
        if module in (base, models):
            continue
        config = module.get_config()
        if config.model.name in CLASSIFIERS:
            continue
        shape = image_shape(config)
        key = (str(config.model), shape)
        if key not in verdicts:
            network = build_network(config)
            try:
                convert(params, network, shape)
                verdicts[key] = True
            except UserError:
                verdicts[key] = False
        if verdicts[key]:
            fitting.append(str(path.relative_to(folder.parent)))
    return fitting


def export():
    """The averaged parameters of a run's last checkpoint, as arrays that PyTorch loads by name."""
    model = runs.open_model(WORKDIR.value)
    arrays = to_torch(model.params, model.experiment.network, model.experiment.image_shape)
    files.save_npz(EXPORT.value, arrays)
    print(f"wrote {len(arrays)} arrays to {EXPORT.value}; load them with load_state_dict(..., strict=False)")


if __name__ == "__main__":
    program.run(main, files=True)
