"""Latent models as run folders: imported, opened, told prompts, sampled, measured and compared, by the programs' own
functions."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ems import statistics
from experiments import (
    build,
    drawing,
    evaluation,
    image_to_image,
    latent_mse,
    latent_runs,
    measuring,
    parts,
    prompts,
    runs,
    samplers,
)
from score_sde import latent_models, latents, tokenizer
from score_sde.denoiser import noise_fn
from score_sde.errors import UserError
from score_sde.guidance import Guidance, classifier_free
from score_sde.models import published_latents
from score_sde.models.autoencoder import Autoencoder
from score_sde.models.clip_text import CLIPText
from score_sde.models.unet import UNet
from score_sde.sde import DiscreteVP
from solvers import SOLVERS
from tests import reference
from tests.latent import TINY, compared, figures_of, mini, nchw, needs_tiny
from tests.test_latent_sampling import mixture, schedule
from tools import import_checkpoint

PROMPTS = prompts.Prompts(["a cat", "the sea", "a dog"], "sea")
GUIDED = Guidance(2.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run folder of a small model of prompts, opened, not told any."""
    folder = tmp_path_factory.mktemp("mini")
    latent_runs.write(mini(folder / "tokenizer"), folder / "run", "a file")
    return runs.open_model(str(folder / "run"))


@pytest.fixture(scope="module")
def told(model):
    return prompts.prompted(model, PROMPTS)


def test_a_run_is_the_model(model, told, tmp_path):
    """Guided noise and images of the run: those of the parts put together by hand."""
    ours = mini(tmp_path)
    read_tokens = tokenizer.read(tmp_path)
    x, sde = jax.random.normal(jax.random.key(1), (3, 8, 8, 2)), DiscreteVP(**ours.sde)
    both = ours.autoencoder.network, ours.autoencoder.params, ours.scale

    @jax.jit
    def by_hand(x):
        context, _ = latents.contexts(*ours.text, read_tokens, [*PROMPTS.texts, PROMPTS.negative])

        def noise_of(y):
            network = lambda x, label: ours.unet.network.apply({"params": ours.unet.params}, x, label, y)
            return noise_fn(network, sde, output="eps", label="node")

        noise = classifier_free(noise_of, context[:-1], context[-1], 2.0)
        return noise(x, jnp.float32(0.4)), latents.decoder(*both)(x)

    @jax.jit
    def of_the_run(params, x):
        return sampled.diffusion.noise_of(params, sampled.diffusion.conditions(jnp.arange(3)))(x, jnp.float32(0.4))

    sampled = runs.with_guidance(told, GUIDED)
    noise, images = by_hand(x)
    compared(of_the_run(sampled.params, x), noise, 1e-5, "noise")
    levels = np.clip(127.5 * (np.asarray(images, np.float64) + 1), 0, 255)
    np.testing.assert_allclose(model.diffusion.space.decode(x), levels, atol=1.01)
    assert sampled.diffusion.sde == sde and model.diffusion.space.shape == (8, 8, 2)


def test_images_become_latents(model, tmp_path):
    """Draws of the encoder's distribution, around its mean for the image in [-1, 1]."""
    ours = mini(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    mean = jax.jit(functools.partial(latents.encoder(*ours.autoencoder, ours.scale), None))(
        image / np.float32(127.5) - 1
    )
    draws = jax.jit(jax.vmap(model.diffusion.space.encode, (0, None)))(jax.random.split(jax.random.key(0), 256), image)
    assert np.abs((draws.mean(0) - mean) / np.asarray(draws.std(0))).max() < 5 / 16


def test_classes_are_rows_of_a_table(tmp_path, monkeypatch):
    """A class-conditional model is guided like one of pixels: its classes by turns, and the last row is none."""
    ours = mini(tmp_path, classes=3)
    latent_runs.write(ours, tmp_path / "run", "a file")
    opened = runs.open_model(str(tmp_path / "run"))
    diffusion = opened.diffusion
    assert (diffusion.num_classes, diffusion.null, list(diffusion.conditions(np.arange(4)))) == (3, 3, [0, 1, 2, 0])
    seen = []
    monkeypatch.setattr(UNet, "apply", lambda self, params, x, label, y, keys: seen.append(y) or x)
    diffusion.noise_of(opened.params, jnp.array([1, 3]))(jnp.zeros((2, 8, 8, 2)), jnp.float32(0.5))
    np.testing.assert_array_equal(seen[0], ours.classes[[1, 3]][:, None])


def test_samples_of_prompts(model, told, tmp_path):
    """Each is its prompt's and its index's, whatever it is drawn with; run.json tells of the prompts."""
    way = dict(solver="unipc", steps=5, options=dict(order=2, grid="time"))
    sampled = runs.with_guidance(told, GUIDED)
    method = drawing.few_step(sampled, **way)
    options = dict(batch_size=4, seed=0, bending=PROMPTS.record())
    drawn = drawing.draw_and_write(sampled, method, 4, tmp_path, **options).images
    assert drawn.shape == (4, 16, 16, 3) and drawn.dtype == np.uint8
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["prompts"] == PROMPTS.texts and record["negative_prompt"] == "sea"

    alone = runs.with_guidance(prompts.prompted(model, PROMPTS._replace(texts=["the sea"])), GUIDED)
    x, _ = drawing.few_step(alone, **way).draw(np.arange(1, 2), lambda n: None)
    np.testing.assert_array_equal(alone.diffusion.space.decode(x)[0], drawn[1])


def test_samples_that_begin_at_an_image(model, tmp_path):
    """At the image's own marginal at the time that the strength says, on the grid from there on."""
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    options, start, _ = image_to_image.begin(model, str(path), 0.5, 4, dict(order=2))
    sde, keys = model.diffusion.sde, samplers.sample_keys(0, np.arange(3))
    assert options["order"] == 2 and np.allclose(options["grid"], np.linspace(0.5005, 0.001, 5))
    x0 = jax.jit(model.diffusion.space.encode)(jax.random.key(0), np.asarray(Image.open(path)))
    z = samplers.prior(model.diffusion, keys)
    np.testing.assert_allclose(start(keys), sde.perturb(x0[None], jnp.float32(0.5005), z), atol=1e-5)
    for image, strength, message in (
        (None, 0.5, "name it by --image"),
        (str(path), 0.0, "expected more than 0"),
        (str(tmp_path / "absent.png"), 0.5, "no such image"),
    ):
        with pytest.raises(UserError, match=message):
            image_to_image.begin(model, image, strength, 4, {})


def test_ems_of_prompts(told, monkeypatch):
    """Measured on own samples at the scale of guidance, they are found for it alone; sampling takes them."""
    monkeypatch.setattr(measuring, "print_errors", lambda model, ems, *blocks: ems)  # draws many samples
    sizes = dict(nodes=12, num_data=8, batch_size=4, own_steps=4)
    path = measuring.measure(told, **sizes, guidance=GUIDED, prompts=PROMPTS)
    origin = statistics.load_origin(path)
    assert origin["prompts"] == PROMPTS.name and origin["guidance_scale"] == 2.0 and origin["latent"]
    assert PROMPTS.name in path.name and measuring.find(told, 2.0) == path and measuring.find(told, 3.0) is None
    assert measuring.measure(told, **sizes, guidance=GUIDED, prompts=PROMPTS) == path  # not once more
    wide = runs.with_size(told, 16, 20)
    assert wide.diffusion.space.shape == (8, 10, 2) and measuring.find(wide, 2.0) is None
    for model, guidance, message in (
        (told, Guidance(3.0), "measured with guidance 2, sampling is with guidance 3"),
        (wide, GUIDED, r"is for x of shape \(8, 8, 2\)"),
    ):
        with pytest.raises(UserError, match=message):
            measuring.ems_of(model, str(path), guidance)
    with pytest.raises(UserError, match=r"no EMS of .* --prompts=FILE --guidance=3"):
        measuring.ems_of(told, None, Guidance(3.0))
    with pytest.raises(UserError, match="8 images, but there are 3 prompts: give as many"):
        arrays = dict(latents=np.zeros((8, 8, 8, 2), np.float32))
        np.savez(path.with_name("latents.npz"), **arrays)
        source = str(path.with_name("latents.npz"))
        measuring.measure(told, **sizes, source=source, guidance=GUIDED, prompts=PROMPTS)


def test_the_mean_square_of_latents(told, monkeypatch, tmp_path):
    """By its definition, from samples drawn here; a stopped call goes on; the report has a row a solver."""
    monkeypatch.setattr(latent_mse, "REFERENCE_STEPS", 12)
    bending, ways = dict(prompts=PROMPTS.name), [("dpmpp", 3), ("ddim", 3)]
    sampled = runs.with_guidance(told._replace(workdir=tmp_path), GUIDED)
    measure = functools.partial(latent_mse.measure, sampled, ways, seed=0, guidance_scale=2.0, bending=bending)
    results = list(measure(n=8))
    sample = samplers.sampler(sampled.diffusion, sampled.params, 0)
    x, fine = (sample(SOLVERS["dpmpp"](sampled.diffusion.sde, k, order=2, grid="time"), np.arange(8)) for k in (3, 12))
    errors = np.square(x.astype(np.float64) - fine).mean((1, 2, 3))
    np.testing.assert_allclose(results[0]["mse"], errors.mean(), rtol=1e-4)
    np.testing.assert_allclose(results[0]["standard_error"], errors.std(ddof=1) / np.sqrt(8), rtol=1e-4)
    report = {"model": {}}
    for result in results:
        report = evaluation.reports.add(report, "latent_mse", result | dict(seed=0))
    text = "\n".join(evaluation.reports.lines("latent_mse", report["latent_mse"][0]))
    assert "12 evaluations of DPM-Solver++ (order 2" in text and f"{errors.mean():.4g} +- " in text
    assert not list(tmp_path.rglob("*.partial.npz"))


@needs_tiny
def test_files_become_the_same_run(tmp_path):
    """A folder of diffusers and a single file: equal parts, under one config, all of it named."""
    folder = TINY.parent
    for name in ("sd_tiny", "sd_tiny.ckpt"):
        clip = None if name == "sd_tiny" else TINY / "tokenizer"
        import_checkpoint.import_checkpoint(str(folder / name), tmp_path / name, latent=dict(clip=clip))
    one, other = (runs.open_model(str(tmp_path / path.name)) for path in tmp_path.iterdir())
    assert other.identity == one.identity and other.config == one.config
    for part in (parts.AUTOENCODER, parts.TEXT):
        ours, theirs = ((run.workdir / f"{part}.safetensors").read_bytes() for run in (one, other))
        assert ours == theirs
    assert {leaf.dtype for leaf in jax.tree.leaves(one.params)} == {np.dtype(np.float16)}  # as in the file


@needs_tiny
def test_the_figures_by_run_folders(tmp_path, monkeypatch):
    """From a folder and prompts, by published statistics, to the published samples and images."""
    stored, case = figures_of("L_sampling", "e2e_sd_tiny"), reference.cases("L_sampling")["e2e_sd_tiny"]
    import_checkpoint.import_checkpoint(str(TINY), tmp_path / "run")
    opened = prompts.prompted(runs.open_model(str(tmp_path / "run")), prompts.Prompts(case["prompts"]))
    guidance = Guidance(case["guidance_scale"])
    np.savez(tmp_path / "l.npz", l=stored["l_f64"])
    np.savez(tmp_path / "sb.npz", s=stored["s_f64"], b=stored["b_f64"])
    measuring.take_published(opened, str(tmp_path), t_end=1e-3, guidance=guidance)
    start = jnp.asarray(reference.nhwc(stored["xT"]), jnp.float32)
    monkeypatch.setattr(samplers, "prior", lambda diffusion, keys: start[: len(keys)])
    model = runs.with_guidance(opened, guidance)

    ems = measuring.ems_of(opened, None, guidance)
    method = drawing.few_step(model, "dpmv3", 5, dict(snap=True), ems=ems)
    x, _ = method.draw(np.arange(2), lambda n: None)
    compared(nchw(x), stored["dpm_solver_v3_5_f64"], 1e-4, "samples")
    levels = np.asarray(model.diffusion.space.decode(x), int) - stored["image_uint8_truncated"]
    assert np.abs(levels).max() <= 1 and (levels == 0).mean() > 0.99


def test_published_mean_squares(model, tmp_path, monkeypatch):
    """The values are those of the published samplers on an exact model, guided at 7.5."""
    stored, case = figures_of("L_sampling", "gmm_cfg7.5"), reference.cases("L_sampling")["gmm_cfg7.5"]
    sde, exact = schedule(case["betas"]), mixture()
    noises = [exact.noise_fn(sde, np.asarray(row)) for row in [*case["condition"], [0.0, 0.0, 0.0]]]

    def noise_of(params, y, keys=None):
        return lambda x, t: jnp.stack([noise(x, t) for noise in noises])[y, jnp.arange(len(x))]

    start = jnp.asarray(reference.nhwc(stored["xT"]))
    monkeypatch.setattr(samplers, "prior", lambda diffusion, keys: start[: len(keys)])
    space = model.diffusion.space._replace(shape=start.shape[1:])
    told = dict(sde=sde, space=space, noise_of=noise_of, null=np.int32(2), conditions=lambda index: index)
    model = model._replace(workdir=tmp_path, diffusion=model.diffusion._replace(**told))
    model, ways = runs.with_guidance(model, Guidance(7.5)), [("dpmpp", 5), ("dpmpp", 10), ("unipc", 5), ("unipc", 10)]
    results = latent_mse.measure(model, ways, n=2, seed=0, guidance_scale=7.5, bending={})
    names = {"dpmpp": "dpm_solver++", "unipc": "uni_pc"}
    for result in results:
        expected = case["runs"][f"{names[result['solver']]}_{result['steps']}"]["mse"]
        np.testing.assert_allclose(result["mse"], expected, rtol=1e-3)


@pytest.mark.parametrize("name", ["sd_1.4", "sd_2.1", "ldm_lsun_bedroom"])
def test_published_shapes_make_a_run(name, tmp_path):
    """The config of a full-size model, read back from its folder, constructs the networks; nothing is allocated."""
    case = reference.description("L_unet")["full_size"][name]
    unet = published_latents.of_compvis(case["constructor"])
    first = (
        Autoencoder() if unet.context_dim else Autoencoder(ch_mult=(1, 2, 4), z_channels=3, embed_dim=3, num_codes=8192)
    )
    part = lambda network: latent_models.Part(network, {})
    model = latent_models.LatentModel(
        unet=part(unet),
        autoencoder=part(first),
        text=part(CLIPText(width=unet.context_dim, heads=unet.context_dim // 64)) if unet.context_dim else None,
        classes=None,
        scale=0.18215,
        sde=latent_models._schedule(0.00085, 0.012, 1000),
        output="v" if name == "sd_2.1" else "eps",
    )
    runs.claim_workdir(tmp_path, latent_runs.config_of(model))
    config = runs.read_config(tmp_path)
    side = {"sd_1.4": 512, "sd_2.1": 768, "ldm_lsun_bedroom": 256}[name]
    assert config.data.image_size == side and build.autoencoder_of(config) == first
    network, x = build.network_of(config), jnp.zeros((1, side // first.factor, side // first.factor, first.embed_dim))
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(1))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == case["n_params"]
    assert build.sde_of(config) == DiscreteVP(**model.sde)


def test_mistakes_in_prompts(model, told, tmp_path, capsys):
    """One line each."""
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n \n")
    latin.write_bytes("été".encode("latin-1"))
    for flags, message in (
        (("a", "b.txt"), "give one of them"),
        ((None, None, "sea"), "needs --prompt or --prompts too"),
        (("a", None, "sea"), "add its scale"),
        ((None, str(tmp_path / "absent.txt")), "cannot read --prompts="),
        ((None, str(latin)), "is no text in UTF-8"),
        ((None, str(empty)), "holds no prompts"),
    ):
        with pytest.raises(UserError, match=message):
            prompts.read(*flags)
    with pytest.raises(UserError, match="draws what prompts say: give --prompt"):
        prompts.prompted(model, None)
    with pytest.raises(UserError, match=r"--height=15: the sizes of .* are multiples of 2: take 16"):
        runs.with_size(model, 15)
    with pytest.raises(UserError, match="which latents do not have"):
        runs.with_guidance(told, Guidance(2.0, threshold="dynamic"))
    with pytest.raises(UserError, match="imported without its images"):
        measuring.training_images(model)
    with pytest.raises(UserError, match="it has no bits/dim"):
        build.pixels_of(model.config)
    boxed = runs.open_model("pretrained/fashion_mnist")
    for call, message in (
        (lambda: prompts.prompted(boxed, PROMPTS), "takes no prompts"),
        (lambda: runs.with_size(boxed, 16), "draws one size alone"),
        (lambda: next(latent_mse.measure(boxed, [], n=2, seed=0, bending={})), "use --metrics=convergence"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    capsys.readouterr()
    prompts.prompted(model, prompts.Prompts(["a cat the dog the sea"]))
    assert "prompt cut, 2 of its tokens are beyond the 6 that fit" in capsys.readouterr().out


def test_no_folder_of_a_part(model, tmp_path):
    """Nothing is left of an import that is refused, and a run that lost a part, or has another's, says so."""
    ours = mini(tmp_path / "tokenizer")
    for broken, message in (
        (ours._replace(tokenizer=None), "has no tokenizer: name the folder .* by --clip"),
        (ours._replace(unet=ours.unet._replace(params={"other": np.zeros(3)})), "does not fit"),
    ):
        with pytest.raises(UserError, match=message):
            latent_runs.write(broken, tmp_path / "run", "a file")
        assert not (tmp_path / "run").exists()
    tokens = dict(zip((tokenizer.START, tokenizer.END), range(2), strict=True))
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(tokens))
    (tmp_path / "tokenizer" / "merges.txt").write_text("")
    with pytest.raises(UserError, match="the tokenizer has 2 tokens"):
        latent_runs.write(ours, tmp_path / "run", "a file")
    copy = tmp_path / "copy"
    shutil.copytree(model.workdir, copy)
    content = bytearray((copy / "autoencoder.safetensors").read_bytes())
    content[-5] ^= 1
    (copy / "autoencoder.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="its arrays are not what was written"):
        runs.open_model(str(copy))
    (copy / "autoencoder.safetensors").unlink()
    with pytest.raises(UserError, match=r"which its config\.json tells of"):
        runs.open_model(str(copy))
    with pytest.raises(UserError, match="it is told more than x"):
        wider = {"input_0": {"kernel": np.zeros((3, 3, 9, 4))}}
        latent_models._checked(ours._replace(unet=ours.unet._replace(params=wider)))
