"""An autoencoder is trained, and a model in its latents: the objective, the road, and what is refused on it."""

import functools
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import digits
from experiments import autoencoders, build, drawing, evaluation, inverse_problems, parts, restoration, runs, trainer
from experiments import report as reports
from score_sde import checkpoint, losses, models, training
from score_sde.errors import UserError
from score_sde.models.autoencoder import gaussian, kl_divergence
from tests import programs

# ------------------------------------------------------------------------------------------------ the objective


class Coordinates:
    """An autoencoder that copies: its latents are the image, of a given log variance."""

    def __init__(self, log_variance):
        self.log_variance = log_variance

    def apply(self, variables, x, method):
        return jnp.concatenate([x, self.log_variance + 0 * x], -1) if method == "encode" else x


@pytest.mark.parametrize("log_variance", [-1.0, 0.5])
def test_reconstruction_is_the_negative_bound_by_parts(log_variance):
    """Noise of deviation s comes back as an error of mean s sqrt(2 / pi); beside it stands the KL of the Gaussians."""
    x = jax.random.normal(jax.random.key(0), (4, 40, 50, 1))
    of = functools.partial(
        losses.reconstruction, Coordinates(log_variance), {}, x, jax.random.split(jax.random.key(1), 4)
    )
    error, both = of(kl_weight=0.0), of(kl_weight=0.1)
    np.testing.assert_allclose(error, np.exp(log_variance / 2) * np.sqrt(2 / np.pi), rtol=0.05)
    variance = np.exp(log_variance)
    kl = 0.5 * (variance + np.square(x) - 1 - log_variance).mean((1, 2, 3))
    np.testing.assert_allclose(both - error, 0.1 * kl, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ the road


class OneNumber(nn.Module):
    """The smallest of networks."""

    @nn.compact
    def __call__(self, x, label, y=None, dropout_keys=None):
        return x * self.param("scale", nn.initializers.constant(0.5), (1, 1, 1, 1))


class Blocks(nn.Module):
    """An autoencoder of two products: blocks of 2 x 2 pixels to moments, and back."""

    embed_dim: int = 3
    channels: int = 1
    num_codes: int = 0
    factor = 2

    def setup(self):
        self.down = nn.Conv(2 * self.embed_dim, (2, 2), 2, dtype=jnp.float32)
        self.up = nn.ConvTranspose(self.channels, (2, 2), (2, 2), dtype=jnp.float32)

    def encode(self, x):
        return self.down(x)

    def decode(self, z):
        return self.up(z)

    def __call__(self, x):
        return self.decode(gaussian(self.encode(x))[0])


def config_of(folder, steps: int, model, **changes) -> ConfigDict:
    """A training of so many steps on the images of a folder."""
    config = digits.get_config()
    config.unlock()
    config.model = model
    config.data.dataset = str(folder / "images.npz")
    config.training.update(batch_size=8, n_iters=steps, checkpoint_freq=2, keep_freq=2, eval_freq=2, log_freq=2)
    config.sampling.update(num_samples=4, batch_size=4)
    config.eval.update(num_data=8, batch_size=8)
    config.update_from_flattened_dict(changes)
    return config.lock()


def coder_config(folder, steps: int = 4, **changes) -> ConfigDict:
    network = dict(name="autoencoder", embed_dim=3, channels=1, num_codes=0)
    return config_of(folder, steps, network, **changes)


def latent_config(folder, steps: int = 4, **changes) -> ConfigDict:
    given = {"latents.autoencoder": str(folder / "coder")} | changes
    return config_of(folder, steps, dict(name="one_number"), **given)


def trained(config, workdir):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as the programs run
        assert trainer.train(config, workdir) == 0
    return workdir


@pytest.fixture(scope="module", autouse=True)
def patched():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "one_number", OneNumber)
        patch.setitem(build.AUTOENCODERS, "autoencoder", Blocks)
        patch.setattr(build, "Autoencoder", Blocks)
        patch.setattr(trainer, "catch_stop_signals", list)
        patch.setattr(trainer, "samples", lambda model: lambda *arguments: None)
        yield patch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, a run of an autoencoder of them, and one of a model in its latents."""
    folder = tmp_path_factory.mktemp("latents")
    rng = np.random.default_rng(0)
    images = (rng.integers(0, 256, (40, 1, 1, 1)) * np.ones((8, 8, 1))).astype(np.uint8)
    np.savez(folder / "images.npz", train_images=images, test_images=images[:8])
    trained(coder_config(folder), folder / "coder")
    trained(latent_config(folder), folder / "model")
    return folder


def state_of(workdir):
    model = runs.open_model(str(workdir))
    return model.step, model.params


def test_an_autoencoder_shows_what_it_reaches(folder, capsys):
    """The PSNR of the levels themselves, and its picture; averaged parameters come back."""
    opened = runs.open_aid(folder / "coder", "autoencoder")
    boards = []
    board = type("Board", (), dict(add_scalar=lambda self, *values: boards.append(values)))()
    show = autoencoders.reconstructions(opened.config, opened.values)
    show(opened.params, folder / "coder", board, 4)
    levels = build.images_of(opened.config, "test", tell=False).take(np.arange(8))["image"]
    x = levels / np.float32(127.5) - 1
    moments = opened.values.network.apply({"params": opened.params}, x, method="encode")
    back = opened.values.network.apply({"params": opened.params}, gaussian(moments)[0], method="decode")
    square = np.square(np.clip(127.5 * (np.asarray(back) + 1), 0, 255) - levels).mean((1, 2, 3))
    (name, psnr, step), out = boards[0], "".join(capsys.readouterr())
    assert (name, step) == ("PSNR", 4)
    np.testing.assert_allclose(psnr, (10 * np.log10(255**2 / square)).mean(), atol=0.1)
    assert f"PSNR {psnr:.2f} dB, KL {kl_divergence(moments).mean():.1f} nats" in out
    assert (folder / "coder" / "tensorboard" / "reconstructions_4.png").is_file()


def test_latents_have_unit_variance(folder):
    """The scale is measured, kept in the run, and the run's own: x0 of the data has deviation 1."""
    model = runs.open_model(str(folder / "model"))
    images = build.images_of(model.config, "train", tell=False).take(np.arange(40))["image"]
    x0 = jax.jit(jax.vmap(model.diffusion.space.encode))(jax.random.split(jax.random.key(3), 40), images)
    assert model.diffusion.space.shape == x0.shape[1:] == (4, 4, 3)
    np.testing.assert_allclose(np.std(x0), 1, atol=0.05)
    assert model.config.latents.scale not in (0, 1)


def test_the_autoencoder_is_an_argument_of_the_loss(folder):
    """No array of it becomes a constant of the program; the loss is that of latents encoded beforehand."""
    model = runs.open_model(str(folder / "model"))
    params = build.autoencoder_params(model.config, folder / "model")
    batch = build.images_of(model.config, "train", tell=False).take(np.arange(4)) | {"index": np.arange(4)}
    loss = lambda params, frozen: build.loss_of(model.config, model.diffusion, frozen)(
        params, batch, jax.random.key(0), True
    )
    program = jax.make_jaxpr(loss)(model.params, params)
    sizes = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 4}
    assert not sizes & {np.shape(constant) for constant in program.consts}
    inside = build.loss_of(model.config, model.diffusion)(model.params, batch, jax.random.key(0), True)
    np.testing.assert_allclose(jax.jit(loss)(model.params, params), inside, rtol=1e-5)


def test_a_stopped_run_goes_on_bit_for_bit(folder, tmp_path):
    """By the same config, of which the autoencoder's run is gone in the meantime."""
    shutil.copytree(folder / "coder", tmp_path / "coder")
    named = {"latents.autoencoder": str(tmp_path / "coder")}
    trained(latent_config(folder, 2, **named), tmp_path / "model")
    shutil.rmtree(tmp_path / "coder")
    trained(latent_config(folder, 4, **named), tmp_path / "model")
    (step, ours), (_, theirs) = state_of(tmp_path / "model"), state_of(folder / "model")
    assert step == 4
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_latent_run_is_used_like_any_other(folder, monkeypatch):
    """Samples are images; the loss is measured; packed, it draws the same but for half precision."""
    monkeypatch.setattr(runs, "PRETRAINED", folder / "box")
    model = runs.open_model(str(folder / "model"))
    images = drawing.sample(model, "dpmpp", steps=5, n=4)
    assert images.shape == (4, 8, 8, 1) and images.dtype == np.uint8
    assert evaluation.evaluate(model, ["loss"], evaluation.Options())["loss"]["mean"] > 0
    pack = programs.contents("pack")["pack"]
    boxed = runs.open_model(str(pack(model)))
    np.testing.assert_allclose(drawing.sample(boxed, "dpmpp", steps=5, n=4), images.astype(float), atol=2)
    assert "4x4x3, times" in (folder / "box" / "model" / "card.md").read_text()
    assert (folder / "box" / "model" / parts.file_of(parts.AUTOENCODER)).is_file()


# ------------------------------------------------------------------------------------------------ completed images

COLUMNS = np.isin(np.arange(8), (2, 3, 4))[None].repeat(8, 0)  # known: one latent of each row, and half of another


@pytest.fixture(scope="module")
def pictures(folder):
    """An image, the same with another hole, and the masks of COLUMNS and of single pixels."""
    levels = np.random.default_rng(1).integers(0, 256, (8, 8), np.uint8)
    masks = dict(mask=COLUMNS, single=np.indices((8, 8)).sum(0) % 2 == 0)
    files = dict(image=levels, other=np.where(COLUMNS, levels, 255 - levels))
    for name, picture in (files | {name: 255 * mask for name, mask in masks.items()}).items():
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{name}.png")
    return levels


def known_of(folder, model, image="image", mask="mask"):
    return restoration.known_of(model, "inpaint", str(folder / f"{image}.png"), str(folder / f"{mask}.png"))


def test_a_latent_is_known_if_all_its_pixels_are(folder, pictures):
    model = runs.open_model(str(folder / "model"))
    known = known_of(folder, model)
    np.testing.assert_array_equal(known.latent_mask[0, :, :, 0], np.arange(4)[None].repeat(4, 0) == 1)
    np.testing.assert_array_equal(known.mask[0, :, :, 0], COLUMNS)
    index = np.arange(3)
    encoded, other = known.in_data_range(index), known_of(folder, model, "other").in_data_range(index)
    np.testing.assert_array_equal(encoded, other)  # what is in the hole is not seen
    by_hand = model.diffusion.space.encode(jax.random.key(0), np.where(COLUMNS, pictures, 128)[..., None])
    np.testing.assert_allclose(encoded, np.stack([by_hand] * 3), atol=1e-6)
    with pytest.raises(UserError, match="knows no latent, which takes 2x2 known pixels"):
        known_of(folder, model, mask="single")


def test_completed_images_keep_what_is_known(folder, pictures, tmp_path):
    """By both kinds of solvers: the known latents of the predictor-corrector sampler, the known pixels of either."""
    model = runs.open_model(str(folder / "model"))
    known, index = known_of(folder, model), np.arange(2)
    x, _ = drawing.pc(model, 24, known=known).draw(index, lambda steps: None)
    t_min = model.diffusion.sde.t_min
    expected = model.diffusion.sde.alpha(np.float64(t_min)) * known.in_data_range(index)
    np.testing.assert_allclose(x[:, :, 1], expected[:, :, 1], atol=1e-5)
    files = dict(image=str(folder / "image.png"), mask=str(folder / "mask.png"))
    for method in ("pigdm", "ddnm"):
        measured = inverse_problems.measured_of(model, "inpaint", method=method, **files)
        few = drawing.few_step(model, "dpmpp", 5, measured=measured)
        drawn = drawing.draw_and_write(
            model, few, 2, tmp_path / method, batch_size=2, seed=0, bending={}, known=measured
        ).images[..., 0]
        assert (drawn[:, COLUMNS] == pictures[COLUMNS]).all()
        assert (drawn[:, ~COLUMNS] != pictures[~COLUMNS]).any()


def test_other_tasks_are_for_pixels(folder):
    model = runs.open_model(str(folder / "model"))
    with pytest.raises(UserError, match="--task=deblur is for pixels"):
        inverse_problems.measured_of(model, "deblur")
    with pytest.raises(UserError, match=r"--measurement_noise=0\.1 is for pixels"):
        inverse_problems.measured_of(model, "inpaint", std=0.1)
    with pytest.raises(UserError, match="--task=colorize works on pixels"):
        restoration.known_of(model, "colorize")


# ------------------------------------------------------------------------------------------------ mistakes


def refused(config, workdir, line: str):
    with pytest.raises(UserError, match=line):
        trainer.train(config, workdir)


def test_an_autoencoder_that_does_not_serve(folder, tmp_path):
    """It is missing, something else, of other images, or has a codebook; nothing is written."""
    new = tmp_path / "run"
    absent = {"latents.autoencoder": str(tmp_path / "absent")}
    refused(
        latent_config(folder, **absent), new, "no such workdir .*absent: train first, .*configs/autoencoder/digits.py"
    )
    another = {"latents.autoencoder": str(folder / "model")}
    refused(latent_config(folder, **another), new, "holds a model of images, not an autoencoder: train one with")
    larger = {"data.image_size": 16}
    refused(latent_config(folder, **larger), new, "encodes images of 8x8x1, this config's are of 16x16x1")
    refused(coder_config(folder, **{"model.num_codes": 4}), new, "a codebook is not trained here")
    refused(coder_config(folder, **{"data.image_size": 9}), new, "must be multiples of 2")
    refused(coder_config(folder, **{"data.num_channels": 3}), new, "model.channels is 1, data.num_channels 3")
    assert not new.exists()
    with pytest.raises(UserError, match="holds an autoencoder, not a model of images"):
        runs.open_model(str(folder / "coder"))
    with pytest.raises(UserError, match="train this config first"):
        build.diffusion_of(latent_config(folder))


def test_an_autoencoder_that_was_replaced(folder, tmp_path):
    """In its own folder: a new config is refused. In the run's: the run itself, as --workdir alone goes on with it."""
    shutil.copytree(folder / "coder", tmp_path / "coder")
    named = {"latents.autoencoder": str(tmp_path / "coder")}
    workdir = trained(latent_config(folder, 2, **named), tmp_path / "model")
    own = checkpoint.identity(build.autoencoder_params(runs.read_config(workdir), workdir))
    other = jax.tree.map(lambda leaf: leaf + 1, runs.open_aid(tmp_path / "coder", "autoencoder").params)
    checkpoints = checkpoint.Checkpoints(tmp_path / "coder", keep_every=1)
    checkpoints.save(training.State(np.int32(9), {}, other, {}), {})
    checkpoints.wait()
    refused(latent_config(folder, **named), workdir, rf"in the latents of autoencoder {own}, but .*choose another")
    parts.save(workdir, parts.AUTOENCODER, other)
    refused(runs.read_config(workdir), workdir, rf"was trained in the latents of autoencoder {own}, not ")


def test_a_density_of_pixels_is_refused_before_other_metrics(folder):
    model = runs.open_model(str(folder / "model"))
    with pytest.raises(UserError, match="it has no bits/dim"):
        evaluation.evaluate(model, ["loss", "bpd"], evaluation.Options(), name="bpd")
    assert reports.read(folder / "model" / "eval" / "bpd") is None


def test_aids_have_folders_of_their_own(folder):
    """configs/autoencoder/digits.py and configs/digits.py do not meet in one folder."""
    assert runs.folder_for(coder_config(folder), "configs/autoencoder/digits.py") == runs.RUNS / "autoencoder_digits"
    assert runs.folder_for(latent_config(folder), "configs/digits.py") == runs.RUNS / "digits"
