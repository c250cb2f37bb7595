"""Time this package beside PyTorch and diffusers in one run, on one machine.

    pip install torch diffusers
    python -m benchmarks.peers --config=configs/benchmark.py [--repeats=7] [--rows=convolution,forward]

Rows: a 3x3 convolution, the yardstick of the machine's state; the forward pass and the training step of a denoising
network, ours of the config over all devices (two on a CPU), as the programs compute, and diffusers' UNet2DModel of the
same widths and depth, whose blocks are others, so that GFLOP/s compare and seconds do not; and what DPM-Solver++ 2M
costs besides its network. Calls are timed by turns.
"""

import functools
import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import flags
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import timed
from experiments import build, program
from score_sde import parallel
from score_sde.denoiser import Diffusion
from score_sde.errors import UserError
from solvers import tableau
from solvers.dpm_solver import dpm_solver_pp

CONFIG = program.config_flag()
REPEATS = flags.DEFINE_integer("repeats", 7, "Calls timed of each.", lower_bound=1)
ROWS = flags.DEFINE_list("rows", ["convolution", "forward", "training step", "solver"], "What is timed.")
STEPS = 50  # of the solvers, whose network is free here


def main():
    config = program.config_of(CONFIG)
    diffusion = build.diffusion_of(config)
    batch = config.training.batch_size
    parallel.batch_per_device(batch)
    print(f"jax {jax.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}, CPU; seconds\n")
    print("| | ours | theirs | ours / theirs | our GFLOP | their GFLOP |\n|---|---|---|---|---|---|")
    rows = {
        "convolution": ("3x3 convolution, 128 channels", convolutions),
        "forward": ("forward", functools.partial(forwards, config, diffusion, batch)),
        "training step": ("training step", functools.partial(training_steps, config, diffusion, batch)),
        "solver": (f"DPM-Solver++ 2M, {STEPS} steps without network", functools.partial(solvers, diffusion, batch)),
    }
    if unknown := set(ROWS.value) - set(rows):
        raise UserError(f"--rows={','.join(unknown)}: choose of {', '.join(rows)}")
    for row in ROWS.value:
        name, make = rows[row]
        calls, operations = make()
        ours, theirs = timed.by_turns(calls, range(REPEATS.value + 1))
        counted = " | ".join("" if number is None else f"{number / 1e9:.1f}" for number in operations)
        print(f"| {name} | {ours:.5f} | {theirs:.5f} | {ours / theirs:.2f} | {counted} |", flush=True)


def convolutions():
    """The same convolution of both; its operations."""
    ours, maps, kernel, operations = timed.convolution()
    last = dict(memory_format=torch.channels_last)
    image = torch.tensor(np.array(maps)).permute(0, 3, 1, 2).contiguous(**last)
    weight = torch.tensor(np.array(kernel)).permute(3, 2, 0, 1).contiguous(**last)
    theirs = lambda: torch.nn.functional.conv2d(image, weight, padding=1)
    return (functools.partial(ours, maps, kernel), theirs), (operations, operations)


def their_network(config) -> diffusers.UNet2DModel:
    """diffusers' U-Net of a config's widths, depth, and resolutions with attention."""
    model, side = config.model, config.data.image_size
    levels = range(len(model.ch_mult))
    if "attn_levels" in model:
        attended = [level in model.attn_levels for level in levels]
    else:
        attended = [side // 2**level in model.attn_resolutions for level in levels]
    kinds = ["Attn" if attention else "" for attention in attended]
    return diffusers.UNet2DModel(
        sample_size=side,
        in_channels=config.data.num_channels,
        out_channels=config.data.num_channels,
        layers_per_block=model.num_res_blocks,
        block_out_channels=[model.nf * multiple for multiple in model.ch_mult],
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        norm_num_groups=math.gcd(32, model.nf),
    )


def their_operations(call) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def forwards(config, diffusion: Diffusion, batch: int):
    """Forward passes of both networks; their operations as XLA and torch count them."""
    shape, theirs = (batch, *diffusion.space.shape), their_network(config)
    params, x, t = jax.jit(diffusion.init)(jax.random.key(0)), jnp.ones(shape), jnp.full((batch,), 0.5)
    image, time_label = torch.ones(batch, shape[3], *shape[1:3]), torch.full((batch,), 500.0)

    def call():
        with torch.no_grad():
            return theirs(image, time_label).sample.numpy()

    ours = timed.parallel_forward(diffusion, params, x, t)
    noise = jax.jit(lambda params, x, t: diffusion.noise_of(params)(x, t))
    return (ours, call), (timed.operations(noise, params, x, t), their_operations(call))


def training_steps(config, diffusion: Diffusion, batch: int):
    """Training steps of both networks; their operations."""
    shape, theirs = (batch, *diffusion.space.shape), their_network(config)
    step, state = timed.training_step(config, diffusion)
    one_batch = state, timed.blank(diffusion, np.arange(batch)[None]), 0
    image, time_label = torch.ones(batch, shape[3], *shape[1:3]), torch.full((batch,), 500.0)
    adam = torch.optim.Adam(theirs.parameters())

    def call():
        adam.zero_grad()
        loss = (theirs(image, time_label).sample - image).square().mean()
        loss.backward()
        adam.step()
        return loss.item()

    ours = timed.parallel_step(config, diffusion, batch)
    return (ours, call), (timed.operations(jax.jit(step), *one_batch), their_operations(call))


def solvers(diffusion: Diffusion, batch: int):
    """All steps of both around a network that returns its input."""
    table = jax.tree.map(np.float32, dpm_solver_pp(diffusion.sde, STEPS))
    x = jnp.ones((batch, *diffusion.space.shape))
    solve = jax.jit(lambda table, x: tableau.solve(lambda x, t: x, table, x))
    image = torch.ones(batch, *diffusion.space.shape)
    scheduler = diffusers.DPMSolverMultistepScheduler()

    def theirs():
        scheduler.set_timesteps(STEPS)
        sample = image
        for moment in scheduler.timesteps:
            sample = scheduler.step(sample, moment, sample).prev_sample
        return sample.numpy()

    return (functools.partial(solve, table, x), theirs), (None, None)


if __name__ == "__main__":
    program.run(main)
