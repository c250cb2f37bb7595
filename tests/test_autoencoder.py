"""The autoencoders of latent diffusion: equal to the published ones, from both of their namings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from score_sde.errors import UserError
from score_sde.models import autoencoder
from score_sde.models.attention import LOGITS, attend, in_slices
from score_sde.models.names import LEAVES, shapes_of
from tests import reference
from tests.latent import compared, figures_of, nchw, renamed, state_of, tree_in

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CASES = reference.cases("L_autoencoder")


def ran(name: str, dtype: str, state=None) -> dict:
    """What the network of a case computes, by the names of the figures."""
    state = state_of("L_autoencoder", name) if state is None else state
    stored, noise_of = figures_of("L_autoencoder", name), jnp.dtype(dtype)
    network = autoencoder.of_state(state, dtype=dtype)
    params = tree_in(noise_of, autoencoder.from_published(state, network))
    run = lambda method: quick_jit(
        lambda x, **options: network.apply({"params": params}, x, method=method, **options), static_argnames="quantize"
    )
    encode, decode, quantized = run("encode"), run("decode"), run("quantized")
    given = lambda key: jnp.asarray(reference.nhwc(stored[key]), dtype)
    h = encode(given("x"))
    result = {"decoded_of_z": decode(given("z"))}
    if network.num_codes:
        entries, numbers = quantized(h)
        entries_of_z, numbers_of_z = quantized(given("z"))
        _, loss = autoencoder.codebook_loss(h, entries)
        return result | {
            "prequant": h,
            "quantized": entries,
            "indices": numbers,
            "loss": loss,
            "decoded_quantized": decode(h),
            "decoded_force_not_quantize": decode(h, quantize=False),
            "codebook_entry_of_z": entries_of_z,
            "indices_of_z": numbers_of_z,
        }
    mean, log_variance = autoencoder.gaussian(h)
    sample = mean + jnp.exp(log_variance / 2) * given("noise")
    return result | {
        "moments": h,
        "mode": mean,
        "sample": sample,
        "scaled": 0.18215 * sample,
        "kl": autoencoder.kl_divergence(h),
        "decoded_of_sample": decode(sample),
    }


def check(name: str, results: dict, suffix: str, tolerance: float) -> None:
    stored = figures_of("L_autoencoder", name)
    for key, result in results.items():
        if key.startswith("indices"):
            np.testing.assert_array_equal(result, stored[key])
        else:
            expected = stored[key + suffix] if key + suffix in stored else stored[key]
            compared(nchw(result) if np.ndim(result) == 4 else result, expected, tolerance, f"{name} {key}")


@pytest.mark.parametrize("name", CASES)
def test_equal_in_float64(name, x64):
    check(name, ran(name, "float64"), "_f64", 1e-12)


@pytest.mark.parametrize("name", ["kl_f4", "vq_f4"])
def test_equal_in_float32(name):
    check(name, ran(name, "float32"), "", 5e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "diffusers" in case])
def test_both_namings_give_the_same_parameters(name):
    state = state_of("L_autoencoder", name)
    network = autoencoder.of_state(state)
    theirs = renamed(state, CASES[name]["diffusers"]["mapping"])
    assert autoencoder.of_state(theirs) == network
    same = jax.tree.map(
        np.array_equal, autoencoder.from_published(theirs, network), autoencoder.from_published(state, network)
    )
    assert all(jax.tree.leaves(same))


def test_old_names_of_attention():
    state = state_of("L_autoencoder", "kl_f4")
    theirs = renamed(state, CASES["kl_f4"]["diffusers"]["mapping"])
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        theirs = {entry.replace(f".{new}.", f".{old}."): array for entry, array in theirs.items()}
    assert any("proj_attn" in entry for entry in theirs)
    network = autoencoder.of_state(theirs)
    same = jax.tree.map(
        np.array_equal, autoencoder.from_published(theirs, network), autoencoder.from_published(state, network)
    )
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", ["kl_f8", "vq_f4"])
def test_full_size(name):
    """The published models' names and shapes, in both namings, without their numbers."""
    case = reference.description("L_autoencoder")["full_size"][name]
    for entries in (case["state_dict"], case["diffusers_state_dict"]):
        # zeros that take no memory
        state = {entry: np.broadcast_to(np.float32(0), shape) for entry, shape, *_ in entries}
        params = autoencoder.from_published(state, autoencoder.of_state(state))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == case["n_params"]


@pytest.mark.parametrize("broken", ["missing", "more", "shape", "integers", "another family"])
def test_what_does_not_fit_is_said_in_one_line(broken):
    network = autoencoder.Autoencoder(nf=32, ch_mult=(1, 1), num_res_blocks=1)
    shapes = shapes_of(network, jax.ShapeDtypeStruct((1, 2, 2, 3), jnp.float32))
    layers = autoencoder.published_layers(network, diffusers=False)
    state = {}
    for path, shape in shapes.items():
        layer, _, leaf = path.rpartition("/")
        shape = (*shape[:-3:-1], *shape[:-2]) if leaf == "kernel" else shape
        state[f"{layers[layer]}.{LEAVES.get(leaf, leaf)}"] = np.zeros(shape, np.float16)
    assert autoencoder.of_state(state) == network
    params = autoencoder.from_published(state, network)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float16)}  # no copy in another type
    match broken:
        case "missing":
            del state["decoder.up.1.block.1.conv1.bias"]
        case "more":
            state["decoder.up.1.attn.0.q.bias"] = np.zeros(32, np.float32)
        case "shape":
            state["quant_conv.bias"] = np.zeros(4, np.float32)
        case "integers":
            state["quant_conv.bias"] = np.zeros(8, np.int32)
        case "another family":
            state = {"time_embed.0.weight": np.zeros((4, 4), np.float32)}
    with pytest.raises(UserError) as refused:
        autoencoder.from_published(state, autoencoder.of_state(state))
    assert "\n" not in str(refused.value)


def test_slices_of_attention_are_exact_and_small(x64):
    """The slices' result and gradient are those of all at once, with part of the memory."""
    rng = np.random.default_rng(0)
    some = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    for groups, queries, keys in ((3, 2500, 7000), (5, 1700, 1500), (3, 9, 4)):
        query, key, value = some(groups, queries, 4), some(groups, keys, 4), some(groups, keys, 4)
        assert jnp.abs(in_slices(query, key, value) - attend(query, key, value)).max() < 1e-13
    query, key, value = some(5, 1700, 4), some(5, 1500, 4), some(5, 1500, 4)
    gradient = lambda of: jax.jit(jax.grad(lambda query: (of(query, key, value) ** 2).sum()))
    assert jnp.abs(gradient(in_slices)(query) - gradient(attend)(query)).max() < 1e-12
    tangent = lambda of: jax.jvp(lambda query: of(query, key, value), (query,), (key[:, :1] + 0 * query,))[1]
    assert jnp.abs(tangent(in_slices) - tangent(attend)).max() < 1e-12

    # 64 x 64 latents, two images of eight heads: all logits at once are a GiB
    x = jax.ShapeDtypeStruct((16, 4096, 40), jnp.float32)
    assert jax.jit(in_slices).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes < 3 * 4 * LOGITS
