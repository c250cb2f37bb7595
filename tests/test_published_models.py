"""DDPM, NCSN, NCSNv2 and the classifier: equal to the published implementations; and files that those wrote."""

import dataclasses
import functools
import io
import os
import pickle
import struct
import zipfile

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax import serialization, traverse_util

from configs import digits
from experiments import build as builder
from score_sde.errors import UserError
from score_sde.foreign import read_checkpoint
from score_sde.models import MODELS
from score_sde.models.classifier import WideResnet
from score_sde.models.ddpm import DDPM
from score_sde.models.ncsnv2 import (
    NCSN,
    ConditionalResidualBlock,
    InstanceNorm2dPlus,
    NCSNv2,
    ncsnv2_128,
    ncsnv2_256,
)
from score_sde.models.published import convert, from_flax, from_torch, to_torch
from tests import reference
from tests.test_models import official, synthetic
from tools.import_checkpoint import fitting_configs

SLOW = bool(os.environ.get("ALL_NETWORKS"))  # full-size networks as well, which take minutes


def build(config: dict):
    """The network that an official config describes."""
    model, make = config["model"], MODELS[config["model"]["name"]]
    known = {field.name for field in dataclasses.fields(getattr(make, "func", make))} - {"name"}
    return make(**{key: value for key, value in model.items() if key in known})


def weights(name: str, shape, config: dict) -> np.ndarray:
    """Reference README 1.1: the weights that the figures belong to, by PyTorch name."""
    if name.endswith("embed.weight"):
        return embedding(reference.normal(name, shape))
    return synthetic(name, shape, config)


def embedding(value: np.ndarray) -> np.ndarray:
    return np.float32(0.1) * value + np.float32(np.arange(value.shape[1]) < 2 * value.shape[1] // 3)


def weights_by_path(path: str, shape, scale: float = 1.0) -> np.ndarray:
    """Reference README 1.2 and W: the same, by Flax path; `scale` is that of Fourier frequencies."""
    value = reference.normal(f"jax:{path}", shape)
    match path.rsplit("/", 1)[-1]:
        case "embedding":
            return embedding(value)
        case "kernel":
            return value * np.float32(1 / np.sqrt(np.prod(shape[:-1])))
        case "W":
            return value * np.float32(scale)
        case name:
            return np.float32(name in ("alpha", "gamma", "scale")) + np.float32(0.1) * value


def case(group: str, name: str):
    """The network of a PyTorch case, its official state_dict, and the input (NHWC)."""
    meta = reference.cases(group)[name]
    state = {
        entry: weights(entry, shape, meta["config"]) for entry, shape, _ in meta["state_dict"] if entry != "sigmas"
    }
    return build(meta["config"]), state, reference.nhwc(reference.arrays(group)[f"{name}/x"])


def shapes_of(network, image_shape) -> dict[str, list[int]]:
    x, label = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), x, label)["params"]
    return {path: list(leaf.shape) for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}


def check(config, network, params, x, figures, name: str, tolerance: float = 2e-5) -> None:
    """Both calls of a case at once."""
    labels = [np.asarray(figures[f"{name}/labels{q}"], np.float32) for q in (0, 1)]
    expected = np.concatenate([figures[f"{name}/out{q}"] for q in (0, 1)])
    out = jax.jit(official(config, network))(params, np.concatenate([x, x]), np.concatenate(labels))
    assert out.dtype == jnp.float32
    for half in (slice(0, len(x)), slice(len(x), None)):  # the two calls' outputs differ in scale
        error = np.abs(out[half] - expected[half]).max() / np.abs(expected[half]).max()
        print(f"{name} {error:.1e}")  # shown by pytest -s
        assert error < tolerance


# -- Equality with the published implementations --

DDPM_CASES = [
    (group, name)
    for group in ("A_reduced", "A_cifar10")
    for name, meta in reference.cases(group).items()
    if meta["config"]["model"]["name"] == "ddpm" and (SLOW or name in ("ddpm_ve", "ddpm_unconditional"))
]
OFFICIAL_REFINENETS = ["ncsnv2_reduced", *(["ve/ncsnv2/cifar10", "ve/ncsn/cifar10"] if SLOW else [])]


@pytest.mark.parametrize("group, name", DDPM_CASES)
def test_ddpm_equals_published(group, name):
    network, state, x = case(group, name)
    stored = reference.arrays(group)
    figures = {key: stored[key] for key in (f"{name}/labels0", f"{name}/labels1")}
    figures |= {key: reference.nhwc(stored[key]) for key in (f"{name}/out0", f"{name}/out1")}
    config = reference.cases(group)[name]["config"]
    check(config, network, from_torch(state, network, x.shape[1:]), x, figures, name)


@pytest.mark.parametrize("name", ["ncsnv2", "ncsn_repaired"])
def test_refinenets_equal_published_with_weights_from_pytorch(name):
    """The PyTorch case has the arithmetic of the JAX code, and so verifies the mapping of parameters."""
    network, state, x = case("A_ncsn_jaxlike", name)
    config, figures = reference.cases("A_ncsn_jaxlike")[name]["config"], reference.arrays("F_jax_A_ncsn_jaxlike")
    check(config, network, from_torch(state, network, x.shape[1:]), x, figures, name)


@pytest.mark.parametrize("name", OFFICIAL_REFINENETS)
def test_refinenets_equal_published(name):
    meta, figures = reference.cases("F_ncsn_jax")[name], reference.arrays("F_ncsn_jax")
    network, x = build(meta["config"]), figures[f"{name}/x"]
    params = {path: weights_by_path(path, shape) for path, shape in meta["params"]}
    params = from_flax(traverse_util.unflatten_dict(params, sep="/"), network, x.shape[1:])
    check(meta["config"], network, params, x, figures, name)


@pytest.mark.parametrize(
    "group, name", [*DDPM_CASES, ("A_ncsn_jaxlike", "ncsnv2"), ("A_ncsn_jaxlike", "ncsn_repaired")]
)
def test_parameter_tree_is_the_official_one(group, name):
    """Every key path and shape, every PyTorch name in its place, and the way back."""
    published = reference.cases(f"F_jax_{group}")[name]
    network, state, x = case(group, name)
    params = from_torch(state, network, x.shape[1:])
    flat = traverse_util.flatten_dict(params, sep="/")
    assert {path: list(leaf.shape) for path, leaf in flat.items()} == dict(published["params"])
    for torch_name, path, _ in published["mapping"]:
        assert np.array_equal(np.sort(flat[path], axis=None), np.sort(state[torch_name], axis=None))
    back = to_torch(params, network, x.shape[1:])
    assert back.keys() == {torch_name for torch_name, _, _ in published["mapping"]}
    assert all(np.array_equal(back[entry], state[entry]) for entry in back)


def test_parameter_trees_of_large_networks_are_the_official_ones():
    large, configs = reference.description("F_jax_params_large"), reference.cases("A_large")
    names = [name for name in configs if configs[name]["config"]["model"]["name"] != "ncsnpp"]
    assert len(names) == 6
    for name in names:
        config = configs[name]["config"]
        size = config["data"]["image_size"]
        assert shapes_of(build(config), (size, size, 3)) == dict(large[name]["params"]), name


def test_names_of_a_refinenet_with_five_levels():
    meta = reference.cases("A_large")["ve/ncsnv2/bedroom"]
    state = {name: np.broadcast_to(np.float32(0), shape) for name, shape, _ in meta["state_dict"]}
    assert to_torch(from_torch(state, ncsnv2_128(), (32, 32, 3)), ncsnv2_128(), (32, 32, 3)).keys() == state.keys() - {
        "sigmas"
    }


def test_pytorch_ncsnv2_of_another_width_is_refused():
    """Its third RefineBlock has nf features, that of the JAX code 2 nf."""
    network, state, x = case("A_reduced", "ncsnv2")
    with pytest.raises(UserError, match=r"refine3.* gives shape .* of the configured network has"):
        from_torch(state, network, x.shape[1:])


def test_names_of_a_refinenet_with_six_levels():
    """Their order is 1, 2, 3, 31, 4, 5: res31 widens nothing, refine31 gets the features of res31 and refine2."""
    network = ncsnv2_256(nf=4)
    zeros = {path: np.zeros(shape, np.float32) for path, shape in shapes_of(network, (16, 16, 3)).items()}
    state = to_torch(traverse_util.unflatten_dict(zeros, sep="/"), network, (16, 16, 3))
    assert state["res31.0.conv2.conv.weight"].shape == (8, 8, 3, 3)
    assert state["res4.0.conv2.weight"].shape == (16, 8, 3, 3)
    assert state["refine2.msf.convs.0.weight"].shape == (8, 16, 3, 3)
    assert state["refine31.msf.convs.1.weight"].shape == (8, 8, 3, 3)
    assert state["refine4.msf.convs.0.weight"].shape == (4, 8, 3, 3)
    assert "refine5.output_convs.3_2_conv.weight" in state
    assert from_torch(state, network, (16, 16, 3)).keys() == {path.split("/")[0] for path in zeros}


# -- The classifier --


def classifier_case(name: str):
    meta = reference.cases("W_classifier")[name]
    classifier = WideResnet(meta["blocks_per_group"], meta["channel_multiplier"], meta["num_outputs"])
    params = {path: weights_by_path(path, shape, 16.0) for path, shape in meta["params"]}
    params = from_flax(traverse_util.unflatten_dict(params, sep="/"), classifier, (32, 32, 3))
    figures = {key: reference.arrays("W_classifier")[f"{name}/{key}"] for key in meta["arrays"]}
    return classifier, params, figures


CLASSIFIERS = ["reduced", *(["official"] if SLOW else [])]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_equals_published(name):
    classifier, params, figures = classifier_case(name)
    for q in (0, 1):
        logits = jax.jit(classifier.apply)({"params": params}, figures[f"x{q}"], figures[f"sigma{q}"])
        assert logits.dtype == jnp.float32
        error = np.abs(logits - figures[f"logits{q}_f64"]).max()
        print(f"classifier {name} float32 logits {error:.1e}")
        assert error < 5e-5


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_and_its_gradient_equal_published_in_float64(name, x64):
    classifier, params, figures = classifier_case(name)
    classifier = classifier.clone(dtype="float64")

    @jax.jit
    def log_probability_and_gradient(x, sigma, label):
        def total(x):
            logits = classifier.apply({"params": params}, x, sigma)
            return (jax.nn.log_softmax(logits) * jax.nn.one_hot(label, 10, dtype=x.dtype)).sum(), logits

        return jax.value_and_grad(total, has_aux=True)(x)

    for q in (0, 1):
        x, sigma = (figures[f"{what}{q}"].astype(np.float64) for what in ("x", "sigma"))
        (value, logits), gradient = log_probability_and_gradient(x, sigma, figures[f"labels{q}"])
        expected = figures[f"grad{q}_f64"]
        errors = (
            np.abs(logits - figures[f"logits{q}_f64"]).max(),
            np.abs(gradient - expected).max() / np.abs(expected).max(),
        )
        print(f"classifier {name} float64 logits {errors[0]:.1e}, gradient {errors[1]:.1e}")
        assert errors[0] < 1e-10
        assert errors[1] < 1e-9
        np.testing.assert_allclose(value, figures[f"logp_label{q}_f64"].sum(), rtol=1e-10)


def test_gradient_at_an_image_of_one_colour_is_finite():
    standardized = WideResnet(std=(1.0, 1.0, 1.0))._standardized
    x = jnp.ones((1, 2, 2, 3)) * jnp.asarray(WideResnet().mean).reshape(1, 1, 1, 3)
    assert np.isfinite(jax.grad(lambda x: standardized(x)[0, 0, 0, 0])(x)).all()


# -- What needs no reference --

LEVELS = {"nf": 4, "widths": (1, 2, 2), "dilations": (1, 1, 2), "refine_widths": (2, 1, 1)}  # two resolutions
TINY = {
    "ddpm": DDPM(nf=32, ch_mult=[1, 2], num_res_blocks=0, attn_resolutions=[4], dropout=0.5),
    "ncsnv2": NCSNv2(**LEVELS),
    "ncsn": NCSN(**LEVELS),
}


def tiny_params(network, image_shape):
    params = {path: weights_by_path(path, shape) for path, shape in shapes_of(network, image_shape).items()}
    return {"params": traverse_util.unflatten_dict(params, sep="/")}


@pytest.mark.parametrize("name, dtype", [("ddpm", "bfloat16"), ("ncsn", "bfloat16"), ("ncsnv2", "float64")])
def test_types(name, dtype, x64):
    """Parameters are float32, the output has the type of x, also in both modes of differentiation. Nothing runs."""
    network = TINY[name].clone(dtype=dtype)
    x = jax.ShapeDtypeStruct((2, 8, 16, 1), jnp.float64 if dtype == "float64" else jnp.float32)
    label = jax.ShapeDtypeStruct((2,), x.dtype)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    params = jax.eval_shape(network.init, jax.random.key(0), x, label)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}

    def derivatives(params, x, label, keys):
        out, pull = jax.vjp(lambda x: network.apply(params, x, label, dropout_keys=keys), x)
        return out, pull(out)[0], jax.jvp(lambda x: network.apply(params, x, label, None, keys), (x,), (x,))[1]

    for result in jax.eval_shape(derivatives, params, x, label, keys):
        assert (result.shape, result.dtype) == (x.shape, x.dtype)


def test_forward_and_reverse_mode_of_a_refinenet_agree(x64):
    network = NCSNv2(nf=4, widths=(1,), dilations=(1,), refine_widths=(1,), dtype="float64")
    x, direction, cotangent = (
        jnp.asarray(reference.normal(f"tiny/{what}", (2, 8, 8, 3)), jnp.float64) for what in ("x", "dx", "cotangent")
    )
    params = tiny_params(network, (8, 8, 3))

    @jax.jit
    def derivatives(x):
        function = lambda x: network.apply(params, x, jnp.asarray([3.0, 231.0]))
        return jax.jvp(function, (x,), (direction,))[1], jax.vjp(function, x)[1](cotangent)[0]

    tangent, pulled = derivatives(x)
    np.testing.assert_allclose((pulled * direction).sum(), (tangent * cotangent).sum(), rtol=1e-10)


def initial(module, *inputs) -> dict[str, np.ndarray]:
    key = jax.random.key(0, impl="rbg")  # compiles several times faster
    params = jax.jit(lambda key: module.init(key, *inputs)["params"])(key)
    return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}


def spread(leaf: np.ndarray, unit: float) -> tuple[float, float]:
    """Largest magnitude and standard deviation, in units of `unit`."""
    return np.abs(leaf).max() / unit, leaf.std() / unit


X, LABEL = jnp.zeros((1, 8, 8, 32)), jnp.ones(1)


def test_published_initialization_of_refinenets():
    """PyTorch's: uniform within 1 / sqrt(fan in). Pooled convolutions have Flax's: normal, cut off, biases zero."""
    shared = {"act": jax.nn.elu, "num_scales": 20}
    block = initial(ConditionalResidualBlock(64, **shared, down=True), X, LABEL.astype(jnp.int32))
    for name in ("Conv_0/kernel", "Conv_0/bias"):
        largest, deviation = spread(block[name], (9 * 32) ** -0.5)
        assert 0.8 < largest <= 1
        assert abs(deviation - 3**-0.5) < (0.01 if name.endswith("kernel") else 0.15)
    for name, fan_in in (("ConvMeanPool_0/Conv_0", 9 * 32), ("ConvMeanPool_1/Conv_0", 32)):
        assert 0.95 < spread(block[f"{name}/kernel"], fan_in**-0.5)[1] < 1.05
        assert not block[f"{name}/bias"].any()
    scales, shifts = np.split(block["ConditionalInstanceNorm2dPlus_1/Embed_0/embedding"], [64], axis=1)
    assert abs(scales.mean() - 1) < 3e-3 and abs(scales.std() - 0.02) < 2e-3
    assert shifts.shape == (20, 32) and not shifts.any()

    norm = initial(InstanceNorm2dPlus(), jnp.zeros((1, 2, 2, 256)), None)
    assert not norm["beta"].any()
    for name in ("alpha", "gamma"):
        assert abs(norm[name].mean() - 1) < 5e-3 and abs(norm[name].std() - 0.02) < 4e-3


def test_published_initialization_of_the_classifier():
    for path, leaf in initial(WideResnet(1, 2), X[..., :3], LABEL).items():
        name = path.rsplit("/", 1)[-1]
        if name == "bias":
            assert not leaf.any()
        elif name == "scale":
            assert (leaf == 1).all()
        elif "conv" in path:
            assert 0.9 < spread(leaf, (2 / (9 * leaf.shape[-1])) ** 0.5)[1] < 1.1
        elif path == "Dense_2/kernel":
            largest, deviation = spread(leaf, 10**-0.5)
            assert largest <= 1 and abs(deviation - 3**-0.5) < 0.03
        elif name == "kernel":
            assert 0.95 < spread(leaf, leaf.shape[0] ** -0.5)[1] < 1.05
        else:
            assert 13 < leaf.std() < 19


ONE_LEVEL = DDPM(nf=32, ch_mult=(1,), num_res_blocks=0, attn_resolutions=(4,), dropout=0.5)


def test_published_initialization_of_ddpm():
    """Zero: the last convolution, of the network and of each branch, and the last map of each attention."""
    for path, leaf in initial(ONE_LEVEL, X[..., :3], LABEL).items():
        if path.endswith(("bias", "/b")):
            assert not leaf.any()
        elif path.endswith("scale"):
            assert (leaf == 1).all()
        else:
            zero = path.startswith("Conv_1/") or ("Block" in path and ("/Conv_1/" in path or "/NIN_3/" in path))
            scale = 1e-10 if zero else 0.1 if "/NIN_" in path else 1.0
            fan_average = np.prod(leaf.shape[:-2], initial=1) * (leaf.shape[-1] + leaf.shape[-2]) / 2
            assert 0.9 < spread(leaf, np.sqrt(3 * scale / fan_average))[0] <= 1


def test_dropout_of_ddpm():
    x, label = jnp.ones((2, 4, 4, 1)), jnp.ones(2)
    params = tiny_params(ONE_LEVEL, (4, 4, 1))
    apply = jax.jit(lambda keys: ONE_LEVEL.apply(params, x, label, dropout_keys=keys))
    outs = [apply(jax.random.split(jax.random.key(seed), 2)) for seed in (0, 0, 1)]
    assert np.array_equal(outs[0], outs[1])
    assert np.abs(outs[0] - outs[2]).max() > 1e-3


@pytest.mark.parametrize("make", [DDPM, NCSN, NCSNv2])
def test_bad_options_and_inputs_are_refused(make):
    for options, told in (({"nonlinearity": "gelu"}, "elu, relu, lrelu, swish"), ({"dtype": "int8"}, "bfloat16")):
        with pytest.raises(UserError, match=told):
            make(**options)
    x, label = jnp.zeros((1, 9, 8, 3)), jnp.ones(1)
    with pytest.raises(UserError, match="multiples of"):
        jax.eval_shape(make().init, jax.random.key(0), x, label)
    with pytest.raises(UserError, match="no classes"):
        jax.eval_shape(make().init, jax.random.key(0), x[:, :8], label, jnp.zeros(1, jnp.int32))
    with pytest.raises(UserError, match="multiples of 32"):
        jax.eval_shape(DDPM(nf=48).init, jax.random.key(0), x[:, :8], label)


def test_trees_of_another_network_are_refused():
    network = TINY["ncsn"]
    zeros = traverse_util.flatten_dict(jax.tree.map(np.zeros_like, tiny_params(network, (8, 8, 3))["params"]))
    first = next(iter(zeros))
    for change, told in (
        ({first: np.zeros(3, np.float32)}, "shape"),
        ({first: zeros[first].astype(np.int32)}, "floating"),
        ({("extra",): np.zeros(3, np.float32)}, "no place for 1 entries, such as extra"),
    ):
        with pytest.raises(UserError, match=told):
            from_flax(traverse_util.unflatten_dict(zeros | change), network, (8, 8, 3))
    del zeros[first]
    with pytest.raises(UserError, match=f"has no {'/'.join(first)}"):
        from_flax(traverse_util.unflatten_dict(zeros), network, (8, 8, 3))


# -- Files --

FILES = ("torch_checkpoint_7.pth", "jax_checkpoint_7", "jax_checkpoint_7_flat_groupnorm")


def checkpoint_case():
    """The network of the checkpoint files, and the figures that belong to it."""
    return build(reference.description("ckpt/expected")["config"]), reference.arrays("ckpt/expected")


@functools.cache
def imported(file: str) -> tuple[dict, dict]:
    """Model and averages of a checkpoint file."""
    network, _ = checkpoint_case()
    stored = read_checkpoint(reference.file(f"ckpt/{file}"))
    convert = {"torch": from_torch, "flax": from_flax}[stored.kind]
    assert stored.step == 7
    return tuple(convert(params, network, (8, 8, 3)) for params in (stored.model, stored.ema))


def test_all_files_hold_the_same_parameters():
    first, *others = (imported(file) for file in FILES)
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)
    network, figures = checkpoint_case()
    averages = to_torch(first[1], network, (8, 8, 3))
    stored = [name for name in averages if f"ema/{name}" in figures]
    assert len(stored) == len(averages) - 1  # the Fourier frequencies have no average
    assert all(np.array_equal(averages[name], figures[f"ema/{name}"]) for name in stored)


def test_networks_from_files_equal_published():
    network, figures = checkpoint_case()
    apply = jax.jit(official(reference.description("ckpt/expected")["config"], network))
    for params, which in zip(imported(FILES[0]), ("model", "ema"), strict=True):
        out = apply(params, reference.nhwc(figures["x"]), figures["labels"])
        expected = reference.nhwc(figures[f"out_{which}"])
        error = np.abs(out - expected).max() / np.abs(expected).max()
        print(f"checkpoint {which} {error:.1e}")
        assert error < 2e-5


def test_state_as_a_whole():
    """The training state of the JAX code stands for its averages."""
    network, _ = checkpoint_case()
    tree = serialization.msgpack_restore((reference.file(f"ckpt/{FILES[1]}")).read_bytes())
    jax.tree.map(np.testing.assert_array_equal, from_flax(tree, network, (8, 8, 3)), imported(FILES[1])[1])


def test_bare_trees_and_chunks(tmp_path):
    """Parameters without a training state; and arrays in chunks, as Flax writes those above 2^30 bytes."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    chunked = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 2, "1": 3},
        "chunks": {"0": array.ravel()[:4], "1": array.ravel()[4:]},
    }
    file = tmp_path / "params"
    file.write_bytes(serialization.msgpack_serialize({"Dense_0": {"kernel": array, "bias": chunked}}))
    kind, model, ema, step, *_ = read_checkpoint(file)
    assert (kind, ema, step) == ("flax", None, None)
    assert np.array_equal(model["Dense_0"]["kernel"], array)
    assert np.array_equal(model["Dense_0"]["bias"], array)


def archive(program: bytes, compression=zipfile.ZIP_STORED, **data: bytes) -> bytes:
    """A file as by torch.save: a pickle, and the bytes of its arrays."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as members:
        members.writestr("archive/data.pkl", program)
        for key, value in data.items():
            members.writestr(f"archive/data/{key}", value)
    return file.getvalue()


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def tensor_program(shape, strides, offset=0, size=4, kind="Float", key="a") -> bytes:
    """The pickle {"x": tensor}, opcode by opcode."""

    def number(n: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", n)

    def text(t: str) -> bytes:
        return b"X" + struct.pack("<I", len(t)) + t.encode()

    storage = (
        b"(" + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(key) + text("cpu") + number(size) + b"tQ"
    )
    numbers = b"".join(b"(" + b"".join(map(number, values)) + b"t" for values in (shape, strides))
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + numbers
    return b"\x80\x02}" + text("x") + tensor + b"\x89ccollections\nOrderedDict\n)RtRs."


FOUR = np.arange(4, dtype="<f4").tobytes()


def test_a_state_dict_alone(tmp_path):
    """Transposed and in the middle of its storage, as PyTorch may store a tensor."""
    file = tmp_path / "state.pth"
    file.write_bytes(archive(tensor_program((2, 1), (1, 2), offset=1), a=FOUR))
    kind, model, ema, step, *_ = read_checkpoint(file)
    assert (kind, ema, step) == ("torch", None, None)
    assert np.array_equal(model["x"], [[1.0], [2.0]])
    assert model["x"].dtype == np.float32


HOSTILE = {
    "a system call": archive(pickle.dumps({"x": Call(os.system, "touch should_not_exist")}, 2)),
    "a built-in": archive(pickle.dumps({"x": Call(eval, "1 + 1")}, 4)),
    "an import": archive(b"\x80\x02cantigravity\nfly\n."),
    "a call of something else": archive(b"\x80\x02]K\x01\x85R."),
    "an object": archive(pickle.dumps(Call(bytearray, b"x"), 2)),
    "attributes": archive(b"\x80\x02K\x01}b."),
    "more memory than there is": archive(b"\x80\x02\x8e" + struct.pack("<Q", 2**62) + b"x."),
    "a huge memo": archive(b"\x80\x02}r\xff\xff\xff\xff0."),
    "a key that takes forever to hash": archive(b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s."),
    "an endless list": archive(b"\x80\x02]q\x00h\x00a."),
    "an empty stack": archive(b"\x80\x02a."),
    "no end": archive(b"\x80\x02}"),
    "no pickle at all": archive(b""),
    "a list for a checkpoint": archive(b"\x80\x02]."),
    "compressed": archive(pickle.dumps({}, 2) + bytes(10**6), zipfile.ZIP_DEFLATED),
    "too many numbers": archive(tensor_program((5,), (1,)), a=FOUR),
    "beyond the end": archive(tensor_program((2,), (1,), offset=3), a=FOUR),
    "steps beyond the end": archive(tensor_program((2, 2), (3, 1)), a=FOUR),
    "backwards": archive(tensor_program((2,), (-1,), offset=1), a=FOUR),
    "endless repetition": archive(tensor_program((2**39,), (0,)), a=FOUR),
    "a long product": archive(tensor_program((2**39,) * 8, (0,) * 8), a=FOUR),
    "a lie about the storage": archive(tensor_program((8,), (1,), size=8), a=FOUR),
    "an unknown type": archive(tensor_program((4,), (1,), kind="Quantum"), a=FOUR),
    "no numbers": archive(tensor_program((4,), (1,))),
    "another archive": archive(tensor_program((4,), (1,), key="../a"), a=FOUR),
    "an old pickle": pickle.dumps({"model": {}}, 2),
    "a zip of something else": b"PK\x03\x04" + bytes(100),
    "nothing": b"",
    "text": b"checkpoint",
    "a long list": b"\x81\xa1a\xdd\xff\xff\xff\xff",
    "a long map": b"\xdf\xff\xff\xff\xff",
    "deep nesting": b"\x81\xa1a" * 3000 + b"\xc0",
    "an unknown extension": msgpack.packb({"a": msgpack.ExtType(7, b"x")}),
    "an array of objects": msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((1,), "O", bytes(8))))}),
    "an array that is longer than its bytes": msgpack.packb(
        {"a": msgpack.ExtType(1, msgpack.packb(((2**40,), "float32", bytes(8))))}
    ),
    "an array of negative size": msgpack.packb(
        {"a": msgpack.ExtType(1, msgpack.packb(((-1, -2), "float32", bytes(8))))}
    ),
    "an array that is none": msgpack.packb({"a": msgpack.ExtType(1, b"\xc0")}),
    "chunks that are none": msgpack.packb({"a": {"__msgpack_chunked_array__": True, "shape": 1, "chunks": 2}}),
    "a tree of text": msgpack.packb({"a": {"b": "c"}}),
    "a state without parameters": msgpack.packb({"params_ema": {}, "step": 1}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "checkpoint"
    file.write_bytes(HOSTILE[name])
    with pytest.raises(UserError) as caught:
        read_checkpoint(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_absent_files_are_refused(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            read_checkpoint(path)


@pytest.mark.parametrize("file", FILES[:2])
def test_damaged_files_are_refused(file, tmp_path):
    """Cut anywhere, or with a byte changed (which may go unnoticed in an array of the JAX code)."""
    data = (reference.file(f"ckpt/{file}")).read_bytes()
    damaged = tmp_path / file
    random = reference.rng(f"damage/{file}")
    for _ in range(20):
        damaged.write_bytes(data[: random.integers(len(data))])
        with pytest.raises(UserError):
            read_checkpoint(damaged)
    for _ in range(40):
        place = random.integers(min(len(data), 60_000))
        damaged.write_bytes(data[:place] + random.bytes(1) + data[place + 1 :])
        try:
            read_checkpoint(damaged)
        except UserError as error:
            assert "\n" not in str(error)


def test_averages_that_do_not_belong_are_refused(tmp_path):
    """A list of averages has no names; at least their number and shapes must fit."""
    file = reference.file(f"ckpt/{FILES[0]}")
    changed = tmp_path / "changed.pth"
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(changed, "w") as target:
        for member in source.infolist():
            content = source.read(member)
            if member.filename.endswith("data.pkl"):
                assert b"all_modules.0.W" in content
                content = content.replace(b"all_modules.0.W", b"all_modules.0.V")  # an ordinary parameter
            target.writestr(member.filename, content)
    with pytest.raises(UserError, match="averages of 156 parameters, but 157"):
        read_checkpoint(changed)


def test_the_configs_that_fit_a_file_are_found():
    """By every name and shape, which do not tell the SDE."""
    config = digits.get_config()
    diffusion = builder.diffusion_of(config)
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(diffusion.init, jax.random.key(0))
    )
    state = to_torch(params, builder.network_of(config), diffusion.space.shape)
    assert [path for path, _ in fitting_configs(functools.partial(convert, "torch"), state)] == [
        "configs/digits.py",
        "configs/digits_flow.py",
        "configs/digits_subvp.py",
        "configs/digits_ve.py",
    ]
