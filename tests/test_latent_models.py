"""Published latent diffusion models as files: the same parts from a folder and from both single files, and what comes
out of them equal to the published pipelines."""

import functools
import json
import pathlib
import pickle
import shutil
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from score_sde import latent_models, latents, tokenizer
from score_sde.denoiser import LABELS, noise_fn
from score_sde.errors import UserError
from score_sde.foreign import read_checkpoint
from score_sde.guidance import classifier_free
from score_sde.models.autoencoder import gaussian
from score_sde.sde import DiscreteVP
from solvers import grids
from tests import reference
from tests.latent import TINY, compared, figures_of, nchw, needs_tiny, tree_in

pytestmark = needs_tiny
FOLDER = TINY.parent
KINDS = (TINY, FOLDER / "sd_tiny.safetensors", FOLDER / "sd_tiny.ckpt")


def read(path, **options) -> latent_models.LatentModel:
    clip = {} if path.is_dir() else {"clip": TINY / "tokenizer"}
    return latent_models.read(path, **clip | options)


def copied(tmp_path, source=TINY) -> pathlib.Path:
    """A copy that may be changed."""
    if source.is_dir():
        shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copyfile)
        for folder in [tmp_path / "copy", *(tmp_path / "copy").iterdir()]:
            folder.chmod(0o755)
        return tmp_path / "copy"
    for suffix in (source.suffix, ".yaml"):
        shutil.copyfile(source.with_suffix(suffix), tmp_path / f"copy{suffix}")
    return tmp_path / f"copy{source.suffix}"


def test_all_three_kinds_hold_the_same_model():
    folder, *files = map(read, KINDS)
    for model in files:
        for part in ("unet", "autoencoder", "text"):
            ours, theirs = getattr(folder, part), getattr(model, part)
            assert jax.tree.structure(ours.params) == jax.tree.structure(theirs.params)
            assert all(jax.tree.leaves(jax.tree.map(np.array_equal, ours.params, theirs.params)))
            assert {leaf.dtype for leaf in jax.tree.leaves(theirs.params)} == {np.dtype(np.float16)}
        assert ours.network == theirs.network
        assert folder.unet.network.stages() == model.unet.network.stages()
        assert folder.autoencoder.network == model.autoencoder.network
        for field in ("scale", "sde", "output", "size"):
            assert getattr(folder, field) == getattr(model, field)
    assert files[0].unet.network == files[1].unet.network


@pytest.mark.parametrize("path", KINDS, ids=lambda path: path.name)
def test_from_prompts_to_images(path, x64):
    """Tokens, contexts, guided noise, encoded and decoded images: as the published code has them."""
    stored, model = figures_of("L_sampling", "e2e_sd_tiny"), read(path, dtype="float64")
    parts = {part: tree_in(jnp.float64, getattr(model, part).params) for part in ("unet", "autoencoder", "text")}
    read_tokens = tokenizer.read(model.tokenizer)
    prompts = reference.cases("L_sampling")["e2e_sd_tiny"]["prompts"]
    np.testing.assert_array_equal(read_tokens(prompts)[0], stored["input_ids"])
    encode = functools.partial(latents.contexts, model.text.network, parts["text"], read_tokens)
    context, cut = encode(prompts)
    assert not cut.any()
    null, _ = encode(["", ""])
    compared(context, stored["context_f64"], 1e-13, "context")
    compared(null, stored["uncond_context_f64"], 1e-13, "context of no prompt")

    sde = DiscreteVP(**model.sde)
    network = lambda y: lambda x, label: model.unet.network.apply({"params": parts["unet"]}, x, label, y)
    noise_of = lambda y: noise_fn(network(y), sde, output=model.output, label="node")
    x, t = jnp.asarray(reference.nhwc(stored["xT"]), jnp.float64), jnp.asarray(0.43825)
    run = lambda noise: nchw(jax.jit(noise)(x, t))
    compared(run(noise_of(context)), stored["eps_cond_f64"], 1e-12, "conditional")
    compared(run(noise_of(null)), stored["eps_uncond_f64"], 1e-12, "unconditional")
    compared(run(classifier_free(noise_of, context, null[0], 7.5)), stored["eps_guided_f64"], 1e-11, "guided")

    both = model.autoencoder.network, parts["autoencoder"], model.scale
    images = jnp.asarray(reference.nhwc(stored["enc_image"]), jnp.float64)
    decoded = lambda **options: jax.jit(latents.decoder(*both, **options))(
        jnp.asarray(reference.nhwc(stored["dpm_solver_v3_5_f64"]))
    )
    compared(nchw(decoded()), stored["image_raw_f64"], 1e-12, "images")
    assert jnp.abs(decoded(at_once=2) - decoded()).max() < 1e-12
    mode = jax.jit(jax.vmap(functools.partial(latents.encoder(*both), None)))(images)
    compared(nchw(mode), stored["enc_scaled_mode_f64"], 1e-12, "encoded")


def test_samples_of_the_encoder():
    """Each image's is its key's, around the mean, with the deviation that the moments tell."""
    model = read(TINY)
    network, params = model.autoencoder
    encode = jax.jit(jax.vmap(latents.encoder(network, params, model.scale), (0, None)))
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (16, 16, 3)), jnp.float32)
    samples = encode(jax.random.split(jax.random.key(0), 4096), image)
    moments = network.apply({"params": params}, image[None], method="encode")
    mean, log_variance = (part[0] for part in gaussian(moments))
    assert jnp.abs((samples.mean(0) / model.scale - mean) / jnp.exp(log_variance / 2)).max() < 5 / 64
    assert jnp.abs(samples.std(0) / model.scale / jnp.exp(log_variance / 2) - 1).max() < 0.08
    with pytest.raises(UserError, match="multiples of 2"):
        latents.encoder(network, params, model.scale)(None, jnp.zeros((15, 16, 3)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parameters_of_half_the_width(dtype):
    """Networks compute from the file's float16, or from bfloat16, without a copy in float32."""
    stored, model = figures_of("L_sampling", "e2e_sd_tiny"), read(TINY, dtype=dtype)
    given = jnp.bfloat16 if dtype == "bfloat16" else jnp.float16
    params = tree_in(given, model.unet.params)
    x = jnp.asarray(reference.nhwc(stored["xT"]))
    context = jnp.asarray(stored["context"])
    out = jax.jit(model.unet.network.apply)({"params": params}, x, jnp.full(2, 437.25), context)
    assert out.dtype == jnp.float32
    compared(nchw(out), stored["eps_cond"], 3e-2 if dtype == "bfloat16" else 5e-6, dtype)
    text = tree_in(given, model.text.params)
    compared(
        jax.jit(model.text.network.apply)({"params": text}, stored["input_ids"]).astype(jnp.float32),
        stored["context"],
        2e-2 if dtype == "bfloat16" else 5e-6,
        dtype,
    )
    first = tree_in(given, model.autoencoder.params)
    images = latents.decoder(model.autoencoder.network, first, model.scale)
    compared(
        nchw(images(jnp.asarray(reference.nhwc(stored["dpm_solver_v3_5"])))),
        stored["image_raw"],
        5e-2 if dtype == "bfloat16" else 5e-6,
        dtype,
    )


def test_the_published_schedules():
    stored = figures_of("L_sampling", "schedule_sd")
    sde = DiscreteVP(**read(TINY).sde)
    t = stored["t"].astype(np.float64)
    np.testing.assert_allclose(sde._betas(), stored["betas_f64"], rtol=1e-14)
    nodes = np.arange(1, 1001) / 1000
    np.testing.assert_allclose(np.exp(2 * sde.log_alpha(nodes)), stored["alphas_cumprod_f64"], rtol=1e-13)
    for ours, theirs in ((sde.log_alpha, "log_alpha"), (sde.sigma, "sigma"), (sde.lam, "lambda")):
        np.testing.assert_allclose(ours(t), stored[f"{theirs}_f64"], rtol=1e-12)
    np.testing.assert_allclose(sde.t_of_lam(stored["lambda_f64"]), stored["t_of_lambda_f64"], rtol=1e-12)
    np.testing.assert_allclose(LABELS["node"](sde, t, sde.n), stored["label_f64"], atol=1e-12)
    for steps in (5, 10, 20, 200):
        np.testing.assert_allclose(
            grids.times("time", sde, steps), stored[f"grid_time_uniform_{steps}_f64"], rtol=1e-12
        )
    np.testing.assert_allclose(grids.times("logsnr", sde, 10), stored["grid_logSNR_10_f64"], rtol=1e-12)


def test_fp16_variant_and_bin(tmp_path):
    folder = copied(tmp_path)
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        whole = folder / part / f"{name}.safetensors"
        whole.rename(whole.with_suffix(".fp16.safetensors"))
    same = lambda one, other: all(jax.tree.leaves(jax.tree.map(np.array_equal, one.unet.params, other.unet.params)))
    assert same(read(folder), read(TINY))
    assert same(read(folder, variant="fp16"), read(TINY))
    with pytest.raises(UserError, match=r"none of .*\.int8\.safetensors"):
        read(folder, variant="int8")


def test_velocity_and_averages(tmp_path):
    folder = copied(tmp_path)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    assert read(folder).output == "v"

    path = copied(tmp_path, FOLDER / "sd_tiny.safetensors")
    state = load_file(path)
    for name in [name for name in state if name.startswith("model.diffusion_model.")]:
        flat = name.removeprefix("model.").replace(".", "")
        state[f"model_ema.{flat}"] = state[name] + np.float16(1)
    state |= {"model_ema.decay": np.zeros(()), "model_ema.num_updates": np.zeros((), np.int32)}
    state |= {"first_stage_model.loss.logvar": np.zeros(()), "scale_factor": np.full((), 0.25, np.float32)}
    save_file(state, path)
    averaged, raw = read(path), read(path, raw=True)
    leaf = lambda model: model.unet.params["noise_0"]["bias"]
    np.testing.assert_array_equal(leaf(averaged), leaf(raw) + np.float16(1))
    assert averaged.scale == 0.25


def test_classes_of_latent_diffusion(tmp_path):
    """A table of classes in place of the text encoder, as in the model of ImageNet."""
    path = copied(tmp_path, FOLDER / "sd_tiny.safetensors")
    state = {name: array for name, array in load_file(path).items() if not name.startswith("cond_stage_model")}
    save_file(state, path)
    with pytest.raises(UserError, match="neither a text encoder nor a table"):
        read(path)
    save_file(state | {"cond_stage_model.embedding.weight": np.zeros((11, 32), np.float32)}, path)
    model = latent_models.read(path)
    assert model.text is None and model.classes.shape == (11, 32)


def drop(*names):
    return lambda folder: [shutil.rmtree(folder / n) if (folder / n).is_dir() else (folder / n).unlink() for n in names]


def change(file, **values):
    def apply(folder):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


@pytest.mark.parametrize(
    "damage",
    [
        drop("model_index.json"),
        drop("unet"),
        drop("vae"),
        drop("text_encoder"),
        drop("tokenizer"),
        drop("scheduler"),
        drop("unet/diffusion_pytorch_model.safetensors"),
        change("unet/config.json", _class_name="SD3Transformer2DModel"),
        change("unet/config.json", flip_sin_to_cos=False),
        change("unet/config.json", layers_per_block=2),
        change("unet/config.json", layers_per_block="many"),
        change("unet/config.json", block_out_channels=None),
        change("unet/config.json", attention_head_dim=5),
        change("vae/config.json", shift_factor=0.1),
        change("vae/config.json", norm_num_groups="x"),
        change("vae/config.json", scaling_factor=None),
        change("text_encoder/config.json", num_attention_heads=5),
        change("text_encoder/config.json", hidden_act="relu"),
        change("scheduler/scheduler_config.json", beta_schedule="linear"),
        change("scheduler/scheduler_config.json", prediction_type="flow"),
        change("scheduler/scheduler_config.json", beta_start="x"),
        lambda folder: (folder / "unet" / "config.json").write_text("[]"),
        lambda folder: (folder / "unet" / "config.json").write_text("{"),
        lambda folder: shutil.copyfile(
            folder / "vae" / "diffusion_pytorch_model.safetensors",
            folder / "unet" / "diffusion_pytorch_model.safetensors",
        ),
        lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing"),
    ],
)
def test_bad_folders_are_one_line(damage, tmp_path):
    folder = copied(tmp_path)
    damage(folder)
    with pytest.raises(UserError) as refused:
        read(folder)
    assert "\n" not in str(refused.value)


def test_bad_single_files_are_one_line(tmp_path):
    path = copied(tmp_path, FOLDER / "sd_tiny.safetensors")
    whole = load_file(path)
    description = path.with_suffix(".yaml").read_text()
    refused = lambda match: pytest.raises(UserError, match=match)
    for missing in ("model.diffusion_model.", "first_stage_model."):
        save_file({name: array for name, array in whole.items() if not name.startswith(missing)}, path)
        with refused(f"begins with {missing}"):
            read(path)
    save_file(whole | {"betas": np.linspace(0.1, 0.2, 1000)}, path)
    with refused("other betas"):
        read(path)
    save_file(whole, path)
    path.with_suffix(".yaml").write_text("a: [")
    with refused("cannot read"):
        read(path)
    path.with_suffix(".yaml").write_text(description.replace("model_channels: 32", "model_channels: 64"))
    with refused("shape"):
        read(path)
    path.with_suffix(".yaml").unlink()
    with refused(r"\.yaml"):
        read(path)
    with refused("begins with model.diffusion_model."):
        latent_models.read(TINY / "vae" / "diffusion_pytorch_model.safetensors")
    with refused("cannot read"):
        latent_models.read(tmp_path / "absent.ckpt")


def test_a_tokenizer_of_another_model():
    model = read(TINY)
    other = tokenizer.read(model.tokenizer)._replace(vocab_size=675)
    with pytest.raises(UserError, match="another model's"):
        latents.contexts(model.text.network, model.text.params, other, ["a"])


def test_classes_of_a_file_are_named_and_not_made(tmp_path):
    """Whatever lightning's classes, or any others, would do on loading is not done."""
    done = []
    for module in ("pytorch_lightning", "fake"):
        made = types.ModuleType(module)
        called = type(
            "Called", (), {"__init__": lambda self: done.append(1), "__module__": module, "__qualname__": "Called"}
        )
        made.Called = called
        sys.modules[module] = made
        try:
            program = pickle.dumps({"state_dict": {}, "callbacks": {called: 1, "one": called.__new__(called)}}, 2)
        finally:
            del sys.modules[module]
        path = tmp_path / f"{module}.ckpt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", program)
        with pytest.raises(UserError, match=f"no tensors, but objects of {module}.Called"):
            read_checkpoint(path)
    assert not done
