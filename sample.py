"""Draw samples from a trained model.

    python sample.py --solver=dpmv3 [--steps=10] [--num_samples=64] [--seed=0] [--workdir=runs/digits]
    python sample.py --solver=dpmpp --option order=3
    python sample.py --solver=pc --steps=1000

Solvers: ddim, dpmpp (DPM-Solver++, multistep), dpmv3 (DPM-Solver-v3; measures EMS first if the run has none), pc
(predictor-corrector). Writes samples.npz, grid.png and run.json to <workdir>/samples/<name>/. A sample depends on its
index and the seed alone, not on the batch size or the number of devices (pc with a corrector: also on its batch).
"""

import ast
import io
import json
import pathlib
import sys
import time

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

import experiment as experiments
from score_sde import VERSION, figures, parallel
from score_sde.errors import UserError
from solvers import predictor_corrector, tableau

WORKDIR = flags.DEFINE_string("workdir", None, "The run folder; the newest under runs/ if absent.")
CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint; the last if absent.")
SOLVER = flags.DEFINE_string("solver", None, "ddim, dpmpp, dpmv3 or pc; the config's if absent.")
STEPS = flags.DEFINE_integer(
    "steps", None, "Network evaluations (pc: time steps); the config's if absent.", lower_bound=1
)
OPTION = flags.DEFINE_multi_string("option", [], "An option of the solver, name=value; may be repeated.")
EMS = flags.DEFINE_string("ems", None, "EMS file for dpmv3; the run's own if absent.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "How many; the config's if absent.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "At a time; the config's if absent.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.")
NAME = flags.DEFINE_string("name", None, "Folder under <workdir>/samples/; made from the solver if absent.")


def main():
    # ------------------------------------------------------------------------------ what to run
    model = experiments.open_model(WORKDIR.value, CHECKPOINT.value)
    experiment = model.experiment
    defaults = experiment.config.sampling
    solver = SOLVER.value or defaults.solver
    steps = STEPS.value or (defaults.pc_steps if solver == "pc" else defaults.steps)
    n = NUM_SAMPLES.value or defaults.num_samples
    batch_size = min(BATCH_SIZE.value or defaults.batch_size, -(-n // jax.device_count()) * jax.device_count())
    parallel.batch_per_device(batch_size)
    draw, nfe, options = (predictor_corrected if solver == "pc" else tabled)(model, solver, steps, parse_options())
    print(f"{n} samples by {solver}, {nfe} evaluations each, {shown(options)}, seed {SEED.value}")

    # ------------------------------------------------------------------------------ sample
    params = parallel.replicate(model.params)
    images, seconds = [], []
    for start in tqdm(range(0, n, batch_size), unit="batch", dynamic_ncols=True):
        began = time.perf_counter()
        x = parallel.gather(draw(params, parallel.shard(np.arange(start, start + batch_size))))
        seconds.append(time.perf_counter() - began)
        if not np.isfinite(x).all():
            bad = start + int(np.argwhere(~np.isfinite(x).all((1, 2, 3)))[0, 0])
            raise UserError(f"sample {bad} is not finite: try another solver, more steps, or another checkpoint")
        images.append(experiment.to_uint8(x))
    images = np.concatenate(images)[:n]

    # ------------------------------------------------------------------------------ write
    record = dict(
        model=dict(workdir=str(model.workdir), step=model.step, identity=model.identity),
        solver=solver,
        steps=steps,
        nfe=nfe,
        options=options,
        seed=SEED.value,
        num_samples=n,
        batch_size=batch_size,
        seconds_per_batch=float(np.median(seconds)),
        seconds_of_first_batch=seconds[0],
        devices=jax.device_count(),
        platform=jax.default_backend(),
        versions=dict(score_sde=VERSION, jax=jax.__version__, python=sys.version.split()[0]),
        command=" ".join(sys.argv),
    )
    given = [text for text in OPTION.value if "/" not in text]
    name = NAME.value or "-".join([f"step{model.step}", solver, str(steps), *given, f"seed{SEED.value}"])
    folder = model.workdir / "samples" / name
    write(folder, images, record)
    print(f"wrote {folder}/samples.npz, grid.png and run.json")


def parse_options() -> dict:
    """--option name=value pairs; values are Python literals or plain words."""
    options = {}
    for text in OPTION.value:
        name, sign, value = text.partition("=")
        if not sign:
            raise UserError(f"--option {text}: expected name=value, as in --option order=2")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def shown(options: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "no options"


def tabled(model, solver: str, steps: int, options: dict):
    """(draw, evaluations, options) of a few-step solver."""
    experiment = model.experiment
    ems = experiments.ems_of(model, EMS.value) if solver == "dpmv3" else None
    table, options = experiments.build_tableau(model, solver, steps, ems, **options)

    def one_device(params, table, index):
        x = experiments.prior(experiment, experiments.sample_keys(SEED.value, index))
        return tableau.solve(experiment.noise_of(params), table, x)

    on_devices = parallel.pmap(one_device, in_axes=(0, None, 0))
    table = jax.tree.map(np.float32, table)
    return lambda params, index: on_devices(params, table, index), steps, options


def predictor_corrected(model, solver: str, steps: int, options: dict):
    """(draw, evaluations, options) of the predictor-corrector sampler."""
    experiment, fields = model.experiment, model.experiment.config.sampling
    known = ("predictor", "corrector", "corrector_steps", "snr", "probability_flow", "denoise")
    for name in options:
        if name not in known:
            raise UserError(f"solver pc has no option {name!r}: it has {', '.join(known)}")
    options = {name: fields[name] for name in known} | options

    def one_device(params, index):
        keys = experiments.sample_keys(SEED.value, index)
        later = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
        return predictor_corrector.sample(
            experiment.noise_of(params),
            experiment.sde,
            experiments.prior(experiment, keys),
            predictor_corrector.noise_of_keys(later, experiment.image_shape),
            n=steps,
            **options,
        )

    counted = {name: options[name] for name in ("predictor", "corrector", "corrector_steps")}
    nfe = predictor_corrector.evaluations(steps, **counted)
    jax.eval_shape(one_device, model.params, np.arange(1))  # options that have no meaning speak up now
    return parallel.pmap(one_device), nfe, options


def write(folder: pathlib.Path, images: np.ndarray, record: dict):
    """samples.npz (uint8 NHWC, key `samples`), grid.png, run.json."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, samples=images)
    experiments.write_atomically(folder / "samples.npz", buffer.getvalue())
    figures.save_grid(folder / "grid.png", images[:256])
    experiments.write_atomically(folder / "run.json", json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    experiments.run(main)
