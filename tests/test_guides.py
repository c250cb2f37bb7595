"""What guides with parameters of its own, a classifier or a weaker model: exact on a mixture; EMS of what is guided."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from ems import estimate, moments, statistics
from experiments import guides, measuring, runs, samplers
from experiments.runs import Guide
from score_sde import guidance
from score_sde import sde as sde_lib
from score_sde.denoiser import Diffusion
from score_sde.errors import UserError
from score_sde.guidance import Classifier, Guidance
from score_sde.mixture import Mixture
from score_sde.space import pixels

SDE, SPACE, CLASSES = sde_lib.VP(t_min=0.1), pixels((8, 8, 1)), 10
VARIANCE, MEANS = 0.5, np.random.default_rng(0).uniform(-0.3, 0.3, (CLASSES, 8, 8, 1))
MIXTURE = Mixture(np.full(CLASSES, 1 / CLASSES), MEANS, np.full(MEANS.shape, VARIANCE))  # a component is a class


def posterior(params):
    """The exact log probability of each class at (x, t), as logits."""
    return lambda x, t: MIXTURE._components(x, SDE.alpha(t), SDE.sigma(t), None)[0]


UNCONDITIONAL = Diffusion(SDE, SPACE, None, lambda params, y=None, keys=None: MIXTURE.noise_fn(SDE))
CLASSIFIER = Guide(
    "classifier one", "one", "--classifier=one", dict(classifier=Classifier(SDE, SPACE, None, posterior, CLASSES)), {}
)
WEAKER = Guide("weaker one", "one", "--autoguidance=3", dict(weaker=UNCONDITIONAL), {})


def model_in(folder) -> runs.Model:
    config = digits.get_config()
    with config.unlocked():
        config.ems.update(nodes=6, num_data=32, batch_size=32)
    return runs.Model(folder, config, UNCONDITIONAL, {}, 8, "c0ffee")


def test_autoguidance_leads_away_from_the_weaker_model(x64):
    """Two Gaussians in closed form: the score of N(m, v)^w N(m, u)^(1 - w), of precision w / v - (w - 1) / u."""
    shape, v, u, w = (1, 1, 1), 0.2, 0.5, 3.0
    noise, weaker = (
        Mixture(np.ones(1), np.full((1, *shape), 0.3), np.full((1, *shape), s)).noise_fn(SDE) for s in (v, u)
    )
    x, t = jnp.linspace(-2, 2, 5).reshape(5, 1, 1, 1), jnp.float64(0.4)
    alpha, sigma = SDE.alpha(t), SDE.sigma(t)
    precision = w / (alpha**2 * v + sigma**2) - (w - 1) / (alpha**2 * u + sigma**2)
    expected = sigma * precision * (x - alpha * 0.3)
    np.testing.assert_allclose(jax.jit(guidance.autoguidance(noise, weaker, w))(x, t), expected, rtol=1e-12)
    assert guidance.autoguidance(noise, None, 1) is noise


def test_statistics_of_a_guided_model_are_those_of_what_guidance_makes_it(tmp_path):
    """An exact classifier at scale 1 makes the conditional model, a Gaussian: l = sigma^2 / (alpha^2 v + sigma^2)."""
    model = model_in(tmp_path)
    ems = statistics.load(measuring.measure(model, **model.config.ems, guidance=Guidance(1.0), beside=CLASSIFIER))
    alpha, sigma = SDE.alpha(ems.t), SDE.sigma(ems.t)
    expected = (sigma**2 / (VARIANCE * alpha**2 + sigma**2)).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(ems.l, np.broadcast_to(expected, ems.l.shape), atol=1e-5)


def made_up(model, guidance_scale, guided_by):
    """The path of a file of EMS as if they were measured in this way."""
    node = estimate.nodes(SDE, 6)
    about = dict(checkpoint=model.identity, step=8, sde=statistics.describe_sde(SDE), t_end=SDE.t_min, seed=0)
    about |= dict(data="digits", nodes=6, num_data=8, images=[[0, 8]])
    origin = about | dict(guidance_scale=guidance_scale, guided_by=guided_by)
    path = measuring.path_of(model, origin)
    statistics.save(path, statistics.EMS(node.t, node.lam, *np.ones((3, 7, *SPACE.shape)), origin))
    blocks = moments.Moments.zeros((moments.BLOCKS, 7), SPACE.shape)
    moments.save(path.with_suffix(moments.SUFFIX), moments.Saved(node.t, node.lam, blocks, origin))
    return path


def test_statistics_are_found_by_guide_and_scale_and_refused_for_others(tmp_path):
    model = model_in(tmp_path)
    plain, guided, weakly = (
        made_up(model, *way) for way in ((None, None), (2.0, "classifier one"), (1.5, "weaker one"))
    )
    other = CLASSIFIER._replace(identity="classifier two", flag="--classifier=two")
    for way, path in (
        ((), plain),
        ((2.0,), None),
        ((2.0, "classifier one"), guided),
        ((3.0, "classifier one"), None),
        ((2.0, "classifier two"), None),
        ((1.5, "weaker one"), weakly),
    ):
        assert measuring.find(model, *way) == path
    ems = measuring.ems_of(model, None, Guidance(2.0), CLASSIFIER)
    _, options = samplers.build_tableau(SDE, "dpmv3", 5, ems)
    assert (options["order"], options["grid"], options["corrector_pseudo"]) == (2, "time", True)  # published for ADM-G
    for path, scale, beside, words in (
        (guided, 3.0, CLASSIFIER, "with guidance 2 by classifier one, sampling is with guidance 3 by classifier one"),
        (guided, 2.0, other, "sampling is with guidance 2 by classifier two: .*--guidance=2 --classifier=two"),
        (guided, None, None, "sampling is without guidance"),
        (plain, 2.0, CLASSIFIER, "measured without guidance"),
    ):
        with pytest.raises(UserError, match=words) as error:
            measuring.ems_of(model, str(path), Guidance(scale), beside)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="guided by classifier one: give that by --classifier"):
        measuring.merge(model, [str(guided)])


@pytest.mark.parametrize(
    ("scale", "beside", "expected"),
    [
        (None, None, (None, None)),
        (1.0, None, (None, None)),
        (2.0, None, (2.0, None)),
        (None, CLASSIFIER, (1.0, "classifier one")),
        (0.0, CLASSIFIER, (None, None)),
        (1.0, WEAKER, (None, None)),
        (1.5, WEAKER, (1.5, "weaker one")),
    ],
)
def test_what_bends_the_statistics(scale, beside, expected):
    assert guides.bent_by(Guidance(scale), beside) == expected


MISTAKES = {
    "no scale": (dict(weaker=UNCONDITIONAL), None, "needs a scale"),
    "another SDE": (dict(weaker=UNCONDITIONAL._replace(sde=sde_lib.VE())), 2.0, "sde of the weaker model is VE"),
    "other images": (dict(weaker=UNCONDITIONAL._replace(space=pixels((4, 4, 1)))), 2.0, "image_shape"),
    "two guides": (dict(weaker=UNCONDITIONAL) | CLASSIFIER.part, 2.0, "at once"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_guides_that_do_not_fit(mistake):
    part, scale, words = MISTAKES[mistake]
    with pytest.raises(UserError, match=words):
        guidance.guide(UNCONDITIONAL, Guidance(scale, **part))


def test_flags_of_guides(tmp_path):
    model = model_in(tmp_path)
    assert guides.guide_of(model) is None
    with pytest.raises(UserError, match="one of them guides"):
        guides.guide_of(model, classifier="a", autoguidance="b")
    boxed = runs.open_model(str(runs.PRETRAINED / runs.BOXED))
    with pytest.raises(UserError, match="has one checkpoint alone"):
        guides.guide_of(boxed, autoguidance="5")
    with pytest.raises(UserError, match="is the model itself"):
        guides.guide_of(boxed, autoguidance=str(boxed.workdir))
