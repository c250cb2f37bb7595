"""Averages of a run's parameters of any width, from the power-function averages that it kept."""

import pathlib
import shutil

import jax
import numpy as np

from experiments import build, parts, runs
from score_sde import checkpoint, power_ema, training
from score_sde.errors import UserError
from score_sde.power_ema import Profile

MISSING = 0.1  # of a profile, above which a combination is refused


def write(workdir: str | pathlib.Path, std: float, out: str | pathlib.Path, step: int | None = None):
    """Write the average of relative width `std` at a step of a run, the last if None, as a run folder `out`.

    UserError where the run kept no power-function averages, or too few to come within MISSING of this one.
    """
    workdir, out, gamma = pathlib.Path(workdir), pathlib.Path(out), power_ema.gamma_of(std)
    config = runs.read_config(workdir)
    widths = config.training.power_ema
    if not widths:
        raise UserError(
            f"{workdir} kept no power-function averages: train with --config.training.power_ema='(0.05,0.1)'"
        )
    checkpoints, optimizer = checkpoint.Checkpoints(workdir), training.make_optimizer(**config.optim)
    end = checkpoints.step_or_last(step)
    init = build.trainable(config, build.autoencoder_params(config, workdir)).init
    template = jax.eval_shape(
        lambda key: training.init_state(init(key), optimizer, power_averages=len(widths)), jax.random.key(0)
    )
    gammas, steps = [power_ema.gamma_of(width) for width in widths], [k for k in checkpoints.steps() if k <= end]
    profiles = [Profile(gamma, k) for k in steps for gamma in gammas]
    weights, missing = power_ema.combination(profiles, Profile(gamma, end))
    if missing > MISSING:
        raise UserError(
            f"the averages that {workdir} kept at steps {', '.join(map(str, steps))} miss {missing:.0%} of the profile "
            f"of width {std:g}: take a width nearer to {' or '.join(f'{width:g}' for width in widths)}, or keep more "
            "checkpoints, training.keep_freq"
        )
    with runs.whole_or_nothing(out, config, "--out") as written:
        total, state = None, None
        for i, k in enumerate(steps):
            state = checkpoints.restore(k, template)[0]
            own = weights[i * len(widths) : (i + 1) * len(widths)]
            part = jax.tree.map(lambda *leaves, own=own: np.tensordot(own, np.stack(leaves), 1), *state.power_ema)
            total = part if total is None else jax.tree.map(np.add, total, part)
        average = jax.tree.map(np.float32, total)
        for name in (runs.CLASSES, runs.START, parts.file_of(parts.AUTOENCODER)):
            if (workdir / name).exists():
                shutil.copy(workdir / name, out / name)
        written.save(state._replace(params=average, ema=average), {"averaged": f"width {std:g} of {workdir}"})
    print(f"width {std:g} at step {end} from {len(profiles)} averages, within {missing:.1%} of its profile")
    print(f"wrote {out}; now python sample.py --workdir={out}")
