"""Import a published checkpoint as an ordinary run folder, or export a run to the PyTorch names.

    python -m tools.import_checkpoint CHECKPOINT --workdir=runs/new [--config=configs/ve/cifar10_ncsnpp_continuous.py]
    python -m tools.import_checkpoint FOLDER --workdir=runs/sd [--variant=fp16]         of diffusers
    python -m tools.import_checkpoint FILE --workdir=runs/sd [--clip=TOKENIZER_FOLDER] [--output=eps]
    python -m tools.import_checkpoint --export=weights.npz --workdir=runs/published

CHECKPOINT is a file of PyTorch (.pth, .pt, .ckpt), of EDM (.pkl) or of JAX (flax msgpack), a folder of Orbax, a
.safetensors or an .npz; or a latent diffusion model, Stable Diffusion 1 and 2 among them, as a folder of diffusers or a
single file, best with its .yaml beside it (docs/latent.md). It is read, never executed: whatever wraps the parameters'
names (DataParallel, compile, Lightning, `state_dict`, `ema` and so on) is taken away, objects beside them are passed
over and named. Without --config the one of configs/ is taken whose network the names and shapes fit, if they fit one
alone; a latent model describes itself. The averaged parameters become both parameters and EMA of the run; --raw takes
the others. Where a file holds one set of parameters, that one is taken.
"""

import functools
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from absl import flags

from experiments import build, latent_runs, program, runs
from experiments.config import package_configs
from score_sde import files, foreign, latent_models, training
from score_sde.errors import UserError
from score_sde.models.names import contents
from score_sde.models.published import convert, to_torch

CONFIG = program.config_flag()
WORKDIR = program.path_flag("workdir", None, "The run folder to write, or with --export to read.")
RAW = flags.DEFINE_bool("raw", False, "Take the parameters themselves instead of their moving average.")
EXPORT = program.path_flag("export", None, "Write a run's averaged parameters to this .npz, under PyTorch names.")
VARIANT = flags.DEFINE_string("variant", "", "Suffix of a diffusers folder's files, as fp16; absent: none, else fp16.")
CLIP = program.path_flag("clip", None, "Folder with the tokenizer of a latent model's single file.")
OUTPUT = flags.DEFINE_enum("output", None, ["eps", "v"], "What a latent model's single file predicts, without a .yaml.")


def main(arguments: list[str]):
    if EXPORT.value is not None:
        export(runs.open_model(WORKDIR.value), EXPORT.value)
    elif len(arguments) != 1 or WORKDIR.value is None:
        raise UserError("give one checkpoint file and --workdir=...")
    else:
        config = program.config_of(CONFIG) if flags.FLAGS["config"].present else None
        name = program.config_file() if config is not None else None
        latent = dict(variant=VARIANT.value, clip=CLIP.value, output=OUTPUT.value or "")
        import_checkpoint(arguments[0], pathlib.Path(WORKDIR.value), config, raw=RAW.value, name=name, latent=latent)


def import_checkpoint(
    file: str,
    workdir: pathlib.Path,
    config=None,
    *,
    raw: bool = False,
    name: str | None = None,
    latent: dict | None = None,
):
    """Read a checkpoint, check every name and shape, and only then write the run folder.

    config: None for the only one of configs/ that fits; name: of the config, for messages.
    raw: take the parameters themselves, not their averages; latent: options of latent_models.read, for one of those.
    """
    if latent_models.is_folder(file):
        import_latent(file, workdir, config, **latent or {})
        return
    read = foreign.read_checkpoint(file)
    if latent_models.is_single_file(read.model or {}):
        import_latent(file, workdir, config, raw=raw, state=read.model, **latent or {})
        return
    sets = [(read.model, "parameters"), (read.ema, "averaged parameters (EMA)")]
    held = [(params, which) for params, which in (sets if raw else sets[::-1]) if params is not None]
    if not held:
        raise UserError(f"{file} holds no parameters")
    params, which = held[0]
    to_ours = functools.partial(convert, read.kind)
    if config is None:
        config = only_fitting(file, fitting_configs(to_ours, params), contents(params))
    try:
        params = to_ours(params, build.network_of(config), build.space_of(config).shape)
    except UserError as error:
        print("the parameters do not fit this config; trying the others ...")
        fitting = [path for path, _ in fitting_configs(to_ours, params)]
        advice = f"it fits {' and '.join(fitting)}" if fitting else "no config of configs/ has a network that it fits"
        raise UserError(f"{file} does not fit {name}: {error}; {advice}") from None
    with runs.whole_or_nothing(workdir, config) as checkpoints:
        state = training.init_state(params, training.make_optimizer(**config.optim))
        checkpoints.save(state._replace(step=np.int32(read.step or 0)), {"imported": str(file)})
    if read.skipped:
        print(f"passed over in {file}: {', '.join(read.skipped)}")
    alone = ", the only ones that it holds" if len(held) == 1 else ""
    print(f"{file}: {read.kind} checkpoint of step {read.step}, took the {which}{alone}")
    print(f"wrote {workdir}; now python sample.py --workdir={workdir}")


def import_latent(file: str, workdir: pathlib.Path, config=None, **options):
    """Read a latent diffusion model, whose files describe its network, and write the run folder."""
    if config is not None:
        raise UserError(f"{file} is a latent diffusion model, which describes itself: leave out --config")
    model = latent_models.read(file, **options)
    latent_runs.write(model, workdir, file)
    network, first = model.unet.network, model.autoencoder.network
    told = f"prompts of {model.text.network.length} tokens" if model.text else "no condition"
    told = told if model.classes is None else f"{len(model.classes) - 1} classes"
    print(
        f"{file}: latent diffusion, {network.out_channels} channels at 1/{first.factor} of the size, output "
        f"{model.output}, {told}"
    )
    example = ' --prompt="a cat" --guidance=7.5 --solver=unipc' if model.text else ""
    print(f"wrote {workdir}; now python sample.py --workdir={workdir}{example}")


def only_fitting(file: str, fitting: list[tuple], held: str):
    """The config that fits alone; which, is printed. held: what the file holds, in words."""
    if len(fitting) == 1:
        print(f"{file} fits {fitting[0][0]}")
        return fitting[0][1]
    names = " or ".join(f"--config={path}" for path, _ in fitting)
    remedy = f"say which one, {names}" if fitting else f"give the --config whose network it is; {held}"
    raise UserError(f"{file} fits {len(fitting) or 'no'} networks of configs/: {remedy}")


def fitting_configs(convert: Callable, params: dict) -> list[tuple]:
    """The files of configs/ whose network takes these parameters, and their configs; the SDE is not told by them."""
    verdicts, fitting = {}, []
    sizes = {size for array in jax.tree.leaves(params) for size in np.shape(array)}
    for path, config in package_configs():
        if build.kind_of(config) == "autoencoder" or config.latents.autoencoder:
            continue  # no published ones
        if not _widths(config.model) <= sizes:
            continue  # to trace each network would take a minute
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
            fitting.append((path, config))
    return fitting


def _widths(fields) -> set[int]:
    """The numbers of channels that the levels of a config's network have, each of them a size of some parameter."""
    return {fields.nf * factor for factor in fields.get("ch_mult", (1,))} if "nf" in fields else set()


def export(model: runs.Model, path: str):
    """Write a run's averaged parameters as arrays that PyTorch loads by name."""
    files.check_writable(pathlib.Path(path).parent)
    if pathlib.Path(path).is_dir():
        raise UserError(f"--export={path} is a folder: name the file to write, as in --export={path}/weights.npz")
    if pathlib.Path(path).is_file():
        raise UserError(f"{path} is there already: choose another --export, or delete it")
    arrays = to_torch(model.params, build.network_of(model.config), model.diffusion.space.shape)
    files.save_npz(path, arrays)
    print(f"wrote {len(arrays)} arrays to {path}; load them with load_state_dict(..., strict=False)")


if __name__ == "__main__":
    program.run(main, files=True)
