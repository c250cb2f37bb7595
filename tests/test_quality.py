"""Anyone's images as samples and as the reference, whatever file they come in."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from experiments import quality
from score_sde.errors import UserError
from score_sde.metrics.features import FeatureNetwork
from score_sde.space import pixels
from tests.test_sources import as_folder, as_zip, encoded, files_of

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def network():
    """The mean level of each channel, which is three features."""
    apply = lambda params, images: (images.mean((1, 2)).astype(jnp.float32), images.mean((1, 2)).astype(jnp.float32))
    return FeatureNetwork("toy", "FD-toy", "0", "none", 3, 3, {}, apply)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", images=IMAGES)
    config = digits.get_config()
    config.unlock()
    config.data.update(dataset="data.npz", num_channels=3)
    return config.lock()


def test_features_that_have_a_derivative(network):
    """On whole levels those of the images that evaluate.py measures, gray repeated; none beyond the data's range."""
    for channels, space in ((3, pixels((8, 8, 3))), (1, pixels((8, 8, 1), centered=False))):
        seen, images = quality.differentiable_features(network, space), IMAGES[..., :channels]
        x = jax.vmap(space.encode)(jax.random.split(jax.random.key(0), len(images)), images)
        np.testing.assert_allclose(seen(x), images.mean((1, 2)) * np.ones(3), rtol=1e-5)
        slope = jax.grad(lambda x: seen(x).sum())(jnp.stack([0.1 + x[0] / 2, 3 + x[0]]))
        np.testing.assert_allclose(slope[0], 255 / (space.high - space.low) / 64 * (3 / channels), rtol=1e-5)
        assert not slope[1].any()


@pytest.mark.parametrize("names", [dict(arr_0=IMAGES), dict(samples=IMAGES), dict(images=IMAGES), dict(x_train=IMAGES)])
def test_samples_and_reference_of_other_tools(config, network, names):
    np.savez("given.npz", **names)
    result = quality.of_images(config, network, "given.npz", "given.npz")
    assert result["frechet"] == pytest.approx(0, abs=1e-6)
    assert result["against"] == "40 images of given.npz"
    assert "training images" in quality.of_images(config, network, "given.npz")["against"]


def test_hidden_files_are_no_samples(config, network, capsys):
    files = files_of("cat*5 dog*5") | {"._0.png": b"x", ".hidden/eel.png": encoded(200)}
    folder = as_folder(pathlib.Path("samples"), files)
    archive = as_zip(pathlib.Path("."), files)
    for given in (folder, archive):
        result = quality.of_images(config, network, given, folder)
        assert result["title"] == f"10 images of {given}"
        assert result["frechet"] == pytest.approx(0, abs=1e-6)
    assert "passed over 2 hidden" in capsys.readouterr().out


def test_one_test_image_has_no_covariance(config, network):
    np.savez("data.npz", images=IMAGES[:11])
    np.savez("given.npz", samples=IMAGES)
    with pytest.raises(UserError, match="holds 1 images, which have no covariance"):
        quality.of_images(config, network, "given.npz")
