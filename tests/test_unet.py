"""ADM's U-Net and classifier, and EDM's networks: equal to the published implementations, from their own names."""

import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from score_sde.errors import UserError
from score_sde.models.ncsnpp import NCSNpp
from score_sde.models.published_unets import from_edm, from_guided_diffusion
from score_sde.models.unet import UNet, UNetClassifier
from tests import reference

# For small networks compilation is all the time there is, and this makes it shorter.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def synthetic(name: str, shape, buffers) -> np.ndarray:
    """Reference README_X 1: the weights that the figures belong to, by published name."""
    last = name.split(".")[-1]
    if last in buffers:
        return buffers[last]
    value = reference.normal(name, shape)
    if last == "freqs":
        return 16 * value
    if name.endswith("label_emb.weight"):
        return value
    if len(shape) >= 2:
        return value * np.float32(1 / np.sqrt(np.prod(shape[1:])))
    return np.float32(last == "weight") + np.float32(0.1) * value


def described(group: str, name: str) -> list:
    """(published name, shape, type) of each entry."""
    entries = reference.cases(group)[name]["state_dict"]
    return described(group, entries.removeprefix("same as ")) if isinstance(entries, str) else entries


def buffers_of(group: str, name: str) -> dict:
    """What a state_dict holds beside weights; of u, the noise levels, nobody here reads the values."""
    taps = np.asarray(reference.cases(group)[name]["kwargs"].get("resample_filter", [1, 1]), np.float32)
    return {"resample_filter": (np.outer(taps, taps) / taps.sum() ** 2)[None, None], "u": np.zeros(1, np.float32)}


def state_of(group: str, name: str) -> dict:
    buffers = buffers_of(group, name)
    return {entry: synthetic(entry, shape, buffers) for entry, shape, _ in described(group, name)}


def levels_of(factors) -> tuple[int, ...]:
    return tuple(int(math.log2(factor)) for factor in factors)


def adm(network: str, kwargs: dict, **changes):
    """Our network and image shape for guided-diffusion's arguments."""
    given = dict(kwargs)
    mult, nf = given["channel_mult"], given["model_channels"]
    half = min(mult) == 0.5  # 64 half-wide features are 32 whole ones
    options = dict(
        nf=nf // 2 if half else nf,
        ch_mult=tuple(int(2 * m) if half else m for m in mult),
        channel_mult_noise=2 if half else 1,
        channel_mult_emb=8 if half else 4,
        num_res_blocks=given["num_res_blocks"],
        attn_levels=levels_of(given["attention_resolutions"]),
        num_heads=given.get("num_heads", 1),
        head_channels=max(given.get("num_head_channels", -1), 0),
        scale_shift=given.get("use_scale_shift_norm", False),
        resblock_updown=given.get("resblock_updown", False),
        conv_resample=given.get("conv_resample", True),
        dropout=given.get("dropout", 0.0),
    )
    shape = (given["image_size"], given["image_size"], given["in_channels"])
    if network == "EncoderUNetModel":
        return UNetClassifier(**options, num_outputs=given["out_channels"], pool=given["pool"], **changes), shape
    options |= dict(
        num_heads_upsample=max(given.get("num_heads_upsample", -1), 0),
        num_classes=given.get("num_classes") or 0,
        learn_sigma=given["out_channels"] == 6,
        low_res=network == "SuperResModel",
    )
    return UNet(**options, **changes), shape


def edm(precond: str, kwargs: dict, **changes):
    """Our network and image shape for EDM's arguments; what they leave out are its classes' defaults."""
    given = dict(kwargs)
    size = given["img_resolution"]
    shape = (size, size, given["img_channels"])
    learn_sigma = precond == "iDDPMPrecond"
    if given["model_type"] == "DhariwalUNet":
        mult = given.get("channel_mult", [1, 2, 3, 4])
        attn = given.get("attn_resolutions", [32, 16, 8])
        network = UNet(
            nf=given.get("model_channels", 192),
            ch_mult=mult,
            num_res_blocks=given.get("num_blocks", 3),
            attn_levels=[level for level in range(len(mult)) if size >> level in attn],
            groups=0,
            channel_mult_emb=given.get("channel_mult_emb", 4),
            num_classes=given["label_dim"],
            augment_dim=given.get("augment_dim", 0),
            learn_sigma=learn_sigma,
            **changes,
        )
        return network, shape
    taps = given["resample_filter"]
    network = NCSNpp(
        nf=given.get("model_channels", 128),
        ch_mult=given.get("channel_mult", [1, 2, 2, 2]),
        num_res_blocks=given.get("num_blocks", 4),
        attn_resolutions=given.get("attn_resolutions", [16]),
        fir=taps != [1, 1] or given["encoder_type"] == "residual",
        fir_kernel=taps,
        progressive={"standard": "none", "skip": "output_skip"}[given["decoder_type"]],
        progressive_input={"standard": "none", "skip": "input_skip", "residual": "residual"}[given["encoder_type"]],
        embedding_type=given["embedding_type"],
        channel_mult_noise=given["channel_mult_noise"],
        channel_mult_emb=given.get("channel_mult_emb", 4),
        num_classes=given["label_dim"],
        class_embedding="linear",
        augment_dim=given.get("augment_dim", 0),
        log_label=False,
        fir_reversed=True,
        learn_sigma=learn_sigma,
        **changes,
    )
    return network, shape


def compared(out, expected, tolerance: float, what: str) -> None:
    expected = np.asarray(expected)
    error = np.abs(np.asarray(out, np.float64) - expected).max() / np.abs(expected).max()
    print(f"{what} {error:.1e}")  # shown by pytest -s
    assert out.shape == expected.shape
    assert error < tolerance


def figures_of(group: str, name: str) -> dict:
    stored = reference.arrays(group)
    return {key: stored[f"{name}/{key}"] for key in reference.cases(group)[name]["arrays"]}


# Cases that between them use every option; ALL_NETWORKS takes all, in minutes.
ALWAYS = (
    *("adm256_like", "avgpool_noconv", "heads_upsample", "half_multiplier", "superres_cond", "multihead_order_new"),
    *("clf_attention", "clf_spatial_v2", "clf_attention_legacy_heads"),
    *("song_ddpmpp_edm_cond_aug", "song_ncsnpp_ve_uncond", "song_emb2_noise3_blocks2", "song_residual_skip_fir"),
    "song_res12_asym_filter",
    *("song_positional_iddpm_fir", "dhariwal_edm_uncond_aug", "dhariwal_iddpm_cond", "dhariwal_noattn_narrow"),
)


def kind(group: str, wanted: str) -> list[str]:
    names = [name for name, case in reference.cases(group).items() if case["kind"] == wanted]
    return names if wanted == "state_dict_only" else [n for n in names if os.environ.get("ALL_NETWORKS") or n in ALWAYS]


TYPES = {"float32": ("", np.float32, 2e-5), "float64": ("_f64", np.float64, 1e-9)}


def adm_case(name: str, dtype: str):
    case, figures = reference.cases("X_adm")[name], figures_of("X_adm", name)
    network, shape = adm(case["network"], case["kwargs"], dtype=dtype)
    order = "new" if case["kwargs"].get("use_new_attention_order") else "legacy"
    params = from_guided_diffusion(state_of("X_adm", name), network, shape, order)
    return network, {"params": params}, figures


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", kind("X_adm", "unet"))
def test_adm_equals_published(name, dtype, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    suffix, real, tolerance = TYPES[dtype]
    network, params, figures = adm_case(name, dtype)
    x, t = reference.nhwc(figures["x"]).astype(real), figures["t"].astype(real)
    low_res = reference.nhwc(figures["low_res"]).astype(real) if "low_res" in figures else None
    y = figures["y"].astype(np.int32) if "y" in figures else None
    out = quick_jit(network.apply)(params, x, t, y, low_res=low_res)
    assert out.dtype == real
    compared(out, reference.nhwc(figures[f"out{suffix}"]), tolerance, f"{name} {dtype}")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", kind("X_adm", "classifier"))
def test_adm_classifier_and_its_gradient_equal_published(name, dtype, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    suffix, real, tolerance = TYPES[dtype]
    classifier, params, figures = adm_case(name, dtype)
    x, t, y = reference.nhwc(figures["x"]).astype(real), figures["t"].astype(real), figures["y"].astype(np.int32)

    def total(x):
        logits = classifier.apply(params, x, t)
        return (jax.nn.log_softmax(logits) * jax.nn.one_hot(y, logits.shape[-1], dtype=x.dtype)).sum(), logits

    gradient, logits = quick_jit(jax.grad(total, has_aux=True))(jnp.asarray(x))
    compared(logits, figures[f"logits{suffix}"], tolerance, f"{name} logits {dtype}")
    compared(gradient, reference.nhwc(figures[f"grad{suffix}"]), 5 * tolerance, f"{name} gradient {dtype}")


def edm_case(name: str, dtype: str):
    case = reference.cases("X_edm")[name]
    network, shape = edm(case["precond"], case["kwargs"], dtype=dtype)
    return network, {"params": from_edm(state_of("X_edm", name), network, shape)}, figures_of("X_edm", name)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", kind("X_edm", "forward"))
def test_edm_equals_published(name, dtype, request):
    """F from the published c_in x and c_noise, so that a difference is the network's own."""
    if dtype == "float64":
        request.getfixturevalue("x64")
    suffix, real, tolerance = TYPES[dtype]
    network, params, figures = edm_case(name, dtype)
    u = reference.nhwc(figures["x"]).astype(np.float64) * figures["c_in_f64"][:, None, None, None]
    labels = figures[f"c_noise{suffix}"].astype(real)
    y = figures["class_labels"].astype(real) if "class_labels" in figures else None
    augment = figures["augment_labels"].astype(real) if "augment_labels" in figures else None
    out = quick_jit(network.apply)(params, u.astype(real), labels, y, augment=augment)
    compared(out, reference.nhwc(figures[f"F{suffix}"]), tolerance, f"{name} {dtype}")
    if y is not None:
        whole = quick_jit(network.apply)(params, u.astype(real), labels, y.argmax(1).astype(np.int32), augment=augment)
        compared(whole, out, 1e-6, f"{name} classes as numbers")


# -- Full size --


def zeros_of(group: str, name: str) -> dict:
    blank = {entry: np.broadcast_to(np.float32(0), shape) for entry, shape, _ in described(group, name)}
    buffers = buffers_of(group, name)
    return blank | {entry: buffers[last] for entry in blank if (last := entry.split(".")[-1]) in buffers}


@pytest.mark.parametrize("name", kind("X_adm", "state_dict_only"))
def test_names_and_shapes_of_published_adm(name):
    case = reference.cases("X_adm")[name]
    network, shape = adm(case["network"], case["kwargs"])
    params = from_guided_diffusion(zeros_of("X_adm", name), network, shape)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == case["n_params"]


@pytest.mark.parametrize("name", kind("X_edm", "state_dict_only"))
def test_names_and_shapes_of_published_edm(name):
    case = reference.cases("X_edm")[name]
    network, shape = edm(case["precond"], case["kwargs"])
    params = from_edm(zeros_of("X_edm", name), network, shape)
    frequencies = 128 if case["kwargs"].get("embedding_type") == "fourier" else 0  # a buffer there
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) - frequencies == case["n_params"]


@pytest.mark.skipif(not os.environ.get("ALL_NETWORKS"), reason="a full-size network of each kind takes a minute")
@pytest.mark.parametrize("name", ["full/64x64_diffusion", "full/64x64_classifier"])
def test_full_size_adm_equals_published(name):
    case, figures = reference.cases("X_adm")[name], figures_of("X_adm", name)
    network, shape = adm(case["network"], case["kwargs"])
    params = {"params": from_guided_diffusion(state_of("X_adm", case["same_state_dict_as"]), network, shape)}
    x = reference.nhwc(reference.normal(f"X/adm/x/{name}", (1, 3, 64, 64)))
    y, t = figures["y"].astype(np.int32), figures["t"]
    if "out" in figures:
        out = jax.jit(network.apply)(params, x, t, y)
        compared(out, reference.nhwc(figures["out"]), 2e-5, name)
        return

    def total(x):
        logits = network.apply(params, x, t)
        return jax.nn.log_softmax(logits)[0, y[0]], logits

    gradient, logits = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(x))
    compared(logits, figures["logits"], 2e-5, f"{name} logits")
    compared(gradient[:, ::2, ::2], reference.nhwc(figures["grad"]), 1e-4, f"{name} gradient")


@pytest.mark.skipif(not os.environ.get("ALL_NETWORKS"), reason="a full-size network of each kind takes a minute")
@pytest.mark.parametrize("name", ["full/edm-cifar10-32x32-uncond-vp", "full/edm-imagenet-64x64-cond-adm"])
def test_full_size_edm_equals_published(name):
    case, figures = reference.cases("X_edm")[name], figures_of("X_edm", name)
    network, shape = edm(case["precond"], case["kwargs"])
    params = {"params": from_edm(state_of("X_edm", case["same_state_dict_as"]), network, shape)}
    apply = jax.jit(network.apply)
    y = figures["class_index"].astype(np.int32) if "class_index" in figures else None
    for q, sigma in enumerate(figures["sigmas"]):
        x = reference.nhwc(figures["x0"] + sigma * figures["z"])
        u = (x / np.hypot(np.float64(sigma), 0.5)).astype(np.float32)
        labels = np.broadcast_to(figures[f"c_noise{q}"], len(x))
        compared(apply(params, u, labels, y), reference.nhwc(figures[f"F{q}"]), 2e-5, f"{name} {q}")


# -- What needs no reference --

TINY = UNet(
    nf=32,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_levels=(1,),
    head_channels=32,
    num_classes=3,
    augment_dim=2,
    dropout=0.5,
)
X, LABEL = jnp.asarray(reference.normal("unet/x", (2, 8, 16, 3))), jnp.asarray([1.0, 999.0])


def tiny_params(network, *inputs):
    """Every parameter drawn, so that no layer starts as zero."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    draw = lambda path, leaf: (
        jnp.asarray(reference.normal(jax.tree_util.keystr(path), leaf.shape))
        / np.sqrt(max(np.prod(leaf.shape[:-1]), 4))
    )
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize("network", [TINY, UNetClassifier(32, (1, 2), 1, (1,), head_channels=32, num_outputs=3)])
def test_types(network):
    """Parameters are float32, the output has the type of x, also in both modes of differentiation. Nothing runs."""
    network = network.clone(dtype="bfloat16")
    params = jax.eval_shape(network.init, jax.random.key(0), X, LABEL)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}

    def derivatives(params, x):
        out, pull = jax.vjp(lambda x: network.apply(params, x, LABEL), x)
        gradient = jax.grad(lambda x: network.apply(params, x, LABEL).sum())
        return out, pull(out)[0], jax.jvp(gradient, (x,), (x,))[1]  # the last as EMS of a guided model need it

    out, *gradients = jax.eval_shape(derivatives, params, X)
    assert out.dtype == jnp.float32
    assert all((g.shape, g.dtype) == (X.shape, X.dtype) for g in gradients)


def test_bfloat16_is_near_float32():
    params = tiny_params(TINY, X, LABEL)
    single, half = (quick_jit(TINY.clone(dtype=dtype).apply)(params, X, LABEL) for dtype in ("float32", "bfloat16"))
    assert 1e-5 < np.abs(single - half).max() / np.abs(single).max() < 0.05


def test_recomputed_stages_change_nothing():
    params = tiny_params(TINY, X, LABEL)
    assert jax.tree.structure(params) == jax.tree.structure(tiny_params(TINY.clone(remat=True), X, LABEL))
    loss = lambda network: lambda params: (network.apply(params, X, LABEL, jnp.asarray([0, 2])) ** 2).sum()
    ours, theirs = (quick_jit(jax.grad(loss(network)))(params) for network in (TINY, TINY.clone(remat=True)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), ours, theirs)


def test_conditions():
    """No class is `num_classes` or None, no augmentation zeros or None, and each input counts."""
    params, apply = tiny_params(TINY, X, LABEL), quick_jit(TINY.apply)
    plain = apply(params, X, LABEL)
    assert np.array_equal(plain, apply(params, X, LABEL, jnp.asarray([3, 3]), augment=jnp.zeros((2, 2))))
    for other in (
        apply(params, X, LABEL, jnp.asarray([0, 1])),
        apply(params, X, LABEL, augment=jnp.ones((2, 2))),
        apply(params, X, LABEL[::-1]),
        apply(params, X, LABEL, None, jax.random.split(jax.random.key(0), 2)),
    ):
        assert np.abs(other - plain).max(axis=(1, 2, 3)).min() > 1e-4


def test_dropout_depends_on_an_example_alone():
    params, apply = tiny_params(TINY, X, LABEL), quick_jit(TINY.apply)
    keys = jax.random.split(jax.random.key(1), 2)
    together = apply(params, X, LABEL, None, keys)
    np.testing.assert_allclose(together[1:], apply(params, X[1:], LABEL[1:], None, keys[1:]), rtol=1e-4, atol=1e-5)


def test_it_starts_as_nothing():
    """Zero: the last convolution of the network and of each branch, and the last map of each attention."""
    params = quick_jit(TINY.init)(jax.random.key(0), X, LABEL)
    assert np.abs(quick_jit(TINY.apply)(params, X, LABEL)).max() < 1e-4


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: UNet(dtype="int8"), "bfloat16"),
        (lambda: UNetClassifier(pool="mean"), "adaptive, attention, spatial"),
        (lambda: jax.eval_shape(TINY.init, jax.random.key(0), X[:, :7], LABEL), "multiples of 2"),
        (lambda: jax.eval_shape(TINY.clone(nf=48).init, jax.random.key(0), X, LABEL), "multiples of 32"),
        (lambda: jax.eval_shape(TINY.clone(head_channels=0, num_heads=5).init, jax.random.key(0), X, LABEL), "5 heads"),
        (lambda: jax.eval_shape(TINY.clone(num_classes=0).init, jax.random.key(0), X, LABEL, LABEL), "takes no y"),
        (
            lambda: jax.eval_shape(
                lambda: TINY.clone(augment_dim=0).init(jax.random.key(0), X, LABEL, augment=jnp.ones((2, 2)))
            ),
            "not told of augmentations",
        ),
        (
            lambda: jax.eval_shape(
                lambda: TINY.clone(low_res=True).apply(
                    TINY.clone(low_res=True).init(jax.random.key(0), X, LABEL), X, LABEL
                )
            ),
            "give them as low_res",
        ),
    ],
)
def test_bad_options_and_inputs_are_refused(call, told):
    with pytest.raises(UserError, match=told) as refusal:
        call()
    assert "\n" not in str(refusal.value)
