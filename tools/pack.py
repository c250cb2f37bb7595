"""Pack a run into pretrained/<name>: what sample.py needs, small enough to be kept with the code.

    python -m tools.pack --workdir=runs/fashion_mnist [--checkpoint=60000] [--name=fashion_mnist]

The first call writes config.json and ema.npz, the averaged parameters in half precision. The packed model is one of
its own: its EMS and metrics are measured with the rounded parameters, by the commands that this program prints, and are
kept in runs/pretrained/<name>. A further call takes the EMS over into ems.npz, adds what was measured to report.json,
and writes what is known into card.md; it needs the run no more:

    python -m tools.pack --workdir=pretrained/fashion_mnist
"""

import json
import pathlib

import jax
import numpy as np
from absl import flags

from ems import statistics
from ems.statistics import EMS
from experiments import build, measuring, packed, parts, program, runs
from experiments import report as reports
from experiments.config import flat, package_configs, portable
from score_sde import files
from score_sde.errors import UserError

WORKDIR = program.path_flag("workdir", None, "The run folder; the newest under runs/ if absent.")
CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint; the last if absent.")
NAME = program.name_flag("name", None, "Folder under pretrained/; the run folder's name if absent.")
EMS_FILE = program.path_flag("ems", None, "EMS file of the packed model; the best it has if absent.")

AUTOENCODER = parts.file_of(parts.AUTOENCODER)  # of a latent model, in half precision
CARD = ("loss", "bpd", "encoding", "fid", "convergence")  # the metrics on it
EMA_BYTES, ALL_BYTES = 20_000_000, 25_000_000
HALVED_ERROR = 1e-3  # of what half precision may round away of EMS, relative to a node's largest value


def main():
    model = runs.open_model(WORKDIR.value, CHECKPOINT.value, dataset=program.dataset_at())
    if model.config.text or model.config.latents.classes:
        raise UserError(f"{model.name} is told more than times, by parts that are not packed: copy its run folder")
    folder = pack(model, NAME.value, EMS_FILE.value)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    print(f"wrote {folder}: " + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items()))
    if not (folder / "ems.npz").exists():
        print(f"still to measure, then pack again: {measure_ems(folder)}")
    report = reports.read(folder) or {}
    wanted = ("loss", "fid") if model.config.autoencoder else ("loss", "bpd", "fid")
    for metric in [metric for metric in wanted if metric not in report]:
        print(f"still to measure, then pack again: {evaluation(folder, metric)}")


def pack(model: runs.Model, name: str | None = None, ems_path: str | None = None) -> pathlib.Path:
    """Write the folder of a packed model, which is returned, or renew the statistics and card of one.

    name: under pretrained/, the run folder's if None; ems_path: the model's statistics, the best it has if None.
    """
    if not packed.is_packed(model.workdir):
        model = pack_parameters(model, runs.PRETRAINED / (name or model.workdir.name))
    elif name not in (None, model.workdir.name):
        raise UserError(f"{model.workdir} is packed already: leave out --name={name}, or copy the folder")
    folder, results = model.workdir, model.results / "eval"

    # ------------------------------------------------------------------------------ its statistics
    own = folder / "ems.npz"
    if own.exists() and statistics.load_origin(own)["checkpoint"] != model.identity:
        own.unlink()
    measured = pathlib.Path(ems_path) if ems_path else measuring.find(model)
    if measured not in (None, own):
        ems = measuring.load(model, measured)
        origin = ems.origin | dict(data=portable(model.config).data.dataset)
        statistics.save(own, halved(ems._replace(origin=origin)))
    refuse_large(folder, [packed.NAME, own.name, AUTOENCODER], ALL_BYTES, "EMS: measure them with fewer --nodes")

    # ------------------------------------------------------------------------------ its card
    report = dict(model=dict(workdir=str(folder), step=model.step, identity=model.identity))
    for found in (reports.read(folder), reports.read(results)):
        if found is not None and found["model"]["identity"] == model.identity:
            report = reports.joined(report, {name: found[name] for name in CARD if name in found})
    if report.keys() & set(CARD):
        files.write(folder / "report.json", json.dumps(report, indent=1) + "\n")
    files.write(folder / "card.md", card(model, report))
    return folder


def pack_parameters(run: runs.Model, folder: pathlib.Path) -> runs.Model:
    """The packed model of a run; how that came about is kept with the parameters. UserError where another one is."""
    if packed.is_packed(folder) and (there := packed.provenance(folder).get("run")) != run.identity:
        raise UserError(f"{folder} holds the model of another run ({there}): choose another --name")
    files.write(folder / "config.json", json.dumps(portable(run.config).to_dict(), indent=2) + "\n")
    own, *before = runs.history(run)
    before = [made | dict(config=portable(made["config"]).to_dict()) for made in before]
    kept = dict(step=run.step, run=run.identity, training=own["training"], start=before)
    packed.save(folder, packed.rounded(run.params), kept)
    if run.config.autoencoder:
        rounded = packed.rounded(build.autoencoder_params(run.config, run.workdir))
        parts.save(folder, parts.AUTOENCODER, jax.tree.map(np.float16, rounded))
    refuse_large(folder, [packed.NAME], EMA_BYTES, "parameters: pack a smaller network")
    return runs.open_model(str(folder))


def halved(ems: EMS) -> EMS:
    """s and b in half the size of float32 where float16 holds them to HALVED_ERROR, else in float32; l in float32.

    The solver takes the exponential of the integral of l over lam, which magnifies its rounding: in float16 it changes
    samples of 5 evaluations visibly.
    """

    def rounded(values):
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        error = np.abs(half - values).max((1, 2, 3))
        return half if (error <= HALVED_ERROR * np.abs(values).max((1, 2, 3))).all() else values.astype(np.float32)

    return ems._replace(l=ems.l.astype(np.float32), s=rounded(ems.s), b=rounded(ems.b))


def refuse_large(folder, names, limit: int, what: str):
    size = sum((folder / name).stat().st_size for name in names if (folder / name).exists())
    if size > limit:
        raise UserError(
            f"{' and '.join(names)} in {folder} take {size / 1e6:.1f} MB of at most {limit / 1e6:g} for {what}"
        )


def measure_ems(folder) -> str:
    return f"python -m ems --workdir={folder} --num_data=4096"


def evaluation(folder, metric: str) -> str:
    more = " --solver=dpmv3 --steps=10 --num_samples=10000" if metric == "fid" else ""
    return f"python evaluate.py --workdir={folder} --metrics={metric}{more}"


def training_command(config, name: str) -> str | None:
    """The command that trains such a model: a config of this package and what differs from it; None if it has none."""
    theirs = dict(package_configs()).get(f"configs/{name}.py")
    if theirs is None:
        return None
    theirs = flat(theirs)
    plain = lambda value: list(value) if isinstance(value, tuple) else value
    changed = {
        field: value
        for field, value in flat(config).items()
        if plain(value) != plain(theirs.get(field))
        # the dtype is set by `portable`, what there is to tell of an autoencoder by training
        and not field.startswith((*runs.FREE_SECTIONS, "model.dtype", "autoencoder.", "latents.scale"))
    }
    overrides = "".join(f" --config.{field}={value}" for field, value in changed.items())
    return f"`python train.py --config=configs/{name}.py{overrides}`"


def phrase(made: dict) -> str:
    """What `runs.history` tells of a model that another started from."""
    hours = f" in {made['training']['hours']:.1f} hours" if made["training"] else ""
    command = (
        training_command(runs.translated(made["config"], made["name"]), made["name"])
        or "a config that is not kept here"
    )
    return f"{made['identity']}, trained for {made['step']} steps{hours} by {command}"


def card(model, report: dict) -> str:
    """What the model is and how good it is, as far as that was measured."""
    folder, diffusion, config = model.workdir, model.diffusion, portable(model.config)
    made = packed.load(folder, model.params)[1]
    log = made.get("training")  # a model may have been packed before this was kept
    side, channels = config.data.image_size, config.data.num_channels
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(model.params))
    facts = {
        "images": f"{side}x{side}x{channels}, data set {config.data.dataset}",
        "SDE": f"{statistics.describe_sde(diffusion.sde)}",
        "network": f"{config.model.name}, {size / 1e6:.2f} M parameters, half precision",
        "trained by": training_command(config, folder.name) or "that of config.json",
        "steps": f"{model.step} of the config's {config.training.n_iters}, batches of {config.training.batch_size}",
    }
    if config.autoencoder:
        shown, coded = "x".join(map(str, diffusion.space.shape)), build.autoencoder_params(config, folder)
        millions = sum(np.size(leaf) for leaf in jax.tree.leaves(coded)) / 1e6
        facts["latents"] = f"{shown}, times {config.latents.scale:g}, of an autoencoder of {millions:.2f} M parameters"
    if log is not None:
        took = f"{log['hours']:.1f} hours" if log["hours"] >= 1 else f"{60 * log['hours']:.1f} minutes"
        facts["time"] = f"{took} between what was logged first and last, without pauses"
        if log.get("devices"):
            facts["devices"] = ", ".join(log["devices"])
        facts["training loss"] = f"{log['loss']:.5f}, mean of the last {log['loss_values']} logged"
        if log["held_out_loss"] is not None:
            facts["test loss while training"] = f"{log['held_out_loss']:.5f}, averaged parameters, one batch"
    if made.get("start"):
        facts["started from"] = ", which started from ".join(map(phrase, made["start"]))
    facts["identity"] = f"{model.identity}; of the run, in single precision, {made['run']}"
    path = folder / "ems.npz"
    if path.exists():
        origin = statistics.load_origin(path)
        facts["EMS"] = f"{origin['nodes'] + 1} nodes, {origin['num_data']} images of {origin['data']}"
    lines = [f"# {folder.name}: a model in the box", "", *reports.table(["", ""], [list(row) for row in facts.items()])]
    lines += ["", "    python sample.py --solver=dpmv3" + f" --workdir=pretrained/{folder.name}", "", "## Measured", ""]
    for metric in CARD:
        if metric in report:
            found = [line for line in reports.SECTIONS[metric][1](report[metric]) if not line.startswith("![")]
            each = " (each row with its own solver, steps and num_samples)" if metric == "fid" else ""
            lines += [f"`{evaluation(folder, metric)}`{each}", "", *found, ""]
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    program.run(main)
