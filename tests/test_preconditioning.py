"""The preconditioners of EDM's networks (Karras et al. 2022, Table 1) as rows and labels of the denoiser."""

import jax.numpy as jnp
import numpy as np
import pytest

from score_sde import denoiser
from score_sde.sde import EDM, VE, VP
from tests import reference

# official class: (output, label)
ROWS = {"edm": ("edm", "edm"), "vp": ("vp", "vp"), "ve": ("scaled_score", "ve"), "iddpm": ("vp", "iddpm")}


@pytest.mark.parametrize("name", ROWS)
def test_preconditioners_equal_published(name):
    """D = x - sigma eps = c_skip x + c_out F, at alpha = 1."""
    figures = {
        key: reference.arrays("X_edm")[f"precond_{name}/{key}_f64"] for key in ("c_in", "c_skip", "c_out", "c_noise")
    }
    sigma = reference.arrays("X_edm")[f"precond_{name}/sigma_f64"]
    output, label = ROWS[name]
    inp, skip, out = denoiser.coefficients(output, EDM(), sigma, 0.5)
    for key, ours in (("c_in", inp), ("c_skip", 1 - sigma * skip), ("c_out", -sigma * out)):
        expected = figures[key]
        error = np.abs(ours - expected) / np.maximum(np.abs(expected), 1)
        print(f"{name} {key} {error.max():.1e}")  # shown by pytest -s
        assert error.max() < 1e-12
    told = denoiser.LABELS[label](EDM(), sigma, 1000)
    error = np.abs(told - figures["c_noise"]).max()
    print(f"{name} c_noise {error:.1e}")
    assert error < 1e-12


def test_noise_levels_of_iddpm_equal_published():
    expected = reference.arrays("X_edm")["precond_iddpm/u_f64"]
    np.testing.assert_allclose(denoiser.iddpm_sigmas(1000), expected, rtol=1e-12)


@pytest.mark.parametrize("name", ROWS)
def test_the_same_in_jax(name, x64):
    """As the denoiser calls them; the network is told integers of the type of t by iDDPM."""
    sigma = reference.arrays("X_edm")[f"precond_{name}/sigma_f64"]
    told = denoiser.LABELS[ROWS[name][1]](EDM(), jnp.asarray(sigma), 1000)
    assert told.dtype == jnp.float64
    assert np.abs(told - reference.arrays("X_edm")[f"precond_{name}/c_noise_f64"]).max() < 1e-12


def test_a_network_of_vp_sees_the_same_under_every_sde():
    """At equal sigma / alpha: the label, and alpha^2 + sigma^2 = 1 in the image."""
    t = np.linspace(0.1, 1, 7)
    lam = VP().lam(t)
    np.testing.assert_allclose(denoiser.LABELS["vp"](VP(), t, 1000), 999 * t, rtol=1e-12)
    for sde in (VE(), EDM()):
        s = sde.t_of_lam(lam)
        np.testing.assert_allclose(denoiser.LABELS["vp"](sde, s, 1000), 999 * t, rtol=1e-12)
        inp, skip, out = denoiser.coefficients("vp", sde, s)
        np.testing.assert_allclose(inp * sde.alpha(s), VP().alpha(t), rtol=1e-12)
        assert (skip, out) == (0.0, 1.0)
