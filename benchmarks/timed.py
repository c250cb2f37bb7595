"""What several benchmarks time, and how: the training step on blank images, a convolution to compare others with."""

import functools
import time
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ems.statistics import EMS
from experiments import build
from score_sde import parallel, training
from score_sde.denoiser import Diffusion


def seconds(call: Callable, repeats: int) -> float:
    """Median seconds of a call without arguments, after one that compiles."""
    return by_turns([call], range(repeats + 1))[0]


def by_turns(calls: Sequence[Callable], turns: Iterable[int]) -> list[float]:
    """Seconds of each of these calls: its median share of a turn, of the median turn. The first turn compiles.

    Turns go there and back; shares, because the machine's pace changes more from turn to turn than within one.
    """
    times = [[] for _ in calls]
    for turn in turns:
        for call, found in list(zip(calls, times, strict=True))[:: (-1) ** turn]:
            began = time.perf_counter()
            jax.block_until_ready(call())
            found.append(time.perf_counter() - began)
    times = np.array(times)[:, 1:]
    whole = times.sum(0)
    return list(np.median(times / whole, axis=1) * np.median(whole))


def training_step(config, diffusion: Diffusion, params=None) -> tuple[Callable, training.State]:
    """`training.make_step` of a config, and the state before its first step, with these parameters if given."""
    optimizer, loss = training.make_optimizer(**config.optim), build.loss_of(config, diffusion)
    step = training.make_step(loss, optimizer, 0, ema_rate=0.999, ema_warmup=False)
    return step, training.init_state(diffusion.init(jax.random.key(0)) if params is None else params, optimizer)


def parallel_forward(diffusion: Diffusion, params, x, t) -> Callable:
    """The forward pass of images x (B, H, W, C) at t (B,) over all devices, as sample.py computes; no arguments."""
    forward = parallel.pmap(lambda params, x, t: diffusion.noise_of(params)(x, t), in_axes=(None, 0, 0))
    return functools.partial(forward, params, *parallel.shard((x, t)))


def parallel_step(config, diffusion: Diffusion, batch: int) -> Callable:
    """The next training step of that global batch over all devices, as train.py takes it; a call without arguments."""
    share = parallel.batch_per_device(batch)
    step, state = training_step(config, diffusion)
    step, state = parallel.pmap(step, in_axes=(0, 0, None), donate_argnums=0), parallel.replicate(state)
    index = parallel.shard(np.arange(batch)).reshape(-1, 1, share)  # (devices, steps, batch per device)
    images = blank(diffusion, index)

    def call():
        nonlocal state
        state, loss = step(state, images, 0)
        return loss

    return call


def blank(diffusion: Diffusion, index: np.ndarray) -> dict[str, np.ndarray]:
    """Images of zeros of class 0, numbered `index` in the global batch, whose shape they have."""
    image = np.zeros((*index.shape, *diffusion.space.shape), np.uint8)
    return {"image": image, "label": np.zeros(index.shape, np.int32), "index": index}


def flat_ems(diffusion: Diffusion, times: tuple[float, float]) -> EMS:
    """Statistics of no model, l = 1 and s = b = 0: the solver's time does not depend on them."""
    t = np.linspace(*times[::-1], 25)
    zero = np.zeros((len(t), *diffusion.space.shape))
    return EMS(t, diffusion.sde.lam(t), zero + 1, zero, zero, {})


def convolution() -> tuple[Callable, jax.Array, jax.Array, float]:
    """A jitted 3x3 convolution of 128 channels, its maps (B, H, W, C) and kernel, and its floating-point operations."""
    maps, kernel = jnp.ones((32, 32, 32, 128)), jnp.ones((3, 3, 128, 128))
    dimensions = ("NHWC", "HWIO", "NHWC")
    convolve = jax.jit(
        lambda maps, kernel: jax.lax.conv_general_dilated(maps, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
    )
    return convolve, maps, kernel, 2 * maps.size * kernel[..., 0].size


def operations(function, *arguments) -> float:
    """Floating-point operations of a jitted call, as XLA counts them."""
    return function.lower(*arguments).cost_analysis()["flops"]
