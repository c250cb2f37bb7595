"""The training step: published optimizer and EMA, the same on any number of devices, checkpoints that fit or refuse."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from score_sde import checkpoint, parallel, training
from score_sde import sde as sde_lib
from score_sde.errors import UserError
from tests import reference
from tests.optimized import optimized_jit
from tests.programs import ROOT, environment


@pytest.fixture(autouse=True)
def promotion():
    """optax relies on dtype promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


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


def toy_loss(sde, network=lambda params, x: params["a"] * jnp.tanh(x) + params["b"]):
    """The loss of a two-parameter network on 4x4 images, or of another."""
    return training.make_loss(
        lambda params, y, keys: lambda x, t: network(params, x),
        sde,
        lambda key, image: image.astype(jnp.float32) / 127.5 - 1.0,
        times=lambda key: jax.random.uniform(key, minval=1e-5),
        weight=jnp.ones_like,
        reduce_mean=True,
    )


def toy_step(optimizer, sde, **options):
    """A training step of that network."""
    return training.make_step(toy_loss(sde), optimizer, 7, ema_rate=0.9, ema_warmup=False, **options)


def toy_batches(steps: int, size: int):
    images = np.random.default_rng(0).integers(0, 256, (steps, size, 4, 4, 1)).astype(np.uint8)
    return {"image": images, "index": np.broadcast_to(np.arange(size), (steps, size))}


def toy_params():
    return {"a": jnp.float32(0.3), "b": jnp.float32(-0.1)}


def test_several_steps_per_call_equal_single_steps():
    sde, optimizer = sde_lib.VP(), optax.sgd(0.1)
    step = jax.jit(toy_step(optimizer, sde))
    batches = toy_batches(4, 8)
    together, metrics = step(training.init_state(toy_params(), optimizer), batches, 0)
    single = training.init_state(toy_params(), optimizer)
    for i in range(4):
        single, _ = step(single, jax.tree.map(lambda b: b[i : i + 1], batches), i)
    assert metrics["loss"].shape == (4,)
    for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_cooldown_shortens_the_last_steps():
    sde, optimizer = sde_lib.VP(), optax.adam(0.1)
    cooled = jax.jit(toy_step(optimizer, sde, cooldown=4))
    plain = jax.jit(toy_step(optimizer, sde))
    batches = toy_batches(6, 8)
    state = training.init_state(toy_params(), optimizer)
    for i, share in enumerate([1, 1, 1, 3 / 4, 2 / 4, 1 / 4]):
        batch = jax.tree.map(lambda b: b[i : i + 1], batches)
        uncooled = jax.tree.map(jnp.subtract, plain(state, batch, i)[0].params, state.params)
        before, (state, _) = state, cooled(state, batch, i, 6)
        for name, move in uncooled.items():
            assert float(move) != 0
            np.testing.assert_allclose(state.params[name] - before.params[name], share * move, rtol=1e-4)


def test_the_network_is_told_of_augmentation_in_training_alone():
    """A negative whose label says so: the loss of the network that undoes it is that of the plain images."""
    batch = jax.tree.map(lambda values: values[0], toy_batches(1, 8))

    def loss(augment, undo):
        def noise_of(params, y, keys, augment=None):
            return lambda x, t: undo(x, augment)

        return training.make_loss(
            noise_of, sde_lib.VP(), lambda key, image: image.astype(jnp.float32) / 127.5 - 1.0,
            times=lambda key: jnp.float32(1e-3), weight=jnp.ones_like, reduce_mean=True, augment=augment,
        )  # fmt: skip

    negative = lambda key, x0: (-x0, jnp.ones((1,)))
    signs = lambda x, labels: x if labels is None else x * (1 - 2 * labels[:, :, None, None])
    of = lambda *how, train=True: loss(*how)({}, batch, jax.random.key(0), train)
    np.testing.assert_allclose(of(negative, lambda x, labels: 0 * signs(x, labels)), of(None, lambda x, labels: 0 * x))
    told = np.asarray(of(negative, signs))
    assert np.abs(told - of(None, signs)).max() < 0.2 * np.abs(told - of(negative, lambda x, labels: x)).max()
    np.testing.assert_array_equal(of(negative, signs, train=False), of(None, signs, train=False))


def test_power_averages_of_the_steps():
    """Two steps: the first parameters count (1 / 2)^(gamma + 1), and of the first step nothing but its result."""
    optimizer, gammas = optax.adam(0.1), (1.0, 3.0)
    step = jax.jit(toy_step(optimizer, sde_lib.VP(), power_gammas=gammas))
    state, path = training.init_state(toy_params(), optimizer, power_averages=2), []
    for i in range(2):
        state, _ = step(state, jax.tree.map(lambda b, i=i: b[i : i + 1], toy_batches(2, 8)), i)
        path.append(state.params)
    for average, gamma in zip(state.power_ema, gammas, strict=True):
        first = 0.5 ** (gamma + 1)
        for name in average:
            expected = first * path[0][name] + (1 - first) * path[1][name]
            np.testing.assert_allclose(average[name], expected, rtol=1e-6)


def test_the_step_is_traced_once():
    """What comes out of a step goes into the next as what it was before: a second tracing is a second compilation."""
    traced = []

    def loss(params, batch, key, train):
        traced.append(train)
        return toy_loss(sde_lib.VP())(params, batch, key, train)

    optimizer = optax.adam(0.1)
    step = parallel.pmap(training.make_step(loss, optimizer, 0, ema_rate=0.9, ema_warmup=True), in_axes=(0, 0, None))
    state = parallel.replicate(training.init_state(toy_params(), optimizer))
    batches = jax.tree.map(lambda x: x[None], toy_batches(1, 4))
    for number in range(3):
        state, _ = step(state, batches, number)
        assert len(traced) == 1


def published_step(loss, optimizer, state: training.State, batch) -> training.State:
    """A step as published, which does not look whether its numbers are finite."""
    mean = lambda params: loss(params, batch, jax.random.fold_in(jax.random.key(7), state.step), True).mean()
    updates, opt_state = optimizer.update(jax.grad(mean)(state.params), state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = training.update_ema(state.ema, params, state.step + 1, rate=0.9, warmup=False)
    return training.State(state.step + 1, params, ema, opt_state)


class Convolutions(nn.Module):
    """A small network with what the large ones are made of."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.Conv(16, (3, 3))(nn.swish(nn.GroupNorm(4)(nn.Conv(16, (3, 3))(x))))
        return nn.Conv(1, (3, 3))(x)


def convolutions_loss():
    return toy_loss(sde_lib.VP(), lambda params, x: Convolutions().apply({"params": params}, x))


def test_finite_runs_are_the_published_ones_to_the_bit():
    """By Adam with warm-up and clipping."""
    loss = convolutions_loss()
    optimizer = training.make_optimizer(lr=1e-3, beta1=0.9, eps=1e-8, warmup=2, grad_clip=1.0, weight_decay=0.0)
    params = Convolutions().init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))["params"]
    ours = theirs = training.init_state(params, optimizer)
    step = optimized_jit(training.make_step(loss, optimizer, 7, ema_rate=0.9, ema_warmup=False))
    published = optimized_jit(lambda state, batch: published_step(loss, optimizer, state, batch))
    batches = toy_batches(5, 8)
    for i in range(5):
        batch = jax.tree.map(lambda b: b[i : i + 1], batches)
        ours, metrics = step(ours, batch, i)
        theirs = published(theirs, jax.tree.map(lambda b: b[0], batch))
        assert metrics["skipped updates"] == 0
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, two)


def bad_at(optimizer, number: int, **options):
    """The toy step, whose loss is not finite at step `number`."""
    loss = lambda params, batch, key, train: (
        toy_loss(sde_lib.VP())(params, batch, key, train)
        + jnp.where(jnp.all(key == jax.random.fold_in(jax.random.key(7), number)), jnp.inf, 0.0) * params["a"]
    )
    return jax.jit(training.make_step(loss, optimizer, 7, ema_rate=0.9, ema_warmup=False, **options))


@pytest.mark.parametrize("per_call", [1, 5])
@pytest.mark.parametrize("skip", [False, True])
def test_an_update_that_is_not_finite_is_never_applied(per_call, skip):
    """Stopping keeps the state before it whatever comes after; skipping goes on from there with the next batch."""
    optimizer, batches = optax.adam(0.1), toy_batches(5, 8)
    step, good = bad_at(optimizer, 2, skip_non_finite=skip), jax.jit(toy_step(optimizer, sde_lib.VP()))
    state = expected = training.init_state(toy_params(), optimizer)
    skipped = []
    for first in range(0, 5, per_call):
        state, metrics = step(state, jax.tree.map(lambda b: b[first : first + per_call], batches), first)
        skipped += metrics["skipped updates"].tolist()
    for i in (0, 1, 3, 4) if skip else (0, 1):
        expected, _ = good(expected._replace(step=jnp.int32(i)), jax.tree.map(lambda b: b[i : i + 1], batches), i)
    assert skipped == ([0, 0, 1, 0, 0] if skip else [0, 0, 1, 1, 1])
    assert int(state.step) == (5 if skip else 2)
    for one, two in zip(jax.tree.leaves(state._replace(step=expected.step)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


def test_slices_of_a_batch_equal_the_whole():
    """By plain SGD; and the norms that are logged are those of what was applied."""
    optimizer, batches = optax.sgd(0.1), toy_batches(1, 12)
    whole, expected = jax.jit(toy_step(optimizer, sde_lib.VP()))(
        training.init_state(toy_params(), optimizer), batches, 0
    )
    moved = np.array(jax.tree.leaves(whole.params)) - np.array(jax.tree.leaves(toy_params()))
    np.testing.assert_allclose(expected["gradient norm"][0], np.linalg.norm(moved) / 0.1, rtol=1e-5)
    np.testing.assert_allclose(
        expected["parameter norm"][0], np.linalg.norm(np.array(jax.tree.leaves(whole.params))), rtol=1e-6
    )
    for count in (2, 3):
        step = jax.jit(toy_step(optimizer, sde_lib.VP(), accumulate=count))
        sliced, metrics = step(training.init_state(toy_params(), optimizer), batches, 0)
        for one, two in zip(jax.tree.leaves((sliced, metrics)), jax.tree.leaves((whole, expected)), strict=True):
            np.testing.assert_allclose(one, two, rtol=2e-6)


def test_slices_take_less_memory():
    """They are unrolled on CPU, where gradients of convolutions in loops are slow, and yet wait for one another."""
    optimizer, taken = optax.sgd(0.1), {}
    params = Convolutions().init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))["params"]
    for count in (1, 4):
        options = dict(ema_rate=0.9, ema_warmup=False, accumulate=count)
        step = jax.jit(training.make_step(convolutions_loss(), optimizer, 7, **options))
        compiled = step.lower(training.init_state(params, optimizer), toy_batches(1, 512), 0).compile()
        taken[count] = compiled.memory_analysis().temp_size_in_bytes
    assert taken[4] < taken[1] / 3


DEVICES = """
import jax, numpy as np, optax
from score_sde import parallel, training
from score_sde.sde import VP
from tests.test_training import toy_batches, toy_params, toy_step
assert jax.device_count() == 4
optimizer, batches = optax.sgd(0.1), toy_batches(3, 8)
step = toy_step(optimizer, VP())
alone = jax.jit(step)(training.init_state(toy_params(), optimizer), batches, 0)
per_device = jax.tree.map(lambda b: b.reshape(3, 4, 2, *b.shape[2:]).swapaxes(0, 1), batches)
on_devices = parallel.pmap(step, in_axes=(0, 0, None))
shared = on_devices(parallel.replicate(training.init_state(toy_params(), optimizer)), per_device, 0)
for ours, theirs in zip(jax.tree.leaves(parallel.first(shared)), jax.tree.leaves(alone)):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
"""


def test_four_devices_equal_one():
    """The same global batch gives the same parameters, by plain SGD, which hides no factor as Adam would."""
    subprocess.run([sys.executable, "-c", DEVICES], env=environment(4), check=True, cwd=ROOT)


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
