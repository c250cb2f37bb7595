"""Power-function averages: their recurrence, their width, and the combination that makes others of them."""

import jax
import numpy as np
import pytest

from configs import digits
from experiments import averages, build, runs
from score_sde import checkpoint, power_ema, training
from score_sde.errors import UserError
from score_sde.power_ema import Profile


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.1, 6.94)])
def test_published_exponents(width, gamma):
    """The exponents are those of the paper's two averages (sec. 3.2)."""
    assert power_ema.gamma_of(width) == pytest.approx(gamma, abs=5e-3)


@pytest.mark.parametrize("width", [0.03, 0.1, 0.25])
def test_the_width_is_the_deviation_of_the_profile(width):
    gamma = power_ema.gamma_of(width)
    tau = (np.arange(200_000) + 0.5) / 200_000
    p = (gamma + 1) * tau**gamma
    mean = (p * tau).mean()
    assert np.sqrt((p * (tau - mean) ** 2).mean()) == pytest.approx(width, rel=1e-6)


@pytest.mark.parametrize("gamma", [2.0, 16.97])
def test_the_recurrence_weighs_steps_by_their_power(gamma, x64):
    """The weights of all steps, taken from averages of unit vectors, against k^(gamma + 1) - (k - 1)^(gamma + 1)."""
    steps = 40
    average = np.zeros(steps)
    for k in range(1, steps + 1):
        average = power_ema.update(average, np.eye(steps)[k - 1], np.float64(k), gamma)
    edges = np.arange(steps + 1) ** (gamma + 1)
    np.testing.assert_allclose(average, np.diff(edges) / edges[-1], rtol=1e-11)


def test_another_width_from_two_kept_ones(x64):
    """Sixteen snapshots of the widths 0.05 and 0.1 give 0.07 as if it had been kept."""
    total, every = 1600, 100
    path = (
        np.sin(np.arange(1, total + 1) / 300)[:, None] * np.array([1.0, -2.0])
        + np.arange(1, total + 1)[:, None] / total
    )
    gammas, target = [power_ema.gamma_of(width) for width in (0.05, 0.1)], power_ema.gamma_of(0.07)
    averages, kept, profiles, wanted = [np.zeros(2)] * 2, [], [], np.zeros(2)
    for k in range(1, total + 1):
        averages = [power_ema.update(a, path[k - 1], np.float64(k), g) for a, g in zip(averages, gammas, strict=True)]
        wanted = power_ema.update(wanted, path[k - 1], np.float64(k), target)
        if k % every == 0:
            kept += averages
            profiles += [Profile(gamma, k) for gamma in gammas]
    weights, missing = power_ema.combination(profiles, Profile(target, total))
    assert missing < 5e-3
    assert weights.sum() == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(weights @ np.array(kept), wanted, atol=1e-3)
    assert power_ema.combination(profiles[-2:], Profile(target, total))[1] > 10 * missing


def test_what_was_kept_comes_back(x64):
    profiles = [Profile(6.94, 100.0), Profile(16.97, 100.0), Profile(6.94, 200.0), Profile(16.97, 200.0)]
    weights, missing = power_ema.combination(profiles, profiles[3])
    np.testing.assert_allclose(weights, [0, 0, 0, 1], atol=1e-7)
    assert missing < 1e-6


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3, float("nan")])
def test_a_width_that_no_average_has(width):
    with pytest.raises(UserError, match="between 0 and 0"):
        power_ema.gamma_of(width)


@pytest.fixture
def run(tmp_path):
    """A run that kept two averages at each of three steps: constants of its number and width."""
    config = digits.get_config()
    config.model.nf, config.model.ch_mult, config.model.attn_resolutions = 8, (1,), ()
    config.training.power_ema = (0.05, 0.1)
    workdir = tmp_path / "run"
    runs.claim_workdir(workdir, config)
    checkpoints = checkpoint.Checkpoints(workdir, keep_every=1)
    template = jax.eval_shape(build.trainable(config).init, jax.random.key(0))
    optimizer = training.make_optimizer(**config.optim)
    for step in (100, 200, 300):
        constant = lambda value: jax.tree.map(lambda leaf: np.full(leaf.shape, value, np.float32), template)
        state = training.init_state(constant(0.0), optimizer, power_averages=2)
        state = state._replace(step=np.int32(step), power_ema=(constant(step), constant(-step)))
        checkpoints.save(jax.tree.map(np.asarray, state), {})
        checkpoints.wait()
    return workdir


def test_the_average_of_a_run_is_a_run(run, tmp_path, capsys):
    out = tmp_path / "averaged"
    averages.write(run, 0.08, out)
    profiles = [Profile(power_ema.gamma_of(width), step) for step in (100, 200, 300) for width in (0.05, 0.1)]
    weights, missing = power_ema.combination(profiles, Profile(power_ema.gamma_of(0.08), 300))
    assert f"within {missing:.1%}" in capsys.readouterr().out
    model = runs.open_model(str(out))
    expected = weights @ np.array([100, -100, 200, -200, 300, -300])
    assert model.step == 300
    for leaf in jax.tree.leaves(model.params):
        np.testing.assert_allclose(leaf, expected, rtol=1e-5)


def test_averages_too_far_from_a_width_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="take a width nearer"):
        averages.write(run, 0.01, tmp_path / "averaged")
    assert not (tmp_path / "averaged").exists()
