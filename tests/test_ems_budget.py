"""What EMS cost and how exact they are: standard errors, whether K suffices, memory, machines, guidance, other data."""

import functools
import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits, digits_conditional
from ems import estimate, moments, statistics
from experiments import build, measuring, runs, samplers
from score_sde import sde as sde_lib
from score_sde.errors import UserError
from score_sde.guidance import Guidance
from solvers import dpm_solver_v3, tableau
from tests.mixture import Mixture
from tests.test_ems import accumulator, gaussian_noise

# ------------------------------------------------------------------------------------------------ standard errors


def test_jackknife_of_a_mean():
    """Blocks of one value: the textbook standard error, exactly. Unequal blocks: its square on average."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=9)
    error = moments.jackknife(x.mean(), [np.delete(x, i).mean() for i in range(9)], [1] * 9)
    np.testing.assert_allclose(error, x.std(ddof=1) / 3, rtol=1e-12)

    sizes = [5, 3, 3, 1]
    x, starts = rng.normal(size=(12, 40_000)), np.cumsum([0, *sizes])
    without = [np.delete(x, np.arange(*starts[g : g + 2]), axis=0).mean(0) for g in range(4)]
    errors = moments.jackknife(x.mean(0), without, sizes)
    np.testing.assert_allclose(np.square(errors).mean(), 1 / 12, rtol=0.02)


IMAGES, NODES = 192, 12
MIXTURE = Mixture.reference()
measured = jax.jit(functools.partial(estimate.measure, MIXTURE.noise_fn(sde_lib.VP())))


@functools.cache
def repeated(sde, repeats: int):
    """EMS of the mixture with errors, measured again and again on images, noise and probes of their own."""
    node = estimate.nodes(sde, NODES)
    x0, found = MIXTURE.sample("repeated", repeats * IMAGES), []
    for start in range(0, len(x0), IMAGES):
        parts = []
        for index in np.split(np.arange(start, start + IMAGES), moments.BLOCKS):
            part = measured(node, np.arange(NODES + 1), jax.random.key(7), jnp.asarray(x0[index]), index)
            parts.append(moments.merge(part, moments.Moments.zeros((NODES + 1,), x0.shape[1:])))
        blocks = moments.Moments(*(np.stack(fields) for fields in zip(*parts, strict=True)))
        found.append(estimate.with_errors(node, blocks, {}))
    return found


def test_reported_standard_errors_are_the_spread_over_seeds():
    """What one measurement reports for l, s and b at every node is what many measurements scatter."""
    many = [ems for ems, *_ in repeated(sde_lib.VP(), 48)]
    spread = np.stack(
        [np.sqrt(np.stack([getattr(ems, key) for ems in many]).var(0, ddof=1).mean((1, 2, 3))) for key in "lsb"]
    )
    ratio = np.sqrt(np.mean([np.square(ems.errors) for ems in many], axis=0)) / spread
    assert (np.abs(np.log(ratio)) < np.log(1.2)).all(), ratio
    np.testing.assert_allclose(ratio.mean(1), 1.0, atol=0.08)
    # one measurement tells it too, best where many pixels vary by themselves
    alone = np.stack([ems.errors for ems in many]) / spread[None]
    assert (np.abs(np.log(alone)) < np.log(2)).mean((0, 2)).min() > 0.95


def test_reported_error_of_samples_is_their_spread_over_seeds():
    """The figure behind "K suffices": how far samples scatter with the images that the statistics were measured on."""
    sde = sde_lib.VP(t_min=0.1, t_max=0.6)
    x = jax.random.normal(jax.random.key(3), (32, 8, 8, 3))
    solve = jax.jit(functools.partial(tableau.solve, MIXTURE.noise_fn(sde)))
    sample = lambda ems: np.asarray(solve(dpm_solver_v3.dpm_solver_v3(sde, 6, ems=ems), x))
    many = repeated(sde, 32)
    samples = [sample(ems) for ems, *_ in many]
    errors = [
        moments.jackknife(whole, [sample(part) for part in without], sizes)
        for whole, (_, without, sizes) in zip(samples, many, strict=True)
    ]
    spread = np.sqrt(np.var(samples, axis=0, ddof=1).mean())
    assert np.isfinite(spread)
    np.testing.assert_allclose(np.sqrt(np.square(errors).mean()), spread, rtol=0.2)


def test_needed_images():
    """distance^2 = D^2 + error^2, and error^2 = constant / K: the K that is named lengthens D by the tolerance."""
    exact, per_image = 0.05, 0.01
    measured = lambda k: (np.hypot(exact, per_image / np.sqrt(k)), per_image / np.sqrt(k))
    share, k = estimate.needed(*measured(0.5), 10_000)
    np.testing.assert_allclose(share, np.hypot(exact, per_image / np.sqrt(0.5)) / exact - 1)
    assert k == np.ceil(10_000 * per_image**2 / 0.5 / (exact**2 * (1.02**2 - 1)))
    np.testing.assert_allclose(estimate.needed(*measured(0.5 * k / 10_000), k)[0], estimate.TOLERANCE, rtol=1e-3)
    assert estimate.needed(0.02, 0.02, 64) == (np.inf, None)
    assert estimate.needed(np.nan, np.nan, 64) == (np.inf, None)


# ------------------------------------------------------------------------------------------------ memory, machines


def test_memory_is_within_the_printed_bound_for_any_number_of_images(tmp_path):
    image, node = (24, 24, 3), estimate.nodes(sde_lib.VP(), 40)
    rng = np.random.default_rng(0)
    fields = (np.ones((1, 11)), *(rng.random((1, 11, *axes, *image), np.float32) for axes in ((), (3,), (3, 3))))
    bound = moments.bytes_needed(41, image)
    batch_and_chunk = 3 * sum(part.nbytes for part in fields)
    for images in (64, 640):
        tracemalloc.start()
        blocks = estimate.accumulate(
            lambda *_: moments.Moments(*fields), node, lambda index: (index,), range(images), image, batch_size=8
        )
        moments.save(tmp_path / "a.moments", moments.Saved(node.t, node.lam, blocks, {}))
        estimate.with_errors(node, blocks, {})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 0.5 * bound < peak < bound + batch_and_chunk


def origin_of(first: int, end: int, **changes) -> dict:
    return (
        dict(
            checkpoint="c0ffee",
            sde=statistics.describe_sde(sde_lib.VP()),
            data="digits",
            guidance_scale=None,
            num_data=end - first,
            images=[[first, end]],
        )
        | changes
    )


def test_measurements_of_several_machines_add_up(tmp_path):
    """Three machines' files give the statistics and errors of one machine, to the rounding of float64."""
    node = estimate.nodes(sde_lib.VP(), 6)
    measured = lambda first, end: moments.Saved(
        node.t, node.lam, accumulator(6, range(first, end), batch_size=4)(), origin_of(first, end)
    )
    paths = []
    for first, end in ((0, 16), (32, 48), (16, 32)):
        paths.append(tmp_path / f"{first}.moments")
        moments.save(paths[-1], measured(first, end))
    one, two, three = (moments.load(path) for path in paths)
    merged = moments.add(moments.add(one, two, ("one", "two")), three, ("both", "three"))
    assert merged.origin["num_data"] == 48
    assert merged.origin["images"] == [[0, 48]]
    whole = measured(0, 48)
    for ours, theirs in zip(merged.blocks, whole.blocks, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12 * np.abs(theirs).max())
    ours, theirs = (estimate.with_errors(node, saved.blocks, {})[0] for saved in (merged, whole))
    for key in ("l", "s", "b", "errors"):
        np.testing.assert_allclose(getattr(ours, key), getattr(theirs, key), rtol=1e-7, atol=1e-9, err_msg=key)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda saved: saved, "share images 4 to 7: .*--first_image=12"),
        (lambda saved: saved._replace(origin=origin_of(8, 12, checkpoint="bad")), "checkpoint c0ffee and bad"),
        (lambda saved: saved._replace(origin=origin_of(8, 12, data="mnist")), "data digits and mnist"),
        (lambda saved: saved._replace(origin=origin_of(8, 12, guidance_scale=2.0)), "guidance scale None and 2.0"),
        (lambda saved: saved._replace(origin=origin_of(8, 12, sde={"name": "VE"})), "SDE .*VP.* and .*VE"),
        (lambda saved: saved._replace(origin=origin_of(8, 12), lam=saved.lam + 1), "3 nodes"),
        (lambda saved: saved._replace(origin=origin_of(8, 12), t=saved.t[:3], lam=saved.lam[:3]), "3 nodes.*2 nodes"),
    ],
)
def test_measurements_that_do_not_add_up_are_refused(change, words):
    node = estimate.nodes(sde_lib.VP(), 3)
    saved = lambda first, end: moments.Saved(
        node.t, node.lam, moments.Moments.zeros((moments.BLOCKS, 4), (1, 1, 1)), origin_of(first, end)
    )
    with pytest.raises(UserError, match=words) as error:
        moments.add(saved(0, 8), change(saved(4, 12)), ("a.npz", "b.npz"))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ constant f


@pytest.mark.parametrize("n", [1, 2, 7, 4096, 100_001])
def test_pairwise_sum_holds_its_bound(n):
    values = np.random.default_rng(0).uniform(size=(n, 3)).astype(np.float32)
    total, exact = jax.jit(estimate.pairwise_sum)(values), values.sum(0, dtype=np.float64)
    assert (np.abs(total - exact) <= (math.log2(n) + 1) * estimate.EPSILON / 2 * exact).all()


@pytest.mark.parametrize("batch", [64, 250])
def test_where_f_is_constant_s_is_zero_in_float32(x64, batch):
    """Gaussian pixels beside those of the mixture, in float32: those have s = 0, not a quotient of roundings."""
    sde, mixture = sde_lib.VP(), Mixture.reference()
    flat, live = gaussian_noise(sde), mixture.noise_fn(sde)
    node, x0 = estimate.nodes(sde, 12), mixture.sample("constant", batch)
    left = jnp.arange(8)[None, None, :, None] < 4

    def noise(x, t):
        x, t = x.astype(np.float64), t.astype(np.float64)
        return jnp.where(left, flat(x, t), live(x, t)).astype(np.float32)

    def ems(noise):
        args = np.arange(13), jax.random.key(0), jnp.asarray(x0), np.arange(batch)
        measured = jax.jit(functools.partial(estimate.measure, noise))(node, *args)
        return estimate.statistics(node, moments.merge(measured, moments.Moments.zeros((13,), x0.shape[1:])), {})

    mixed = ems(noise)
    assert all(np.isfinite(values).all() for values in (mixed.l, mixed.s, mixed.b))
    assert (mixed.s[:, :, :4] == 0).all()
    assert (mixed.s[:, :, 4:] != 0).all()
    assert mixed.origin["constant_f"] == 13 * 8 * 4 * 3


# ------------------------------------------------------------------------------------------------ a model's statistics


def small(config):
    with config.unlocked():
        config.model.nf = 8
        config.model.ch_mult = (1,)
        config.model.attn_resolutions = ()
        config.ems.update(nodes=12, num_data=16, batch_size=8)
    return config


@functools.cache
def model_of(folder, conditional: bool = False) -> runs.Model:
    config = small((digits_conditional if conditional else digits).get_config())
    diffusion, rng = build.diffusion_of(config), np.random.default_rng(0)
    drawn = diffusion.init(jax.random.key(0))  # which make a network that is zero
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), drawn)
    return runs.Model(folder, config, diffusion, params, 8, "c0ffee")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_of(tmp_path_factory.mktemp("run"))


def test_two_machines_and_one_write_the_same_statistics(model, capsys):
    """Through the files that the program writes; a finished measurement is not repeated."""
    measure = functools.partial(measuring.measure, model, nodes=12, batch_size=8)
    halves = [measure(num_data=8, first_image=first) for first in (0, 8)]
    assert "so no standard errors" in capsys.readouterr().out
    assert statistics.load(halves[0]).errors is None
    whole = measure(num_data=16)
    text = capsys.readouterr().out
    for words in ("13 nodes x 16 images of digits", "208 evaluations", "MB", "+-", "K = 16 images", "exact ODE"):
        assert words in text
    expected = statistics.load(whole)
    whole.rename(whole.with_suffix(".alone"))
    merged = measuring.merge(model, [str(path) for path in halves])
    assert merged == whole
    ours = measuring.load(model, merged)
    for key in ("l", "s", "b", "errors"):
        np.testing.assert_allclose(getattr(ours, key), getattr(expected, key), rtol=1e-7, atol=1e-9, err_msg=key)
    assert ours.origin["images"] == [[0, 16]]
    assert ours.origin["samples"]["standard_error"] > 0
    assert measuring.find(model) == merged
    capsys.readouterr()
    measure(num_data=16)
    assert "already measured" in capsys.readouterr().out


def test_statistics_on_own_samples_and_on_latents(model, tmp_path):
    """Own samples are what DPM-Solver++ draws; given as latents, x0 as it is, they give the same statistics."""
    source = measuring.own_samples(model.diffusion, model.params, 0)
    x0, _ = source.take(np.arange(8))
    sampled = measuring.measure(model, nodes=12, num_data=8, batch_size=8, source="samples")
    assert statistics.load_origin(sampled)["data"] == "own samples"
    np.savez(tmp_path / "made.npz", latents=x0)
    given = measuring.measure(model, nodes=12, num_data=8, batch_size=8, source=str(tmp_path / "made.npz"))
    np.testing.assert_allclose(statistics.load(given).l, statistics.load(sampled).l, atol=1e-6)
    assert statistics.load_origin(given)["latent"]
    options = samplers.build_tableau(model.diffusion.sde, "dpmv3", 7, statistics.load(given))[1]
    assert (options["grid"], options["corrector_pseudo"]) == ("time", True)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (dict(images=np.zeros((8, 8, 8, 1))), "with latents"),
        (dict(latents=np.zeros((8, 1, 8, 8))), r"float64 \(8, 1, 8, 8\), expected finite floats .*NHWC"),
        (dict(latents=np.zeros((8, 8, 8, 1), np.uint8)), "uint8"),
        (dict(latents=np.full((8, 8, 8, 1), np.nan)), "finite"),
    ],
)
def test_other_files_than_latents_are_refused(model, arrays, words, tmp_path):
    np.savez(tmp_path / "made.npz", **arrays)
    with pytest.raises(UserError, match=words):
        measuring.latents(model.diffusion, str(tmp_path / "made.npz"))


def test_guided_statistics_belong_to_their_scale(tmp_path):
    """Measured on guided noise: another l than without; each is found by its scale and refused for others."""
    model = model_of(tmp_path, conditional=True)
    guided = measuring.measure(model, nodes=12, num_data=8, batch_size=8, guidance=Guidance(3.0))
    plain = measuring.measure(model, nodes=12, num_data=8, batch_size=8, guidance=Guidance(1.0))
    assert measuring.find(model, 3.0) == guided
    assert measuring.find(model) == plain
    assert measuring.find(model, 2.0) is None
    assert np.abs(statistics.load(guided).l - statistics.load(plain).l).max() > 1e-3
    _, options = samplers.build_tableau(model.diffusion.sde, "dpmv3", 10, measuring.load(model, guided, 3.0))
    assert (options["order"], options["corrector_pseudo"], options["grid"]) == (2, True, "time")
    with pytest.raises(UserError, match="was measured with guidance 3, sampling is without guidance"):
        measuring.load(model, guided)
    with pytest.raises(UserError, match=r"measured without guidance, sampling is with guidance 2: .*--guidance=2"):
        measuring.load(model, plain, 2.0)


def made_up(model, path, *, sde=None, shape=None, **origin):
    """An EMS file that belongs to `model` but for the changes."""
    sde = sde or model.diffusion.sde
    node = estimate.nodes(sde, 12)
    values = np.ones((3, 13, *(shape or model.diffusion.space.shape)))
    own = origin_of(
        0, 8, checkpoint=model.identity, step=8, nodes=12, sde=statistics.describe_sde(sde), t_end=sde.t_min
    )
    statistics.save(path, statistics.EMS(node.t, node.lam, *values, own | origin))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(checkpoint="bad"), "checkpoint bad .* this is c0ffee"),
        (dict(shape=(4, 4, 1)), r"for x of shape \(4, 4, 1\), this model's is \(8, 8, 1\)"),
        (dict(sde=sde_lib.VP(beta_max=10.0)), "another SDE.*10.0.*20.0"),
        (dict(sde=sde_lib.VP(t_max=0.9)), "start at t=0.9 .*sampling starts at t=1"),
        (dict(guidance_scale=2.0), "with guidance 2, sampling is without"),
    ],
)
def test_statistics_that_do_not_belong_are_refused(model, changes, words, tmp_path):
    assert measuring.load(model, made_up(model, tmp_path / "own.npz")).l.shape == (13, 8, 8, 1)
    with pytest.raises(UserError, match=words) as error:
        measuring.load(model, made_up(model, tmp_path / "ems.npz", **changes))
    assert "\n" not in str(error.value)


def test_longer_statistics_serve_a_shorter_range_and_the_published_end(model, tmp_path):
    """Above 10 evaluations a tenth of t_min is published: taken if the EMS reach that far, else where they end."""
    end = lambda ems, steps, **options: samplers.build_tableau(model.diffusion.sde, "dpmv3", steps, ems, **options)[1][
        "t_end"
    ]
    short = measuring.load(model, made_up(model, tmp_path / "short.npz"))
    longer = measuring.load(model, made_up(model, tmp_path / "long.npz", sde=sde_lib.VP(t_min=1e-4)))
    assert [end(short, steps) for steps in (10, 12)] == [1e-3, 1e-3]
    assert [end(longer, steps) for steps in (10, 12)] == [1e-3, 1e-4]
    with pytest.raises(UserError, match=r"down to t=0.0001, but these EMS end at t=0.001: .*--t_end=0.0001"):
        end(short, 12, t_end=1e-4)


def test_data_that_cannot_be_read_proposes_own_samples(model):
    with model.config.unlocked():
        model.config.data.dataset, kept = "no/where.npz", model.config.data.dataset
    try:
        with pytest.raises(UserError, match=r"no/where.npz.*--data=samples"):
            measuring.measure(model, nodes=12, num_data=8, batch_size=8)
    finally:
        with model.config.unlocked():
            model.config.data.dataset = kept


@pytest.mark.parametrize(
    ("l", "words"),
    [
        (np.zeros((5, 4, 6, 3)), r"\(nodes, H, W, C\) = \(5, 4, 6, 3\), published files are \(nodes, C, H, W\)"),
        (np.zeros((5, 3, 6, 4)), r"shape \(5, 3, 6, 4\), expected \(nodes, 3, 4, 6\)"),
        (np.full((5, 3, 4, 6), np.inf), "l is not finite"),
        (None, "no published statistics"),
    ],
)
def test_published_files(l, words, tmp_path):
    sde, values = sde_lib.VP(), np.random.default_rng(0).normal(size=(3, 5, 3, 4, 6))
    np.savez(tmp_path / "sb.npz", s=values[1], b=values[2])
    np.savez(tmp_path / "l.npz", l=values[0])
    load = functools.partial(statistics.load_published, tmp_path, sde, (4, 6, 3), t_end=1e-3, origin={})
    ems = load()
    assert (ems.t[0], ems.t[-1]) == (1.0, 1e-3)
    np.testing.assert_array_equal(ems.b[2, 1, 5, 0], values[2, 2, 0, 1, 5])
    if l is None:
        (tmp_path / "l.npz").unlink()
    else:
        np.savez(tmp_path / "l.npz", l=l)
    with pytest.raises(UserError, match=words) as error:
        load()
    assert "\n" not in str(error.value)
