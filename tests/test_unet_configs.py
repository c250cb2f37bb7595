"""Configs of EDM and guided diffusion: their networks are the published ones, by every argument."""

import numpy as np
import pytest

from experiments import build
from score_sde import denoiser
from score_sde.models import MODELS
from score_sde.models.classifier import CLASSIFIERS
from tests import reference
from tests.test_configs import load
from tests.test_unet import adm, edm

ADM = {
    "imagenet64": "64x64_diffusion",
    "imagenet128": "128x128_diffusion",
    "imagenet256": "256x256_diffusion",
    "imagenet256_uncond": "256x256_diffusion_uncond",
    "lsun_bedroom": "lsun_bedroom",
    "upsampler_64_256": "64_256_upsampler",
    "classifier_64": "64x64_classifier",
    "classifier_256": "256x256_classifier",
    "classifier_512": "512x512_classifier",
}
EDM = {
    "cifar10_uncond_vp": "edm-cifar10-32x32-uncond-vp",
    "cifar10_uncond_ve": "edm-cifar10-32x32-uncond-ve",
    "cifar10_cond_vp": "edm-cifar10-32x32-cond-vp",
    "ffhq_vp": "edm-ffhq-64x64-uncond-vp",
    "afhq_vp": "edm-afhqv2-64x64-uncond-vp",
    "imagenet64": "edm-imagenet-64x64-cond-adm",
}


def described(config) -> object:
    arguments = config.model.to_dict()
    return (MODELS | CLASSIFIERS)[arguments.pop("name")](**arguments)


@pytest.mark.parametrize("name", ADM)
def test_networks_of_adm_are_the_published_ones(name):
    case, config = reference.cases("X_adm")[f"published/{ADM[name]}"], load(f"adm/{name}").get_config()
    network, shape = adm(case["network"], case["kwargs"])
    unused = dict(num_heads=1) if network.head_channels else {}  # X tells them where head_channels is in force
    assert described(config) == network.clone(**unused)
    assert config.data.image_size == shape[0]


@pytest.mark.parametrize("name", EDM)
def test_networks_of_edm_are_the_published_ones(name):
    case, config = reference.cases("X_edm")[f"published/{EDM[name]}"], load(f"edm/{name}").get_config()
    network, shape = edm(case["precond"], case["kwargs"], dropout=case["kwargs"]["dropout"])
    unused = dict(fir_kernel=(1, 3, 3, 1)) if hasattr(network, "fir") and not network.fir else {}
    assert described(config) == network.clone(**unused)
    assert config.data.image_size == shape[0]
    assert (config.denoiser.output, config.denoiser.label, config.sde.name) == ("edm", "edm", "edm")


@pytest.mark.parametrize("name", ["adm/imagenet64", "adm/imagenet256"])
def test_labels_of_adm_count_the_steps_of_its_chain(name):
    """t = (i + 1) / 1000 is step i, whose label is i."""
    config = load(name).get_config()
    sde = build.sde_of(config)
    i = np.array([0, 1, 500, 990])
    t = (i + 1) / 1000
    np.testing.assert_allclose(denoiser.LABELS[config.denoiser.label](sde, t, 1000), i, atol=1e-9)
    beta = np.linspace(1e-4, 0.02, 1000)
    cosine = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    if name.endswith("64"):
        beta = 1 - cosine(np.arange(1, 1001) / 1000) / cosine(np.arange(1000) / 1000)
    np.testing.assert_allclose(sde.alpha(t) ** 2, np.cumprod(1 - beta)[i], rtol=1e-9)
