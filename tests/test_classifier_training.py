"""The classifier learns, by the training program, and guides; tasks of sample.py as a user runs them."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from score_sde import losses
from score_sde import sde as sde_lib
from score_sde.models.classifier import WideResnet, convolve, logits_fn
from tests.mixture import Mixture
from tests.programs import ROOT, TINY, ok, program

TINY_CLASSIFIER = [
    "--config=configs/classifier/digits.py",
    "--config.model.blocks_per_group=1",
    "--config.training.batch_size=8",
    "--config.training.checkpoint_freq=4",
    "--config.training.keep_freq=4",
    "--config.training.n_iters=4",
]


# -- The network and its loss --


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [4, 7])
def test_gradients_of_the_convolution(stride, size, x64):
    """Those of the library's own, also for odd sizes."""
    key_x, key_kernel = jax.random.split(jax.random.key(0))
    x, kernel = jax.random.normal(key_x, (2, size, size + 2, 3)), jax.random.normal(key_kernel, (3, 3, 3, 5))
    layout = ("NHWC", "HWIO", "NHWC")
    plain = lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, "SAME", dimension_numbers=layout)
    ours, theirs = (
        jax.jit(jax.grad(lambda x, kernel: jnp.sin(f(x, kernel)).sum(), argnums=(0, 1)))(x, kernel)
        for f in (lambda x, kernel: convolve(x, kernel, stride), plain)
    )
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-12)


def test_the_same_image_under_any_sde_is_one_question():
    """The classifier sees x / alpha and sigma / alpha alone: VP and VE at equal half-log-SNR give the same logits."""
    network = WideResnet(1, 1, 3, mean=(0.1,), std=(0.5,))
    key = jax.random.key(0)
    x0, z = jax.random.normal(key, (2, 8, 8, 1)), jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    params = jax.jit(network.init)(key, x0, jnp.ones(2))
    apply = jax.jit(lambda x, sigma: network.apply(params, x, sigma))
    found = []
    for sde in (sde_lib.VP(), sde_lib.VE()):
        t = jnp.asarray(sde.t_of_lam(np.array([0.5, -1.0])), jnp.float32)
        found.append(logits_fn(apply, sde)(sde.perturb(x0, t, z), t))
    np.testing.assert_allclose(found[0], found[1], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("sde", [sde_lib.VP(), sde_lib.VE()], ids=lambda sde: type(sde).__name__)
def test_cross_entropy_of_the_exact_posterior(sde):
    """Bayes' classifier of a mixture has the least loss, and its mean is the entropy of the label given x_t."""
    shape, n = (2, 2, 1), 4000
    rng = np.random.default_rng(0)
    mixture = Mixture(np.array([0.5, 0.3, 0.2]), rng.normal(size=(3, *shape)), np.full((3, *shape), 0.3))
    y = rng.choice(3, size=n, p=mixture.weights)
    x0 = jnp.asarray(mixture.means[y] + np.sqrt(0.3) * rng.normal(size=(n, *shape)), jnp.float32)
    t, z = jnp.full(n, 0.2), jnp.asarray(rng.normal(size=(n, *shape)), jnp.float32)
    exact = lambda x, t: mixture._components(x, sde.alpha(t), sde.sigma(t), None)[0]
    loss = losses.cross_entropy(exact, sde, x0, t, z, jnp.asarray(y))
    posterior = jax.nn.softmax(exact(sde.perturb(x0, t, z), t))
    entropy = -(posterior * jnp.log(posterior)).sum(1)
    assert loss.shape == (n,)
    np.testing.assert_allclose(loss.mean(), entropy.mean(), atol=3 * float((loss - entropy).std()) / n**0.5)
    for scale in (0.5, 2.0):
        scaled = lambda x, t, scale=scale: scale * exact(x, t)
        assert losses.cross_entropy(scaled, sde, x0, t, z, jnp.asarray(y)).mean() > loss.mean()


# -- The programs --

# Several runs of sample.py in one process; prints the line of the mistake of each, or null.
SAMPLE = """
import json, sys
import numpy as np
from absl import flags
import sample
from experiments import drawing, program
from score_sde.errors import UserError
lines, few_step = {}, drawing.few_step

def failing(*arguments, **options):
    method = few_step(*arguments, **options)
    def fails_late(index, advance):
        drawing.refuse_not_finite(np.where(index == 4, np.nan, 0.0)[:, None, None, None], index, "evaluation 5", 0.1)
        return method.draw(index, advance)
    return method._replace(draw=fails_late)

for name, arguments in json.loads(sys.argv[1]).items():
    flags.FLAGS.unparse_flags()
    drawing.few_step = failing if name == "second batch" else few_step
    try:
        program._parse(["sample.py", f"--name={name}", *arguments])
        sample.main()
        lines[name] = None
    except UserError as error:
        lines[name] = str(error)
print(json.dumps(lines))
"""
MODEL, CLASS = "--workdir={runs}/model", "--classifier={runs}/classifier"
FEW, PC, INPAINT = ["--solver=dpmpp", "--steps=5"], ["--solver=pc", "--steps=30"], [MODEL, "--task=inpaint"]
COMMANDS = {
    "plain": [MODEL, *FEW],
    "guided": [MODEL, *FEW, "--task=class", CLASS, "--label=3"],
    "guided by nothing": [MODEL, *FEW, "--task=class", CLASS, "--label=3", "--guidance=0"],
    "guided pc": [MODEL, *PC, "--task=class", CLASS, "--label=3", "--option", "corrector=langevin"],
    "completed": [*INPAINT, "--steps=30", "--image={runs}/levels.png", "--mask={runs}/mask.png"],
    "completed test images": [*INPAINT, "--steps=30"],
    "completed in few": [*INPAINT, *FEW, "--image={runs}/levels.png", "--mask={runs}/mask.png", "--method=ddnm"],
    "enlarged": [MODEL, *FEW, "--task=super_resolve", "--factor=2"],
    "coloured": ["--workdir={runs}/colour", "--task=colorize", "--steps=30", "--image={runs}/levels.png"],
}
# arguments, and words that the line of the mistake must hold
MISTAKES = {
    "mask of another size": ([*INPAINT, "--mask={runs}/large.png"], ["large.png is 9x8", "8x8"]),
    "image of another size": ([*INPAINT, "--image={runs}/large.png"], ["large.png is 9x8", "8x8"]),
    "image with colours": ([*INPAINT, "--image={runs}/colour.png"], ["3 colour channel(s)", "have 1"]),
    "no image": ([*INPAINT, "--image={runs}/no.png"], ["no such image", "no.png"]),
    "folder for an image": ([*INPAINT, "--image={runs}"], ["is a folder", "one image file"]),
    "image that is none": ([*INPAINT, "--image={runs}/text.png"], ["text.png is not a readable image"]),
    "mask without task": ([MODEL, "--mask={runs}/mask.png"], ["--mask needs --task=inpaint"]),
    "gray model": ([MODEL, "--task=colorize"], ["gray"]),
    "inpainting by the ODE": ([*INPAINT, "--solver=ode"], ["--solver=dpmv3"]),
    "a method of pc": ([*INPAINT, "--method=dps"], ["few-step solvers"]),
    "deblurring by pc": ([MODEL, "--task=deblur", "--solver=pc"], ["not by pc: --solver=dpmv3"]),
    "a factor that does not divide": ([MODEL, "--task=super_resolve", *FEW, "--factor=3"], ["8x8", "divides both"]),
    "no operator": ([MODEL, "--task=custom", *FEW], ["expected module:function"]),
    "an operator of no module": ([MODEL, "--task=custom", *FEW, "--operator=no_such:f"], ["ModuleNotFoundError"]),
    "an operator that is none": ([MODEL, "--task=custom", *FEW, "--operator=math:pi"], ["expected a function"]),
    "an operator of something else": ([MODEL, "--task=custom", *FEW, "--operator=math:sin"], ["does not take images"]),
    "a blur of what is no deblurring": ([*INPAINT, "--blur=2"], ["--blur needs --task=deblur"]),
    "no classifier": ([MODEL, "--task=class", "--label=3"], ["--classifier=WORKDIR"]),
    "label out of range": ([MODEL, "--task=class", CLASS, "--label=10"], ["--label=10", "0 to 9"]),
    "a model as classifier": (
        [MODEL, "--task=class", "--classifier={runs}/model"],
        ["holds a model of images, not a classifier"],
    ),
    "a classifier as model": (["--workdir={runs}/classifier"], ["holds a classifier, not a model of images"]),
    "classifier of another SDE": (
        [MODEL, "--task=class", "--classifier={runs}/other"],
        ["beta_max=15.0", "beta_max=20.0"],
    ),
    "neither predictor nor corrector": ([MODEL, *PC, "--option", "predictor=none"], ["neither a predictor nor"]),
    "ancestral ODE": (
        [MODEL, *PC, "--option", "predictor=ancestral_sampling", "--option", "probability_flow=True"],
        ["no probability flow"],
    ),
    "second batch": (
        [MODEL, *FEW, "--batch_size=3"],
        ["sample 4 is not finite after evaluation 5, at t = 0.1", "the 3 samples finished before it are in"],
    ),
    "overflow in few steps": (
        [MODEL, *FEW, "--task=class", CLASS, "--guidance=1e38"],
        ["is not finite after evaluation ", "at t = "],
    ),
    "overflow in pc": (
        [MODEL, *PC, "--task=class", CLASS, "--guidance=1e38"],
        ["is not finite after step ", "at t = "],
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of few steps: a model of gray digits, one of colours, classifiers of the digits under two SDEs; images."""
    folder = tmp_path_factory.mktemp("runs")
    ok(program("train", *TINY, "--config.training.n_iters=4", f"--workdir={folder / 'model'}"))
    out = ok(program("train", *TINY_CLASSIFIER, f"--workdir={folder / 'classifier'}"))
    assert "accuracy on 297 test images" in out
    shutil.copytree(folder / "classifier", folder / "other")
    config = folder / "other" / "config.json"
    config.write_text(config.read_text().replace('"beta_max": 20.0', '"beta_max": 15.0'))
    images = np.random.default_rng(0).integers(0, 256, size=(32, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", train_images=images, test_images=images)
    colours = [f"--config.data.dataset={folder / 'images.npz'}", "--config.data.num_channels=3"]
    colours += ["--config.sde.beta_max=0.5"]  # so little noise that a network that knows nothing adds no more
    ok(program("train", *TINY, *colours, "--config.training.n_iters=1", f"--workdir={folder / 'colour'}"))
    Image.fromarray(LEVELS).save(folder / "levels.png")
    Image.fromarray(MASK).save(folder / "mask.png")
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(folder / "large.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "colour.png")
    (folder / "text.png").write_text("text")
    return folder


LEVELS = np.random.default_rng(0).choice(np.uint8([0, 100, 155, 255]), size=(8, 8))
MASK = np.uint8(255) * np.isin(np.arange(8), (2, 3, 4))[None].repeat(8, 0)


@pytest.fixture(scope="module")
def lines(runs):
    """What each of COMMANDS and MISTAKES said: the line of a mistake, or None."""
    commands = COMMANDS | {name: arguments for name, (arguments, _) in MISTAKES.items()}
    filled = {n: [a.format(runs=runs) for a in (*arguments, "--num_samples=6")] for n, arguments in commands.items()}
    command = [sys.executable, "-c", SAMPLE, json.dumps(filled)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return json.loads(ok(result).splitlines()[-1])


def samples(workdir, name):
    with np.load(workdir / "samples" / name / "samples.npz") as file:
        return file["samples"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_task_runs_and_says_what_it_did(name, runs, lines):
    assert lines[name] is None
    folder = runs / ("colour" if name == "coloured" else "model") / "samples" / name
    record = json.loads((folder / "run.json").read_text())
    assert record["num_samples"] == 6
    few = "--solver=dpmpp" in COMMANDS[name]
    assert record["nfe"] == (5 if few else 60 if name == "guided pc" else 30)
    assert record.get("task") == next((a.split("=")[1] for a in COMMANDS[name] if "--task" in a), None)


def test_the_class_matters_and_guidance_by_nothing_does_not(runs, lines):
    found = {name: samples(runs / "model", name) for name in COMMANDS if name != "coloured"}
    np.testing.assert_array_equal(found["guided by nothing"], found["plain"])
    assert (found["guided"] != found["plain"]).any()


def test_inpainting_keeps_what_is_known(runs, lines):
    """The very levels of the image where the mask is white; of test images the upper half."""
    given = samples(runs / "model", "completed")[..., 0]
    assert (given[:, MASK > 0] == LEVELS[MASK > 0]).all()
    assert (given[:, MASK == 0] != LEVELS[MASK == 0]).any()
    default = samples(runs / "model", "completed test images")
    assert (default[:4, :4] == default[:1, :4]).all()  # four samples of one image
    assert (default[3, :4] != default[4, :4]).any()
    assert Image.open(runs / "model" / "samples" / "completed test images" / "grid.png").width > 6 * 64


def test_colorization_keeps_the_gray(runs, lines):
    found = samples(runs / "colour", "coloured").astype(float)
    inside = ((found > 0) & (found < 255)).all(-1)  # the gray of others changes when they are cut off
    assert inside.mean() > 0.05
    assert found[inside].std(-1).min() > 0
    assert np.abs(found.mean(-1) - LEVELS)[inside].max() <= 1.5  # truncation takes a level at most, alpha a little


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, runs, lines):
    assert lines[mistake] is not None
    assert "\n" not in lines[mistake]
    for word in MISTAKES[mistake][1]:
        assert word in lines[mistake]
    assert (runs / "model" / "samples" / mistake).exists() == (mistake == "second batch")


def test_what_was_finished_before_a_failure_is_kept(runs, lines):
    np.testing.assert_array_equal(samples(runs / "model", "second batch"), samples(runs / "model", "plain")[:3])
