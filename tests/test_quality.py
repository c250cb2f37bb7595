"""Anyone's images as samples and as the reference, whatever file they come in."""

import pathlib

import numpy as np
import pytest

from configs import digits
from experiments import quality
from score_sde.errors import UserError
from score_sde.metrics.features import FeatureNetwork
from tests.test_sources import as_folder, as_zip, encoded, files_of

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def network():
    """The mean level of each channel, which is three features."""
    apply = lambda params, images: (images.mean((1, 2)).astype(np.float32), images.mean((1, 2)).astype(np.float32))
    return FeatureNetwork("toy", "FD-toy", "0", "none", 3, 3, {}, apply)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", images=IMAGES)
    config = digits.get_config()
    config.unlock()
    config.data.update(dataset="data.npz", num_channels=3)
    return config.lock()


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
