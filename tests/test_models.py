"""NCSN++ and DDPM++: equal to the published implementations, and what the published ones cannot be asked about."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from score_sde.denoiser import noise_fn, score_fn
from score_sde.errors import UserError
from score_sde.models import layers
from score_sde.models.ncsnpp import NCSNpp
from score_sde.models.published import from_torch, to_torch
from score_sde.models.resample import depth_to_space, downsample_2d, smooth_2d, space_to_depth, upsample_2d
from score_sde.sde import EDM, VE
from tests import reference

KINDS = ("ncsnpp",)
ALWAYS = (
    "vp_ddpmpp",
    "ve_ncsnpp_discrete_positional",
    "ve_fir_kernel_1331_gray",
    "ve_fir_biggan_residual_residual",
    "ve_fir_biggan_output_skip_none",
    "ve_nofir_biggan_output_skip_input_skip",
    "vp_nofir_ddpm_residual_input_skip",
    "vp_nofir_ddpm_noconv",
    "vp_ddpm_cat_input_skip",
    "vp_ddpm_skip_rescale_false",
    "vp_fir_ddpm",
    "vp_fir_kernel_14641",
    "vp_unconditional",
    "vp_elu",
    "vp_two_attn",
    "vp/cifar10_ddpmpp_continuous",
    "ve/cifar10_ncsnpp_continuous",
    "ve/celebahq_256_ncsnpp_continuous",
)


def ncsnpp_cases(group: str) -> list[str]:
    return [name for name, case in reference.cases(group).items() if case["config"]["model"]["name"] in KINDS]


def select(group: str) -> list[str]:
    """All cases if ALL_NETWORKS is set; else those that between them use every option, to save minutes."""
    return [name for name in ncsnpp_cases(group) if os.environ.get("ALL_NETWORKS") or name in ALWAYS]


def build(config: dict, **changes) -> NCSNpp:
    """The network that an official config describes."""
    known = NCSNpp.__dataclass_fields__.keys() - {"name"}
    options = {key: value for key, value in config["model"].items() if key in known}
    return NCSNpp(**options | changes)


def official(config: dict, network):
    """(params, x, label) -> what the published network returns, from ours.

    It maps data in [0, 1] to [-1, 1] itself, and with scale_by_sigma divides its output, which is then the score of
    "scaled_score": at sigma = label for Fourier features, else at the label-th of num_scales levels.
    """
    model, centered = config["model"], config["data"]["centered"]
    n, ends = model["num_scales"], (model["sigma_min"], model["sigma_max"])

    def run(params, x, label):
        apply = lambda u, label: network.apply({"params": params}, u, label)
        noise = functools.partial(noise_fn, apply, num_scales=n, data_range=(-1.0, 1.0) if centered else (0.0, 1.0))
        if not model["scale_by_sigma"]:
            return noise(EDM(), output="eps", label="t")(x, label)
        if model["name"] == "ncsnpp" and model["embedding_type"] == "fourier":
            return score_fn(noise(EDM(), output="scaled_score", label="sigma"), EDM())(x, label)
        if centered:  # VP, as no config has it
            levels = jnp.asarray(np.geomspace(*ends[::-1], n), x.dtype)[label.astype(int)]
            return noise(EDM(), output="eps", label="t")(x, label) / levels[:, None, None, None]
        sde = VE(sigma_min=ends[0], sigma_max=ends[1])
        return score_fn(noise(sde, output="scaled_score", label="reversed_index"), sde)(x, 1 - label / (n - 1))

    return run


def synthetic(name: str, shape, config: dict) -> np.ndarray:
    """Reference README 1.1: the weights that the figures belong to, by PyTorch name."""
    value = reference.normal(name, shape)
    last = name.split(".")[-1]
    if len(shape) >= 2:
        return value * np.float32(1 / np.sqrt(np.prod(shape[1:])))
    if last == "W":
        return value * np.float32(config["model"]["fourier_scale"])
    return np.float32(last in ("weight", "alpha", "gamma")) + np.float32(0.1) * value


def case(group: str, name: str):
    """The network of a case, its official state_dict, and the input (NHWC)."""
    meta = reference.cases(group)[name]
    state = {
        entry: synthetic(entry, shape, meta["config"]) for entry, shape, _ in meta["state_dict"] if entry != "sigmas"
    }
    return build(meta["config"]), state, reference.nhwc(reference.arrays(group)[f"{name}/x"])


def check_outputs(group: str, name: str) -> None:
    network, state, x = case(group, name)
    params = from_torch(state, network, x.shape[1:])
    apply = jax.jit(official(reference.cases(group)[name]["config"], network))
    for q in (0, 1):
        label = reference.arrays(group)[f"{name}/labels{q}"].astype(np.float32)
        expected = reference.nhwc(reference.arrays(group)[f"{name}/out{q}"])
        out = apply(params, x, label)
        assert out.dtype == jnp.float32
        error = np.abs(out - expected).max() / np.abs(expected).max()
        print(f"{group} {name} {error:.1e}")  # shown by pytest -s
        assert error < 2e-5


# -- Equality with the published implementations --


@pytest.mark.parametrize("name", select("A_reduced"))
def test_small_network_equals_published(name):
    check_outputs("A_reduced", name)


@pytest.mark.parametrize("name", select("A_cifar10"))
def test_full_size_network_equals_published(name):
    check_outputs("A_cifar10", name)


@pytest.mark.parametrize("group, name", [(g, n) for g in ("A_reduced", "A_cifar10") for n in select(g)])
def test_parameter_tree_is_the_official_one(group, name):
    """Every key path and shape, and every PyTorch name in its place."""
    published = reference.cases(f"F_jax_{group}")[name]
    network, state, x = case(group, name)
    params = traverse_util.flatten_dict(from_torch(state, network, x.shape[1:]), sep="/")
    assert {path: list(leaf.shape) for path, leaf in params.items()} == dict(published["params"])
    for torch_name, path, _ in published["mapping"]:
        assert np.array_equal(np.sort(params[path], axis=None), np.sort(state[torch_name], axis=None))


@pytest.mark.parametrize("name", select("A_large"))
def test_large_parameter_tree_is_the_official_one(name):
    config = reference.cases("A_large")[name]["config"]
    x = jnp.zeros((1, *[config["data"]["image_size"]] * 2, 3), jnp.float32)
    params = jax.eval_shape(build(config).init, jax.random.key(0), x, jnp.ones(1, jnp.float32))["params"]
    shapes = {path: list(leaf.shape) for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}
    assert shapes == dict(reference.description("F_jax_params_large")[name]["params"])


def test_parameters_survive_the_way_to_pytorch_and_back():
    for name in ("vp_nofir_ddpm_output_skip_input_skip", "vp_nofir_ddpm_noconv", "ve_fir_biggan_residual_residual"):
        network, state, x = case("A_reduced", name)
        back = to_torch(from_torch(state, network, x.shape[1:]), network, x.shape[1:])
        assert back.keys() == state.keys()
        assert all(np.array_equal(back[entry], state[entry]) for entry in state)


# -- What needs no reference --

TINY = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}


def tiny(shape=(2, 8, 8, 3), **options):
    """A tiny network with random parameters, nowhere zero (compiling `init` takes longer), and inputs for it."""
    network = NCSNpp(**TINY | {"dropout": 0.0} | options)
    x = jnp.asarray(reference.normal("tiny/x", shape))
    label = jnp.linspace(0.5, 2.0, shape[0], dtype=jnp.float32)

    def fill(path, leaf):
        value = reference.normal(jax.tree_util.keystr(path), leaf.shape)
        fan_in = np.prod(leaf.shape[:-1], dtype=np.float32)
        return jnp.asarray(1 + 0.1 * value if path[-1].key == "scale" else value / np.sqrt(fan_in), leaf.dtype)

    params = jax.tree_util.tree_map_with_path(fill, jax.eval_shape(network.init, jax.random.key(0), x, label))
    return network, params, x, label


def run(network, *arguments, **keywords):
    return jax.jit(network.apply)(*arguments, **keywords)


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 8, 16, 1), (3, 4, 4, 4)])
def test_output_has_the_shape_and_type_of_x(shape):
    network, params, x, label = tiny(shape=shape)
    out = run(network, params, x, label)
    assert out.shape == shape
    assert out.dtype == x.dtype


def test_patches_enter_and_leave_in_place():
    """A patch's pixels are channels of one, row by row, and come back; the network is that of the patched image."""
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    patched = space_to_depth(x, 2)
    assert patched.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(patched[1, 1, 2].reshape(2, 2, 3), x[1, 2:4, 4:6])
    np.testing.assert_array_equal(depth_to_space(patched, 2), x)
    for progressive in ("none", "output_skip"):
        options = dict(progressive=progressive, progressive_input="input_skip")
        network, params, x, label = tiny(shape=(2, 4, 4, 12), **options)
        out = run(network.clone(patch_size=2), params, depth_to_space(x, 2), label)
        np.testing.assert_allclose(space_to_depth(out, 2), run(network, params, x, label), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="no networks on patches"):
        to_torch(params["params"], network.clone(patch_size=2), (8, 8, 3))
    with pytest.raises(UserError, match="multiples of 4"):
        run(network.clone(patch_size=2), params, jnp.zeros((2, 6, 6, 3)), label)


def test_published_initialization():
    """Zero init_scale: the output is almost zero. Kernels are uniform within sqrt(3 scale / fan_avg), biases zero."""
    network, _, x, label = tiny(embedding_type="fourier", nf=16)
    params = jax.jit(network.init)(jax.random.key(0), x, label)
    assert 0 < np.abs(run(network, params, x, label)).max() < 1e-3
    for path, leaf in traverse_util.flatten_dict(params["params"]).items():
        assert leaf.dtype == jnp.float32
        if path[-1] in ("bias", "b"):
            assert not leaf.any()
        elif path[-1] == "scale":
            assert (leaf == 1).all()
        elif path[0].startswith("GaussianFourier"):
            assert 8 < leaf.std() < 24
        else:
            fan_average = np.prod(leaf.shape[:-2], initial=1) * (leaf.shape[-1] + leaf.shape[-2]) / 2
            largest = np.abs(leaf).max() / np.sqrt(3 / fan_average)
            zero = ("ResnetBlock" in path[0] and path[1] == "Conv_1") or path[1] == "NIN_3" or path[0] == "Conv_1"
            scale = 1e-10 if zero else 0.1 if path[-1] == "W" else 1.0
            assert 0.9 * np.sqrt(scale) < largest <= np.sqrt(scale)


def test_fourier_frequencies_get_no_gradient():
    network, params, x, label = tiny(embedding_type="fourier")
    gradient = jax.jit(jax.grad(lambda p: network.apply(p, x, label).sum()))(params)["params"]
    assert not gradient["GaussianFourierProjection_0"]["W"].any()
    assert gradient["Dense_0"]["kernel"].any()


def test_dropout_only_in_training():
    network, params, x, label = tiny(dropout=0.5)
    apply = jax.jit(lambda keys: network.apply(params, x, label, dropout_keys=keys))
    outs = [apply(jax.random.split(jax.random.key(seed), len(x))) for seed in (0, 0, 1)]
    assert np.array_equal(outs[0], outs[1])
    assert np.abs(outs[0] - outs[2]).max() > 1e-3
    still = run(network, params, x, label)
    assert np.array_equal(still, run(network.clone(dropout=0.0), params, x, label))


@pytest.mark.parametrize("shape", [(16, 16, 32), (3, 5, 7)])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_has_its_rate_and_masks_are_independent(rate, shape):
    """Within four standard errors: for each example, between examples, and between the halves of one mask."""
    h = jnp.ones((8, *shape))
    keys = jax.random.split(jax.random.key(0), len(h))
    out = np.asarray(layers.Dropout(rate).apply({}, h, keys)).reshape(len(h), -1)
    np.testing.assert_allclose(out[out > 0], 1 / (1 - rate), rtol=1e-6)
    kept, size = out > 0, out.shape[1]
    error = 4 * np.sqrt(rate * (1 - rate) / size)
    assert np.abs(kept.mean(1) - (1 - rate)).max() < error
    centred = (kept - (1 - rate)) / np.sqrt(rate * (1 - rate))
    assert np.abs((centred[1:] * centred[:-1]).mean(1)).max() < 4 / np.sqrt(size)
    half = size // 2
    assert np.abs((centred[:, :half] * centred[:, -half:]).mean(1)).max() < 4 / np.sqrt(half)


def test_classes():
    """Each class has its own output, and no y means class `num_classes`."""
    network, params, x, label = tiny(num_classes=3)
    apply = jax.jit(lambda y: network.apply(params, x, label, y))
    outs = [apply(jnp.full(2, y)) for y in range(4)]
    assert all(np.abs(outs[0] - out).max() > 1e-3 for out in outs[1:])
    np.testing.assert_allclose(run(network, params, x, label), outs[3], atol=1e-6)


def test_bfloat16_stays_near_float32():
    for options in ({}, {"fir": True, "progressive_input": "residual", "progressive": "output_skip"}):
        network, params, x, label = tiny(**options)
        exact = run(network, params, x, label)
        rounded = network.clone(dtype="bfloat16")
        assert all(
            leaf.dtype == jnp.float32
            for leaf in jax.tree.leaves(jax.eval_shape(rounded.init, jax.random.key(0), x, label))
        )
        out = run(rounded, params, x, label)
        assert out.dtype == jnp.float32
        assert 0 < np.abs(out - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("resblock_type", ["biggan", "ddpm"])
def test_remat_changes_nothing(resblock_type):
    network, params, x, label = tiny(resblock_type=resblock_type, dropout=0.1)
    lean = network.clone(remat=True)
    assert jax.tree.structure(jax.eval_shape(lean.init, jax.random.key(0), x, label)) == jax.tree.structure(params)

    def loss(net, p):
        return jnp.square(net.apply(p, x, label, dropout_keys=jax.random.split(jax.random.key(7), len(x)))).sum()

    values, lean_values = (
        jax.jit(jax.value_and_grad(lambda p, net=net: loss(net, p)))(params) for net in (network, lean)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), values, lean_values)


def test_examples_are_independent():
    """vmap over single examples, as the losses and the EMS estimate use it, equals the batch."""
    network, params, x, label = tiny(fir=True, progressive_input="residual")
    single = jax.jit(jax.vmap(lambda x, label: network.apply(params, x[None], label[None])[0]))(x, label)
    np.testing.assert_allclose(single, run(network, params, x, label), rtol=1e-5, atol=1e-5)


def test_derivatives_are_those_of_the_function(x64):
    """jvp in x and in the label, and its transpose, against central differences in float64."""
    for options in (
        {},
        {
            "fir": True,
            "embedding_type": "fourier",
            "fourier_scale": 1.0,
            "progressive_input": "residual",
        },
    ):
        network, params, x, label = tiny(dtype="float64", **options)
        x, label = x.astype(jnp.float64), label.astype(jnp.float64)
        function = lambda x, label, net=network, p=params: net.apply(p, x, label)
        direction = (jnp.asarray(reference.normal("tiny/dx", x.shape), jnp.float64), jnp.ones_like(label))
        cotangent = jnp.asarray(reference.normal("tiny/cotangent", x.shape), jnp.float64)

        tangent = jax.jit(lambda *point: jax.jvp(function, point, direction)[1])(x, label)
        pulled = jax.jit(lambda *point: jax.vjp(function, *point)[1](cotangent))(x, label)
        step = 1e-5
        moved = jax.jit(lambda s, *point: function(*(a + s * d for a, d in zip(point, direction, strict=True))))
        ahead, behind = moved(step, x, label), moved(-step, x, label)
        assert tangent.dtype == jnp.float64
        np.testing.assert_allclose(tangent, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)
        paired = sum((a * b).sum() for a, b in zip(pulled, direction, strict=True))
        np.testing.assert_allclose(paired, (tangent * cotangent).sum(), rtol=1e-10)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"resblock_type": "resnet"}, "biggan, ddpm"),
        ({"progressive": "skip"}, "none, output_skip, residual"),
        ({"progressive_input": "output_skip"}, "none, input_skip, residual"),
        ({"progressive_combine": "add"}, "sum, cat"),
        ({"embedding_type": "sin"}, "positional, fourier"),
        ({"nonlinearity": "gelu"}, "elu, relu, lrelu, swish"),
        ({"dtype": "float16"}, "float32, bfloat16, float64"),
        ({"num_classes": 10, "conditional": False}, "conditional"),
        ({"fir": True, "fir_kernel": [1]}, "two taps"),
    ],
)
def test_bad_options_are_refused_at_once(options, told):
    with pytest.raises(UserError, match=told):
        NCSNpp(**options)


def test_bad_inputs_are_refused():
    network, params, x, label = tiny()
    with pytest.raises(UserError, match="multiples of 2"):
        run(network, params, x[:, :7], label)
    with pytest.raises(UserError, match="no classes"):
        run(network, params, x, label, jnp.zeros(2, jnp.int32))
    with pytest.raises(UserError, match="cannot split 18 channels"):
        jax.eval_shape(network.clone(nf=6).init, jax.random.key(0), x, label)


def test_checkpoints_of_another_network_are_refused():
    network, params, x, _ = tiny()
    state = to_torch(params["params"], network, x.shape[1:])
    first = next(iter(state))
    with pytest.raises(UserError, match=f"has no {first}"):
        from_torch({k: v for k, v in state.items() if k != first}, network, x.shape[1:])
    with pytest.raises(UserError, match="no place for 1 entries, such as extra"):
        from_torch(state | {"extra": np.zeros(3)}, network, x.shape[1:])
    with pytest.raises(UserError, match="shape"):
        from_torch(state, network.clone(nf=16), x.shape[1:])


# -- Resampling filters --


@pytest.mark.parametrize("kernel", [(1, 1), (1, 3, 3, 1), (1, 4, 6, 4, 1), (1, 2, 5)])
def test_filters_equal_depthwise_convolutions(kernel):
    """StyleGAN-2's definition (insert zeros, pad, convolve, subsample), by XLA's own convolution."""
    x = jax.random.normal(jax.random.key(0), (2, 6, 8, 3), jnp.float32)
    taps = np.flip(np.array(kernel, np.float32) / sum(kernel))

    def definition(gain, up, down, before, after):
        weights = jnp.asarray(np.tile((gain * np.outer(taps, taps))[:, :, None, None], (1, 1, 1, 3)), jnp.float32)
        return jax.lax.conv_general_dilated(
            x,
            weights,
            (down, down),
            [(before, after)] * 2,
            lhs_dilation=(up, up),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=3,
        )

    p = len(kernel) - 2
    for margin in (0, 1):
        expected = definition(4.0, 2, 1, (p + 1) // 2 + 1 + margin, p // 2 + 1 + margin)
        np.testing.assert_allclose(upsample_2d(x, kernel, margin), expected, atol=1e-6)
    np.testing.assert_allclose(downsample_2d(x, kernel), definition(1.0, 1, 2, (p + 1) // 2, p // 2), atol=1e-6)
    np.testing.assert_allclose(smooth_2d(x, kernel), definition(1.0, 1, 1, (p + 3) // 2, p // 2 + 1), atol=1e-6)


def test_attention_in_blocks(monkeypatch):
    """Blocks of queries change neither the value nor the gradient, and save memory."""
    qkv = jnp.asarray(reference.normal("attention", (3, 1, 512, 8)))
    loss = lambda qkv: jnp.square(layers.attention(*qkv)).sum()
    direct = jax.jit(jax.value_and_grad(loss)).lower(qkv).compile()
    monkeypatch.setattr(layers, "ATTENTION_BLOCK", 64)
    in_blocks = jax.jit(jax.value_and_grad(loss)).lower(qkv).compile()
    for expected, found in zip(direct(qkv), in_blocks(qkv), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    memory = lambda compiled: compiled.memory_analysis().temp_size_in_bytes
    assert memory(in_blocks) < memory(direct) / 3
