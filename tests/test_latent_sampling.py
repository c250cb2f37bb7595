"""Few-step sampling in latent space: the published sampling code's results, from noise, prompts and files to images."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ems.statistics import from_published
from score_sde import latent_models, latents, tokenizer
from score_sde.denoiser import noise_fn
from score_sde.guidance import classifier_free
from score_sde.models import autoencoder, published_latents
from score_sde.sde import DiscreteVP, per_image
from score_sde.space import pixels
from solvers import SOLVERS, tableau
from tests import reference
from tests.latent import TINY, compared, figures_of, nchw, needs_tiny, synthetic, tree_in
from tests.mixture import Mixture

NAMES = {"dpm_solver++": "dpmpp", "uni_pc": "unipc", "dpm_solver_v3": "dpmv3", "ddim": "ddim"}
CORRECTORS = {"": "off", "_corrector": "on", "_corrector_half": "half"}  # behind "_use"


def schedule(betas) -> DiscreteVP:
    return DiscreteVP(**latent_models._schedule(*betas, 1000))


def of_run(run: str, stored: dict, sde: DiscreteVP, order: int) -> tableau.Tableau:
    """Our solver for the name of a run, {sampler}_{steps}[_use_corrector[_half]]."""
    name, _, corrector = run.replace("reference", "dpm_solver++_").partition("_use")
    sampler, _, rest = name.rpartition("_")
    steps = int(rest)
    build = functools.partial(SOLVERS[NAMES[sampler]], sde, steps)
    match sampler:
        case "dpm_solver_v3":
            arrays = (stored[f"{name}_f64"] for name in "lsb")
            ems = from_published(*arrays, sde, t_start=1.0, t_end=1e-3, origin={})
            options = dict(corrector=CORRECTORS[corrector], corrector_pseudo=True, grid="time", snap=True)
            return build(ems=ems, order=order, **options)
        case "ddim":  # the labels of latent-diffusion's own, which ends at the chain's first node
            labels = np.arange(0, 1000, 1000 // steps)[::-1] + 1
            return build(grid=[*((labels + 1) / 1000), 1e-3])
    return build(order=order, grid="time")


def runs(name: str) -> list[str]:
    """The samplers' runs of a case."""
    keys = figures_of("L_sampling", name)
    starts = (*NAMES, "reference")
    return [
        key
        for key in keys
        if key.startswith(starts) and f"{key}_f64" in keys and not key.endswith(("indexes", "timesteps"))
    ]


def check(name: str, noise, sde: DiscreteVP, order: int, tolerance: float) -> dict:
    """Compares every run of a case; our samples by run."""
    stored = figures_of("L_sampling", name)
    x, samples = jnp.asarray(reference.nhwc(stored["xT"]), jnp.float64), {}
    solve = jax.jit(functools.partial(tableau.solve, noise))
    for run in runs(name):
        solver = of_run(run, stored, sde, order)
        samples[run] = solve(solver, x)
        compared(nchw(samples[run]), stored[f"{run}_f64"], tolerance, f"{name} {run}")
    return samples


def mixture() -> Mixture:
    """The one of the figures in latent space."""
    shape = (4, 8, 8)
    means = [0.5 * reference.normal(f"L/gmm/mu/{k}", shape) for k in range(3)]
    logvars = [0.5 * reference.normal(f"L/gmm/logvar/{k}", shape).astype(np.float64) for k in range(3)]
    variances = [c * np.exp(v) for c, v in zip((0.04, 0.09, 0.0625), logvars, strict=True)]
    nhwc = lambda values: np.stack([reference.nhwc(value) for value in values]).astype(np.float64)
    return Mixture(np.array([0.5, 0.3, 0.2]), nhwc(means), nhwc(variances))


@pytest.mark.parametrize("name", ["gmm_cfg7.5", "gmm_cfg1.5", "gmm_unconditional_order3"])
def test_an_exact_model(name, x64):
    case, model = reference.description("L_sampling")["cases"][name], mixture()
    sde = schedule(case["betas"])
    if case["condition"] is None:
        check(name, model.noise_fn(sde), sde, 3, 1e-9)
        return

    def noise_of(y):
        """Each image under a condition of its own."""
        rows = [model.noise_fn(sde, np.asarray(row)) for row in y]
        return lambda x, t: jnp.concatenate([row(x[i : i + 1], t[i : i + 1]) for i, row in enumerate(rows)])

    noise = classifier_free(noise_of, np.asarray(case["condition"]), np.zeros(3), case["guidance_scale"])
    check(name, noise, sde, 2, 1e-9)


@pytest.mark.parametrize("case", [case for case in reference.cases("E_extra") if case.startswith("v3_sd_half")])
def test_the_corrector_of_half_the_time(case, x64):
    """As published for Stable Diffusion, the corrector is left out of steps that end at t <= 0.5."""
    told, sde = reference.cases("E_extra")[case], schedule((0.00085, 0.012))
    stored, pixels = reference.arrays("E_ems_cfg"), Mixture.reference()
    ems = from_published(*(stored[f"ems/{key}_f64"] for key in "lsb"), sde, t_start=1.0, t_end=1e-3, origin={})
    noise_of = lambda y: pixels.noise_fn(sde, y)
    solver = SOLVERS["dpmv3"](
        sde,
        told["steps"],
        ems=ems,
        order=told["order"],
        corrector="half" if told["half"] else "on",
        corrector_pseudo=told["c_pseudo"],
        lower_order_final=told["lower_order_final"],
        indices=reference.arrays("E_extra")[f"{case}/indexes_f64"],
    )
    free, conditional = noise_of(None), noise_of(np.array([4.0, 0.0, 0.0]))
    noise = lambda x, t: free(x, t) + 2.0 * (conditional(x, t) - free(x, t))
    x = jnp.asarray(reference.nhwc(reference.arrays("E_v3_cfg")["x_T"]), jnp.float64)
    ours = jax.jit(functools.partial(tableau.solve, noise))(solver, x)
    compared(nchw(ours), reference.arrays("E_extra")[f"{case}/x0_f64"], 1e-9, case)


@needs_tiny
def test_from_prompts_to_images(x64):
    """The tiny model of Stable Diffusion's kind: samples of every solver, and images."""
    stored, case = figures_of("L_sampling", "e2e_sd_tiny"), reference.description("L_sampling")["cases"]["e2e_sd_tiny"]
    model = latent_models.read(TINY, dtype="float64")
    unet, first, text = (
        (part.network, tree_in(jnp.float64, part.params)) for part in (model.unet, model.autoencoder, model.text)
    )
    context, _ = latents.contexts(*text, tokenizer.read(model.tokenizer), [*case["prompts"], ""])
    sde = DiscreteVP(**model.sde)

    def noise_of(y):
        network = lambda x, label: unet[0].apply({"params": unet[1]}, x, label, y)
        return noise_fn(network, sde, output=model.output, label="node")

    noise = classifier_free(noise_of, context[:-1], context[-1], case["guidance_scale"])
    samples = check("e2e_sd_tiny", noise, sde, 2, 1e-9)
    images = latents.decoder(*first, model.scale)(samples["dpm_solver_v3_5"])
    compared(nchw(images), stored["image_raw_f64"], 1e-9, "images")
    unit = jnp.clip((images + 1) / 2, 0.0, 1.0)
    compared(unit, stored["image01_f64"], 1e-9, "in [0, 1]")
    levels = pixels(images.shape[1:]).decode(images)
    assert np.mean(levels == stored["image_uint8_truncated"]) > 0.999  # those within 1e-4 of a level may differ


def test_a_model_with_a_codebook(x64):
    """As of LSUN: eps = sigma x + 0.1 U-Net(x), since a network with random weights is no denoiser."""
    stored, case = (
        figures_of("L_sampling", "lsun_like_vq"),
        reference.description("L_sampling")["cases"]["lsun_like_vq"],
    )
    state = lambda key: {entry: synthetic(entry, shape) for entry, shape, *_ in case[key]}
    unet = published_latents.of_compvis(case["unet"], dtype="float64")
    params = tree_in(jnp.float64, published_latents.from_published(state("unet_state_dict"), unet))
    sde = schedule(case["betas"])
    network = lambda x, label: unet.apply({"params": params}, x, label)
    inner = noise_fn(network, sde, output="eps", label="node")
    noise = lambda x, t: per_image(sde.sigma(t), x) * x + 0.1 * inner(x, t)
    samples = check("lsun_like_vq", noise, sde, 3, 1e-9)

    first = autoencoder.of_state(state("vq_state_dict"), dtype="float64")
    weights = tree_in(jnp.float64, autoencoder.from_published(state("vq_state_dict"), first))
    z = samples["reference200"]
    images = latents.decoder(first, weights, 1.0)(z)
    compared(nchw(images), stored["image_f64"], 1e-9, "images")
    whole = first.apply({"params": weights}, z, method="decode", quantize=False)
    compared(nchw(whole), stored["image_force_not_quantize_f64"], 1e-9, "not quantized")


@needs_tiny
def test_the_program_of_the_page_runs():
    """docs/latent.md on the tiny model."""
    page = (pathlib.Path(__file__).resolve().parents[1] / "docs" / "latent.md").read_text()
    program = re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL).group(1)
    program = program.replace('"stable-diffusion-v1-5"', repr(str(TINY))).replace("7.5, 64", "7.5, 8")
    names = {}
    exec(compile(program, "docs/latent.md", "exec"), names)
    levels = np.asarray(names["levels"])
    assert levels.dtype == np.uint8 and levels.shape[0] == 1 and levels.shape[3] == 3
    assert np.isfinite(names["images"]).all()
