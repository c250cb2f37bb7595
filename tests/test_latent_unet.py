"""The U-Nets of latent diffusion and Stable Diffusion: equal to the published ones, from both of their namings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from score_sde.errors import UserError
from score_sde.models import published_latents as published
from tests import reference
from tests.latent import compared, figures_of, nchw, renamed, state_of, tree_in

CASES = reference.cases("L_unet")
BOTH = [name for name, case in CASES.items() if "diffusers" in case]


def order_of(name: str) -> str:
    return "new" if CASES[name]["constructor"].get("use_new_attention_order") else "legacy"


def ran(name: str, dtype: str) -> list:
    """The outputs of a case for both its inputs."""
    network = published.of_compvis(CASES[name]["constructor"], dtype=dtype)
    params = tree_in(jnp.dtype(dtype), published.from_published(state_of("L_unet", name), network, order_of(name)))
    stored = figures_of("L_unet", name)
    run, outputs = jax.jit(network.apply), []
    for q in (0, 1):
        x, label = (jnp.asarray(array, dtype) for array in (reference.nhwc(stored[f"x{q}"]), stored[f"t{q}"]))
        y = stored.get(f"context{q}", stored.get(f"y{q}"))
        y = y.astype(dtype if y.ndim == 3 else np.int32) if y is not None else None
        outputs.append(nchw(run({"params": params}, x, label, y)))
    return outputs


@pytest.mark.parametrize("name", CASES)
def test_equal_in_float64(name, x64):
    stored = figures_of("L_unet", name)
    for q, out in enumerate(ran(name, "float64")):
        compared(out, stored[f"out{q}_f64"], 1e-12, name)


@pytest.mark.parametrize("name", ["sd_heads2", "sd2_linear_headch16", "bedroom_like_headch16"])
def test_equal_in_float32(name):
    stored = figures_of("L_unet", name)
    for q, out in enumerate(ran(name, "float32")):
        compared(out, stored[f"out{q}"], 5e-6, name)


def split(state: dict, rows: list, order: str) -> dict:
    """A state_dict of latent-diffusion in diffusers' names, whose attention without context has three layers."""
    theirs = renamed(state, [row for row in rows if row[3] != "split"])
    for ours, name, *_ in (row for row in rows if row[3] == "split"):
        array, (stage, leaf) = state[ours], name.rsplit(".", 1)
        if stage.endswith("qkv"):
            channels = len(array) // 3
            parts = array[published.ORDERS[order](channels, channels // 16)].reshape(3, channels, *array.shape[1:])
            for part, rows_of in zip(("to_q", "to_k", "to_v"), parts, strict=True):
                theirs[f"{stage[:-3]}{part}.{leaf}"] = rows_of[..., 0] if leaf == "weight" else rows_of
        else:
            stage = stage.replace(".proj_out", ".to_out.0").replace(".norm", ".group_norm")
            theirs[f"{stage}.{leaf}"] = array[..., 0] if array.ndim == 3 else array
    return theirs


@pytest.mark.parametrize("name", BOTH)
def test_both_namings_give_the_same_network_and_parameters(name):
    case, state = CASES[name], state_of("L_unet", name)
    diffusers = case["diffusers"]
    network = published.of_compvis(case["constructor"])
    described = published.of_diffusers(diffusers["constructor"] | {"_class_name": diffusers["cls"]})
    assert described.stages() == network.stages()
    theirs = split(state, diffusers["mapping"], order_of(name))
    assert {entry: list(array.shape) for entry, array in theirs.items()} == dict(diffusers["state_dict"])
    same = jax.tree.map(
        np.array_equal,
        published.from_published(theirs, described),
        published.from_published(state, network, order_of(name)),
    )
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", ["sd_1.4", "sd_2.1", "ldm_lsun_bedroom"])
def test_full_size(name):
    """The published models' names and shapes, in both namings, without their numbers."""
    case = reference.description("L_unet")["full_size"][name]
    empty = lambda entries: {entry: np.broadcast_to(np.float16(0), shape) for entry, shape, *_ in entries}
    state = empty(case["state_dict"])
    guessed = published.of_compvis(published.description(state))
    assert guessed == published.of_compvis(case["constructor"])
    config = case["diffusers_constructor"] | {"_class_name": case["diffusers_class"]}
    described = published.of_diffusers(config)
    assert described.stages() == guessed.stages()
    leaves = jax.tree.leaves(published.from_published(state, guessed))
    assert sum(leaf.size for leaf in leaves) == case["n_params"]
    if name != "ldm_lsun_bedroom":  # whose three layers would be joined in memory
        assert len(jax.tree.leaves(published.from_published(empty(case["diffusers_state_dict"]), described))) == len(
            leaves
        )


def test_a_context_that_does_not_fit():
    network = published.of_compvis(
        dict(model_channels=32, num_res_blocks=1, channel_mult=[1], attention_resolutions=[1], out_channels=4)
        | dict(num_heads=1, use_spatial_transformer=True, context_dim=8)
    )
    x, label = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1)
    variables = jax.eval_shape(network.init, jax.random.key(0), x, label)
    for y in (None, jnp.zeros((1, 3, 9)), jnp.zeros((1,), jnp.int32)):
        with pytest.raises(UserError, match="needs a context"):
            jax.eval_shape(network.apply, variables, x, label, y)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"_class_name": "UNet2DConditionModel"},
        {"_class_name": "UNet2DConditionModel", "act_fn": "gelu"},
        {
            "_class_name": "UNet2DConditionModel",
            "block_out_channels": [32, 64],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "layers_per_block": 1,
            "attention_head_dim": [2, 2, 3],
        },
        {
            "_class_name": "UNet2DModel",
            "block_out_channels": [32],
            "down_block_types": ["SkipDownBlock2D"],
            "layers_per_block": 1,
        },
    ],
)
def test_descriptions_that_do_not_fit(config):
    with pytest.raises(UserError) as refused:
        published.of_diffusers(config)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError):
        published.of_compvis(config)
    with pytest.raises(UserError, match="no U-Net of latent diffusion"):
        published.description({"encoder.conv_in.weight": np.zeros(3)})
