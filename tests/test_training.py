"""The training step: published optimizer and EMA, the same on any number of devices, checkpoints that fit or refuse."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from score_sde import checkpoint, training
from score_sde import sde as sde_lib
from score_sde.errors import UserError
from tests import reference


@pytest.fixture(autouse=True)
def promotion():
    """optax relies on dtype promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


ROOT = pathlib.Path(__file__).resolve().parents[1]


@reference.needs_reference
@pytest.mark.parametrize("case", reference.cases("C_optim"))
def test_published_optimizer_and_ema(case):
    """Adam, warm-up, clipping and both EMA rules over twelve steps with given gradients."""
    info, stored = reference.cases("C_optim")[case], reference.arrays("C_optim")
    get = lambda key: stored[f"{case}/{key}"]
    names = ("lr", "warmup", "grad_clip", "eps", "beta1")
    optimizer = training.make_optimizer(weight_decay=info["wd"], **{name: info[name] for name in names})
    params = [jnp.asarray(get("p0")), jnp.asarray(get("p1"))]
    state = training.init_state(params, optimizer)
    constant = ramped = state.ema
    opt_state = state.opt_state
    for step in range(info["steps"]):
        gradient = [jnp.asarray(get("g0")[step]), jnp.asarray(get("g1")[step])]
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        constant = training.update_ema(constant, params, step + 1, rate=info["ema_decay"], warmup=False)
        ramped = training.update_ema(ramped, params, step + 1, rate=info["ema_decay"], warmup=True)
        for i in range(2):
            np.testing.assert_allclose(params[i], get(f"P{i}")[step], rtol=2e-6, atol=1e-7)
            np.testing.assert_allclose(constant[i], get(f"ema_const{i}")[step], rtol=2e-6, atol=1e-7)
            np.testing.assert_allclose(ramped[i], get(f"ema_torch{i}")[step], rtol=2e-6, atol=1e-7)


def toy_step(optimizer, sde):
    """A training step of a two-parameter network on 4x4 images."""
    network = lambda params, x: params["a"] * jnp.tanh(x) + params["b"]
    loss = training.make_loss(
        lambda params, y, keys: lambda x, t: network(params, x),
        sde,
        lambda key, image: image.astype(jnp.float32) / 127.5 - 1.0,
        continuous=True,
        num_scales=1000,
        t_min=1e-5,
        likelihood_weighting=False,
        reduce_mean=True,
    )
    return training.make_step(loss, optimizer, 7, ema_rate=0.9, ema_warmup=False)


def toy_batches(steps: int, size: int):
    images = np.random.default_rng(0).integers(0, 256, (steps, size, 4, 4, 1)).astype(np.uint8)
    return {"image": images, "index": np.broadcast_to(np.arange(size), (steps, size))}


def toy_params():
    return {"a": jnp.float32(0.3), "b": jnp.float32(-0.1)}


def test_several_steps_per_call_equal_single_steps():
    sde, optimizer = sde_lib.VP(), optax.sgd(0.1)
    step = jax.jit(toy_step(optimizer, sde))
    batches = toy_batches(4, 8)
    together, metrics = step(training.init_state(toy_params(), optimizer), batches)
    single = training.init_state(toy_params(), optimizer)
    for i in range(4):
        single, _ = step(single, jax.tree.map(lambda b: b[i : i + 1], batches))
    assert metrics["loss"].shape == (4,)
    for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


DEVICES = """
import jax, numpy as np, optax
from score_sde import parallel, training
from score_sde.sde import VP
from tests.test_training import toy_batches, toy_params, toy_step
assert jax.device_count() == 4
optimizer, batches = optax.sgd(0.1), toy_batches(3, 8)
step = toy_step(optimizer, VP())
alone = jax.jit(step)(training.init_state(toy_params(), optimizer), batches)
per_device = jax.tree.map(lambda b: b.reshape(3, 4, 2, *b.shape[2:]).swapaxes(0, 1), batches)
shared = parallel.pmap(step)(parallel.replicate(training.init_state(toy_params(), optimizer)), per_device)
for ours, theirs in zip(jax.tree.leaves(parallel.first(shared)), jax.tree.leaves(alone)):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
"""


def test_four_devices_equal_one():
    """The same global batch gives the same parameters, by plain SGD, which hides no factor as Adam would."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", DEVICES], env=environment, check=True, cwd=ROOT)


def small_state(width: int = 3):
    params = {"layer": {"kernel": jnp.ones((2, width)), "bias": jnp.zeros((width,))}}
    state = training.init_state(params, optax.adam(0.1))
    return jax.tree.map(np.asarray, state._replace(step=jnp.int32(5)))


def test_checkpoint_round_trip(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep_every=5)
    state = small_state()
    checkpoints.save(state, {"position": 5})
    checkpoints.wait()
    restored, meta = checkpoints.restore(5, small_state())
    assert meta == {"position": 5}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    again = checkpoint.Checkpoints(tmp_path)
    assert again.steps() == [5]
    np.testing.assert_array_equal(again.restore_ema(5, state.ema)["layer"]["kernel"], 1.0)


def test_checkpoint_of_another_network_is_refused_by_name(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep_every=5)
    checkpoints.save(small_state(), {})
    checkpoints.wait()
    with pytest.raises(UserError, match=r"ema/layer/bias is \(3,\) there and \(4,\) here"):
        checkpoints.restore_ema(5, small_state(4).ema)
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        checkpoints.step_or_last(7)


def test_without_checkpoints_the_remedy_is_named(tmp_path):
    with pytest.raises(UserError, match=r"train\.py"):
        checkpoint.Checkpoints(tmp_path).step_or_last(None)


def test_identity_tells_parameters_apart():
    params = small_state().params
    same, other = small_state().params, small_state().params
    other["layer"]["bias"] = other["layer"]["bias"] + 1e-7
    assert checkpoint.identity(params) == checkpoint.identity(same) != checkpoint.identity(other)
