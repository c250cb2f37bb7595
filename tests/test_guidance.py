"""Guidance, its interval and thresholding: equal to the published implementation and to the exact mixture."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits, digits_conditional
from experiments import build, runs, samplers
from experiments.config import flat
from score_sde import data, denoiser, guidance, training
from score_sde import sde as sde_lib
from score_sde.denoiser import Diffusion, by_turns
from score_sde.errors import UserError
from score_sde.sde import per_image
from score_sde.space import pixels
from solvers import dpm_solver, tableau, unipc
from tests import reference
from tests.mixture import Mixture
from tests.programs import TINY, ok, program
from tests.test_solvers import problem, run_v3_rows, worst

CONDITION = (4.0, 0.0, 0.0)
SCHEDULES = {  # of the published figures: SDE, what its networks are told of the time
    "vp": (sde_lib.VP(), "t"),
    "discrete": (sde_lib.DiscreteVP(beta_min=0.85, beta_max=12.0, scaled=True, t_first=1e-3), "node"),
}


def mixture_noise(sde, condition):
    """The ideal NoiseFn of the mixture; condition: (B, 3), added to each image's log weights."""

    def noise(x, t):
        logits, pull = Mixture.reference()._components(x, sde.alpha(t), sde.sigma(t), None)
        mixed = (per_image(jax.nn.softmax(logits + condition), pull) * pull).sum(1)
        return per_image(sde.sigma(t), x) * mixed

    return noise


# ------------------------------------------------------------------------------------------------ published


@pytest.mark.parametrize("case", reference.cases("E_model_wrapper"))
def test_published_model_wrapper(case, x64):
    """Noise from each kind of network output and of guidance, in one call, and what the network is told of the time."""
    info, stored = reference.cases("E_model_wrapper")[case], reference.arrays("E_model_wrapper")
    get = lambda name: stored[f"{case}/{name}"]
    (sde, label), told = SCHEDULES[info["schedule"]], []
    x = jnp.asarray(reference.nhwc(get("x_f64")))
    t = jnp.asarray(np.round(get("t").astype(np.float64), 6))  # stored in float32, not so in the float64 run

    def noise_of(condition):
        def network(x, label):
            told.append(label)
            times = jnp.tile(t, len(x) // len(t))
            alpha, sigma = per_image(sde.alpha(times), x), per_image(sde.sigma(times), x)
            eps = mixture_noise(sde, condition)(x, times)
            x0 = (x - sigma * eps) / alpha
            return {"noise": eps, "x_start": x0, "v": alpha * eps - sigma * x0}[info["model_type"]]

        output = {"noise": "eps", "x_start": "x0", "v": "v"}[info["model_type"]]
        return denoiser.noise_fn(network, sde, output=output, label=label, num_scales=1000)

    def log_posterior(x, t):
        logits, _ = Mixture.reference()._components(x, sde.alpha(t), sde.sigma(t), None)
        return jax.nn.log_softmax(logits)[np.arange(len(x)), get("labels")]

    nothing, scale = jnp.zeros((len(x), 3)), info.get("guidance_scale")
    noise = {
        "uncond": lambda: noise_of(nothing),
        "classifier-free": lambda: guidance.classifier_free(noise_of, jnp.float64(get("condition")), 0.0, scale),
        "classifier": lambda: guidance.classifier_guidance(noise_of(nothing), sde, log_posterior, scale),
    }[info.get("guidance_type", "uncond")]()
    ours, times = jax.jit(lambda x, t: (noise(x, t), told[0]))(x, t)
    assert worst(ours, reference.nhwc(get("noise_f64"))) < 1e-9
    assert len(told) == 1
    np.testing.assert_allclose(times, get("model_input_time"), rtol=1e-6)


def test_published_dpm_solver_v3_of_a_guided_model(x64):
    """Every row of the published table, through `classifier_free`."""
    sde = problem("cfg")[0]
    info = reference.description("E_v3_cfg")["cfg"]

    def noise(x, t):
        condition = jnp.broadcast_to(jnp.asarray(info["condition"], x.dtype), (len(x), 3))
        return guidance.classifier_free(lambda c: mixture_noise(sde, c), condition, 0.0, info["guidance_scale"])(x, t)

    assert run_v3_rows("cfg", jnp.float64, noise).max() < 1e-9


def thresholding_options(info) -> dict:
    return dict(quantile=info["dynamic_thresholding_ratio"], minimum=info["thresholding_max_val"])


@pytest.mark.parametrize("case", [c for c in reference.cases("E_extra") if c.startswith("threshold_fn")])
def test_published_dynamic_thresholding(case, x64):
    sde, stored, t = sde_lib.VP(), reference.arrays("E_extra"), jnp.float64(0.3)
    x0 = jnp.asarray(reference.nhwc(stored[f"{case}/x_f64"]))
    options = thresholding_options(reference.cases("E_extra")[case])
    noise = guidance.dynamic_threshold(lambda x, t: jnp.zeros_like(x), sde, -1.0, 1.0, **options)
    x = sde.alpha(t) * x0  # of which x0 is the data prediction where eps = 0
    ours = (x - sde.sigma(t) * noise(x, t)) / sde.alpha(t)
    np.testing.assert_allclose(ours, reference.nhwc(stored[f"{case}/y_f64"]), atol=1e-12)


@pytest.mark.parametrize("case", [c for c in reference.cases("E_extra") if c.startswith("thresholded_")])
def test_published_thresholded_solvers(case, x64):
    """DPM-Solver++ and UniPC."""
    info, sde = reference.cases("E_extra")[case], sde_lib.VP()
    noise = guidance.dynamic_threshold(Mixture.reference().noise_fn(sde), sde, -1.0, 1.0, **thresholding_options(info))
    build = {"dpm": dpm_solver.dpm_solver_pp, "uni": unipc.uni_pc}[case.split("_")[1]]
    table = build(sde, info["steps"], order=int(case[-1]))
    x = jnp.asarray(reference.nhwc(reference.arrays("E_v3_vp")["x_T"]), jnp.float64)
    ours = tableau.solve(noise, table, x)
    assert worst(ours, reference.nhwc(reference.arrays("E_extra")[f"{case}/x0_f64"])) < 1e-9


# ------------------------------------------------------------------------------------------------ guidance


@pytest.mark.parametrize("sde", [sde_lib.VP(), sde_lib.SubVP(), sde_lib.VE()], ids=lambda sde: type(sde).__name__)
def test_both_guidances_are_bayes_rule(sde, x64):
    """With the exact posterior they are one: p_scale(x | y) is proportional to p(x) p(y | x)^scale."""
    mixture, scale = Mixture.reference(), 3.5
    x, t = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 3))), jnp.array([0.1, 0.4, 0.8])
    density = lambda x, t, c: mixture.log_density(x, sde.alpha(t), sde.sigma(t), c)
    log_probability = lambda x, t: density(x, t, CONDITION) - density(x, t, None)
    bent = lambda x: density(x, t, None) + scale * log_probability(x, t)
    exact = -per_image(sde.sigma(t), x) * jax.jit(jax.grad(lambda x: bent(x).sum()))(x)
    condition = jnp.broadcast_to(jnp.array(CONDITION), (3, 3))
    for guided in (
        guidance.classifier_guidance(mixture.noise_fn(sde), sde, log_probability, scale),
        guidance.classifier_free(lambda c: mixture_noise(sde, c), condition, 0.0, scale),
    ):
        np.testing.assert_allclose(jax.jit(guided)(x, t), exact, atol=1e-10)


def constant(value):
    return lambda x, t: jnp.full_like(x, value)


@pytest.mark.parametrize(("scale", "images"), [(2.0, 8), (1.0, 4)])
def test_classifier_free_is_one_network_call(scale, images):
    """On twice the batch, both halves of each image with its own time; without guidance on the batch alone."""
    calls = []

    def noise_of(y):
        def noise(x, t):
            calls.append(x.shape[0])
            return x * per_image(t * (1.0 + y), x)

        return noise

    y = jnp.arange(1.0, 5.0)
    x, t = jnp.ones((4, 2, 2, 1)), jnp.linspace(0.1, 0.9, 4)
    guided = guidance.classifier_free(noise_of, y, -1.0, scale)
    np.testing.assert_allclose(guided(x, t)[:, 0, 0, 0], scale * t * (1 + y), rtol=1e-6)
    assert calls == [images]


def test_interval_evaluates_one_of_the_two_at_each_step():
    evaluated = []

    def recorded(name, value):
        def noise(x, t):
            jax.debug.callback(lambda t: evaluated.append((name, float(t))), t)
            return jnp.full_like(x, value)

        return noise

    noise = guidance.within(recorded("plain", 0.1), recorded("guided", 0.2), 0.2, 0.8)
    table = dpm_solver.ddim(sde_lib.VP(), 10, grid="time")
    jax.block_until_ready(jax.jit(lambda x: tableau.solve(noise, table, x))(jnp.ones((2, 4, 4, 1))))
    jax.effects_barrier()
    assert len(evaluated) == 10
    assert {name for name, _ in evaluated} == {"plain", "guided"}
    assert all((name == "guided") == (0.2 < t <= 0.8) for name, t in evaluated)


def test_interval_is_open_below_and_closed_above():
    chosen = guidance.within(constant(0.0), constant(1.0), 0.25, 0.5)
    t = jnp.array([0.2, 0.25, 0.3, 0.5, 0.6])
    x = jnp.zeros((5, 2, 2, 1))
    np.testing.assert_array_equal(chosen(x, t)[:, 0, 0, 0], [0, 0, 1, 1, 0])
    assert [float(chosen(x, time).max()) for time in t] == [0, 0, 1, 1, 0]


# ------------------------------------------------------------------------------------------------ thresholding


def data_prediction(noise, sde, x, t):
    return (x - per_image(sde.sigma(t), x) * noise(x, t)) / per_image(sde.alpha(t), x)


@pytest.mark.parametrize(("sde", "low", "high"), [(sde_lib.VP(), -1.0, 1.0), (sde_lib.VE(), 0.0, 1.0)])
def test_thresholded_data_predictions(sde, low, high, x64):
    """Clipped, or of each image the part beyond its own quantile clipped and the rest drawn in; inside, the same."""
    rng = np.random.default_rng(1)
    x, t = jnp.asarray(rng.normal(size=(3, 4, 4, 1))), jnp.array([0.2, 0.4, 0.5])
    spread = np.array([0.2, 0.9, 4.0]).reshape(3, 1, 1, 1) * (high - low) / 2
    x0 = jnp.asarray((low + high) / 2 + spread * rng.uniform(-1, 1, size=(3, 4, 4, 1)))
    eps = (x - per_image(sde.alpha(t), x) * x0) / per_image(sde.sigma(t), x)
    noise = lambda x, t: eps
    static = guidance.static_threshold(noise, sde, low, high)
    np.testing.assert_allclose(data_prediction(static, sde, x, t), jnp.clip(x0, low, high), atol=1e-12)
    dynamic = guidance.dynamic_threshold(noise, sde, low, high, quantile=0.8)
    for bent in (static, dynamic):
        np.testing.assert_array_equal(bent(x, t)[:2], eps[:2])
    centred = (np.asarray(x0[2]) - (low + high) / 2) / ((high - low) / 2)
    s = np.quantile(np.abs(centred), 0.8)
    wanted = (low + high) / 2 + (high - low) / 2 * np.clip(centred, -s, s) / s
    np.testing.assert_allclose(data_prediction(dynamic, sde, x, t)[2], wanted, atol=1e-12)


def test_thresholding_latents_is_refused():
    for threshold in (guidance.static_threshold, guidance.dynamic_threshold):
        with pytest.raises(UserError, match="latents"):
            threshold(constant(0.0), sde_lib.VP(), -np.inf, np.inf)


# ------------------------------------------------------------------------------------------------ training


def test_label_dropout():
    """Its rate, and that it depends neither on how a batch is split nor on anything but an example's own key."""
    keys = jax.random.split(jax.random.key(0), 10_000)
    y = jnp.arange(10_000, dtype=jnp.int32) % 10
    dropped = np.asarray(training.hide_conditions(keys, y, rate=0.15, null=10))
    hidden = dropped == 10
    assert abs(hidden.mean() - 0.15) < 5 * np.sqrt(0.15 * 0.85 / 10_000)
    np.testing.assert_array_equal(dropped[~hidden], y[~hidden])
    assert set(np.asarray(y)[hidden]) == set(range(10))
    later = training.hide_conditions(keys[4000:], y[4000:], rate=0.15, null=10)
    np.testing.assert_array_equal(later, dropped[4000:])


def test_loss_hides_labels_in_training_alone():
    """The labels that a network sees, read off its loss, whole or split over devices; another key hides others."""
    size = 64
    loss = training.make_loss(
        lambda params, y, keys: lambda x, t: x * 0.0 + 1000.0 * per_image(y.astype(x.dtype), x),
        sde_lib.VP(),
        lambda key, image: image.astype(jnp.float32),
        times=jax.random.uniform,
        weight=jnp.ones_like,
        reduce_mean=True,
        label_dropout=0.3,
        null=3,
    )
    batch = {
        "image": np.zeros((size, 2, 2, 1), np.uint8),
        "index": np.arange(size),
        "label": np.arange(size, dtype=np.int32) % 3,
    }
    loss = jax.jit(loss, static_argnums=3)
    seen = lambda batch, seed, train: np.round(np.sqrt(loss(None, batch, jax.random.key(seed), train)) / 1000)
    np.testing.assert_array_equal(seen(batch, 0, False), batch["label"])
    whole = seen(batch, 0, True)
    assert set(whole) == {0, 1, 2, 3}
    quarters = [{name: values[i : i + 16] for name, values in batch.items()} for i in range(0, size, 16)]
    np.testing.assert_array_equal(np.concatenate([seen(part, 0, True) for part in quarters]), whole)
    assert (seen(batch, 1, True) != whole).any()


def test_classes_add_one_table_to_the_network():
    """A network without classes has the parameters it had; with them, one embedding more, for "no class" too."""
    shapes = [
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(template)}
        for template in (
            jax.eval_shape(build.diffusion_of(module.get_config()).init, jax.random.key(0))
            for module in (digits, digits_conditional)
        )
    ]
    assert shapes[1].items() - shapes[0].items() == {("['Embed_0']['embedding']", (11, 96))}
    assert shapes[0].items() <= shapes[1].items()


def test_labels_that_are_no_classes_are_refused():
    take = lambda indices: {"image": np.zeros((len(indices), 2, 2, 1), np.uint8), "label": np.asarray(indices)}
    images = build.checked_labels(data.Images("ten", 10, take), 5, "model.num_classes")
    assert images.take(np.arange(5))["label"].max() == 4
    with pytest.raises(UserError, match=r"ten has the label 5, but model\.num_classes is 5"):
        images.take(np.arange(6))
    bare = data.Images("bare", 10, lambda indices: {"image": np.zeros((len(indices), 2, 2, 1), np.uint8)})
    with pytest.raises(UserError, match="bare has no labels"):
        build.checked_labels(bare, 5, "model.num_classes")


def test_label_dropout_needs_classes():
    config = digits.get_config()
    config.training.label_dropout = 0.1
    with pytest.raises(UserError, match=r"training\.label_dropout is 0\.1"):
        build.diffusion_of(config)


def test_a_run_older_than_label_dropout_still_opens(tmp_path):
    fields = digits.get_config().to_dict()
    del fields["training"]["label_dropout"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = runs.read_config(tmp_path)
    assert config.training.label_dropout == 0.0
    assert flat(config).keys() == flat(digits.get_config()).keys()


# ------------------------------------------------------------------------------------------------ programs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A class-conditional run of some steps, of a network that heeds its labels from the first."""
    workdir = tmp_path_factory.mktemp("runs") / "conditional"
    tiny = [option.replace("digits.py", "digits_conditional.py") for option in TINY]
    tiny += ["--config.model.init_scale=1.0", "--config.training.n_iters=4"]
    ok(program("train", *tiny, f"--workdir={workdir}"))
    return workdir


def samples(workdir, name, *arguments):
    ok(program("sample", f"--workdir={workdir}", f"--name={name}", "--solver=ddim", "--steps=3", *arguments))
    folder = workdir / "samples" / name
    return np.load(folder / "samples.npz")["samples"].astype(int), json.loads((folder / "run.json").read_text())


@pytest.mark.slow
def test_labels_and_guidance_of_samples(run):
    """Without --label classes go by turns; sample i is the same sample wherever its class is asked for."""
    turns, _ = samples(run, "turns", "--num_samples=14", "--batch_size=7", "--guidance=2.0")
    threes, record = samples(run, "threes", "--num_samples=14", "--label=3", "--guidance=2.0")
    assert (record["label"], record["guidance"]) == (3, 2.0)
    same = np.abs(turns - threes).max((1, 2, 3)) <= 1  # a level, by rounding
    np.testing.assert_array_equal(np.flatnonzero(same), [3, 13])
    options = ["--num_samples=14", "--label=3", "--guidance=9.0", "--threshold=dynamic"]
    bent, record = samples(run, "bent", *options, "--guidance_interval=0.1,0.9")
    assert (record["threshold"], record["guidance_interval"]) == ("dynamic", "0.1,0.9")
    assert np.abs(bent - threes).max() > 1


MISTAKES = {
    "--label=10": ({}, dict(label=10), "the classes of .* are 0 to 9"),
    "interval without a scale": (dict(interval="0.1,0.9"), {}, "needs the scale"),
    "falling interval": (dict(scale=2.0, interval="0.9,0.1"), {}, "two rising times"),
    "an interval in words": (dict(scale=2.0, interval="early"), {}, "two rising times"),
    "guidance of no classes": (dict(scale=2.0), dict(num_classes=0, null=None), "has no classes"),
    "a label of no classes": ({}, dict(label=1, num_classes=0), "has no classes"),
    "guidance of a model that saw all labels": (dict(scale=2.0), dict(null=None), "never saw a hidden label"),
    "no number": (dict(scale=np.nan), {}, "expected a number"),
    "another threshold": (dict(threshold="soft"), {}, "dynamic, static"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_guidance(mistake):
    given, changes, message = MISTAKES[mistake]
    fields = {name: value for name, value in changes.items() if name != "label"}
    diffusion = build.diffusion_of(digits_conditional.get_config())._replace(**fields)
    model = runs.Model(pathlib.Path("runs/by_class"), None, diffusion, {}, 8, "c0ffee")
    with pytest.raises(UserError, match=message):
        runs.with_guidance(model, samplers.guidance_of(**given), label=changes.get("label"))


def test_a_classifier_guides_a_conditional_model_too():
    """Classes by turns reach both, and the gradient is that of the classifier's log probability."""
    sde, space = sde_lib.VP(), pixels((2, 2, 1))
    conditional = lambda params, y, keys=None: lambda x, t: params * per_image(y.astype(x.dtype), x) * jnp.ones_like(x)
    logits = lambda weight: lambda x, t: weight * x.reshape(len(x), 4)
    model = Diffusion(sde, space, None, conditional, np.int32(4), by_turns(4), 4)
    classifier = guidance.Classifier(sde, space, None, logits, 4)
    bent = guidance.guide(model, guidance.Guidance(2.0, classifier=classifier))
    index, x, t = jnp.arange(6), jnp.asarray(reference.normal("x", (6, 2, 2, 1)), jnp.float32), jnp.full((6,), 0.5)
    y = bent.conditions(index)
    ours = bent.noise_of((3.0, 1.5), y)(x, t)
    share = jax.nn.softmax(1.5 * x.reshape(6, 4)) - jax.nn.one_hot(index % 4, 4)
    plain = 3.0 * per_image((index % 4).astype(x.dtype), x)
    expected = plain + 2.0 * per_image(sde.sigma(t), x) * 1.5 * share.reshape(x.shape)
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    with pytest.raises(UserError, match="a classifier of 4 classes cannot guide a model of 3"):
        guidance.guide(model._replace(num_classes=3), guidance.Guidance(2.0, classifier=classifier))


def test_a_condition_is_any_tree():
    """Classifier-free guidance and hiding treat each array of it alike, of whatever shape."""
    condition = {"text": jnp.ones((2, 3, 4)), "size": jnp.arange(2.0) + 1}
    null = {"text": np.zeros((3, 4), np.float32), "size": np.float32(0)}
    told = lambda c: lambda x, t: x * 0.0 + per_image(c["text"].sum((1, 2)) + c["size"], x)
    x = jnp.zeros((2, 2, 2, 1))
    ours = guidance.classifier_free(told, condition, null, 3.0)(x, jnp.float32(0.5))
    np.testing.assert_allclose(ours[:, 0, 0, 0], [39.0, 42.0])
    keys = jax.random.split(jax.random.key(0), 2)
    hidden = training.hide_conditions(keys, condition, rate=1.0, null=null)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(hidden))
