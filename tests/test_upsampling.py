"""Models that enlarge small images: the k-th sample belongs to the k-th image and class."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import digits
from ems import statistics
from experiments import build, drawing, measuring, runs, trainer, upsampling
from score_sde import models
from score_sde.errors import UserError
from score_sde.guidance import Guidance

RNG = np.random.default_rng(0)
SMALL = RNG.integers(0, 256, (5, 2, 2, 1), dtype=np.uint8)


class Enlarges(nn.Module):
    """Predicts the enlarged image, times (y + 1) / 10: whatever is sampled is that."""

    num_classes: int = 0
    low_res: bool = True

    @nn.compact
    def __call__(self, x, label, y=None, dropout_keys=None, low_res=None):
        scale = self.param("scale", nn.initializers.ones, (1, 1, 1, 1))
        if low_res is None:
            return x * scale
        share = 1.0 if y is None else (y[:, None, None, None] + 1) / 10
        return jax.image.resize(low_res, x.shape, "bilinear") * share * scale


@pytest.fixture(autouse=True)
def network(monkeypatch):
    monkeypatch.setitem(models.MODELS, "enlarges", Enlarges)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as the programs run
        yield


def model_in(folder, num_classes=10) -> runs.Model:
    config = digits.get_config()
    with config.unlocked():
        config.model = dict(name="enlarges", num_classes=num_classes, low_res=True)
        config.denoiser.output = "x0"
    diffusion = build.diffusion_of(config)
    return runs.Model(folder, config, diffusion, diffusion.init(jax.random.key(0)), 0, "enlarges")


def expected(images, y):
    enlarged = jax.image.resize(jnp.asarray(images / np.float32(127.5) - 1), (len(images), 8, 8, 1), "bilinear")
    return np.asarray(enlarged) * ((np.asarray(y) + 1) / 10)[:, None, None, None]


def shown(x):
    return (x + 1) * 127.5


@pytest.mark.parametrize("label", [None, 3])
def test_sample_k_enlarges_image_k(tmp_path, label):
    """Seven samples of five images: the last two enlarge the first two anew."""
    np.savez(tmp_path / "base.npz", arr_0=SMALL, arr_1=np.array([9, 0, 4, 9, 2]))
    plain = model_in(tmp_path)
    base = upsampling.read(plain, str(tmp_path / "base.npz"), label)
    model = upsampling.with_base_samples(runs.with_guidance(plain, Guidance(), label=label), base)
    samples = drawing.draw(model, drawing.few_step(model, "dpmpp", 5), 7, batch_size=8).images
    order = np.arange(7) % 5
    y = np.array([9, 0, 4, 9, 2])[order] if label is None else np.full(7, 3)
    left = float(plain.diffusion.sde.sigma(plain.diffusion.sde.t_min)) * 127.5  # the noise at the end, in levels
    np.testing.assert_allclose(samples, shown(expected(SMALL[order], y)), atol=1 + 6 * left)


def test_classes_of_our_own_base_samples(tmp_path):
    """By turns, or the label of run.json; of other files they must be given."""
    model, path = model_in(tmp_path), str(tmp_path / "samples.npz")
    np.savez(path, samples=SMALL)
    with pytest.raises(UserError, match="names no classes, of which the model is told: give one for all"):
        upsampling.read(model, path)
    (tmp_path / "run.json").write_text("{}")
    assert upsampling.read(model, path).labels.tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "run.json").write_text(json.dumps(dict(label=7)))
    assert upsampling.read(model, path, count=2).labels.tolist() == [7, 7]
    assert upsampling.read(model_in(tmp_path, num_classes=0), path).labels is None


@pytest.mark.parametrize(
    ("images", "label", "words"),
    [
        (dict(images=SMALL[:, :1, :1], labels=np.arange(5)), None, "of height 1: .* makes 8x8 of 2x2"),
        (dict(images=SMALL, labels=np.arange(5) + 6), None, "labels are 6 to 10, the model's are 0 to 9"),
        (dict(images=SMALL), 10, "labels are 10 to 10"),
        (dict(images=SMALL[:0], labels=np.arange(0)), None, "holds no images"),
        (None, None, "enlarges small images: give them, --base_samples="),
    ],
)
def test_base_samples_that_do_not_fit(tmp_path, images, label, words):
    if images is not None:
        np.savez(tmp_path / "base.npz", **images)
    with pytest.raises(UserError, match=words):
        upsampling.read(model_in(tmp_path), None if images is None else str(tmp_path / "base.npz"), label)


def test_a_folder_of_base_samples(tmp_path):
    for i, image in enumerate(SMALL):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i}.png")
    np.testing.assert_array_equal(upsampling.read(model_in(tmp_path), str(tmp_path), 0).images, SMALL)


def test_what_cannot_be_done(tmp_path, monkeypatch):
    model = model_in(tmp_path)
    with pytest.raises(UserError, match="enlarges small images"):
        drawing.sample(model, "dpmpp", 5, 2)
    with pytest.raises(UserError, match="enlarges small images"):
        drawing.sample(model, "dpmpp", 5, 2, label=3)
    with pytest.raises(UserError, match="not trained here"):
        trainer.train(model.config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    boxed = runs.open_model(str(runs.PRETRAINED / runs.BOXED))
    with pytest.raises(UserError, match="enlarges no images"):
        upsampling.read(boxed, "base.npz")
    assert upsampling.with_base_samples(boxed, upsampling.read(boxed, None)) is boxed


def test_statistics_are_measured_on_data_made_small(tmp_path):
    """Means of 4 x 4 pixels. The network's x0 does not depend on x, so that l = 1 exactly: data prediction."""
    images, y = RNG.integers(0, 256, (3, 8, 8, 1), dtype=np.uint8), np.array([1, 2, 3])
    condition = upsampling.of_data(images, y)
    means = images.reshape(3, 2, 4, 2, 4, 1).mean((2, 4))
    np.testing.assert_allclose(shown(condition["low_res"]), means, atol=1e-4)
    model = model_in(tmp_path)
    ems = statistics.load(measuring.measure(model, nodes=4, num_data=16, batch_size=8))
    np.testing.assert_allclose(ems.l, np.ones((5, 8, 8, 1)), atol=1e-5)
