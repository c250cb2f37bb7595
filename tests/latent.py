"""What tests of latent-space networks share: the reference figures' weights, by the networks' own names."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from score_sde import latent_models, tokenizer
from score_sde.models.autoencoder import Autoencoder
from score_sde.models.clip_text import CLIPText
from score_sde.models.unet import UNet
from tests import reference

TINY = reference.FOLDERS[0] / "ckpt" / "sd_tiny"
needs_tiny = pytest.mark.skipif(not TINY.is_dir(), reason="the tiny published model is not here; set REFERENCE_DIR")


def synthetic(name: str, shape) -> np.ndarray:
    """Reference README_L 2: the weights that the figures belong to, by the published name without a file's prefix."""
    last = name.split(".")[-1]
    if last == "position_ids":
        return np.arange(shape[-1], dtype=np.int64)[None]
    value = reference.normal(name, shape)
    if name.endswith(("embedding.weight", "label_emb.weight")):
        return value
    if len(shape) >= 2:
        return value * np.float32(1 / np.sqrt(np.prod(shape[1:])))
    return np.float32(last == "weight") + np.float32(0.1) * value


def state_of(group: str, name: str) -> dict:
    """The state_dict of a case."""
    return {
        entry: synthetic(entry, shape) for entry, shape, _ in reference.description(group)["cases"][name]["state_dict"]
    }


def renamed(state: dict, mapping: list) -> dict:
    """A state_dict under the names, and with the shapes, of rows [from, to, shape, shape]."""
    return {theirs: state[ours].reshape(shape) for ours, theirs, _, shape in mapping}


def figures_of(group: str, name: str) -> dict:
    stored = reference.arrays(group)
    return {key: stored[f"{name}/{key}"] for key in reference.description(group)["cases"][name]["arrays"]}


def tree_in(dtype, params: dict) -> dict:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def nchw(array) -> np.ndarray:
    return np.moveaxis(np.asarray(array), -1, -3)


def compared(out, expected, tolerance: float, what: str) -> None:
    """Asserts the largest difference over the largest value expected to be less than the tolerance."""
    expected = np.asarray(expected)
    error = np.abs(np.asarray(out, np.float64) - expected).max() / np.abs(expected).max()
    print(f"{what} {error:.1e}")  # shown by pytest -s
    assert np.shape(out) == expected.shape
    assert error < tolerance


# -- a latent model of a few thousand parameters, all parts made here --

WORDS = ["a", "cat", "dog", "the", "sea"]


def mini(folder: pathlib.Path, *, classes: int = 0, seed: int = 0) -> latent_models.LatentModel:
    """A model of prompts, or of so many classes, with random parameters; its tokenizer is written to the folder."""
    rng = np.random.default_rng(seed)
    unet = UNet(
        **dict(nf=4, ch_mult=(1,), num_res_blocks=1, attn_levels=(0,), num_heads=2, head_channels=0, groups=2),
        **dict(scale_shift=False, resblock_updown=False, context_dim=8, out_channels=2),
    )
    first = Autoencoder(nf=4, ch_mult=(1, 1), num_res_blocks=1, z_channels=2, embed_dim=2, groups=2)
    text = None if classes else CLIPText(vocab_size=tokens_of(folder), length=6, width=8, hidden=8, layers=1, heads=2)

    def part(network, *inputs):
        shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
        draw = lambda leaf: rng.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        return latent_models.Part(network, jax.tree.map(lambda leaf: np.float32(draw(leaf)), shapes))

    return latent_models.LatentModel(
        unet=part(unet, jnp.zeros((1, 8, 8, 2)), jnp.zeros(1)),
        autoencoder=part(first, jnp.zeros((1, 16, 16, 3))),
        text=None if classes else part(text, jnp.zeros((1, 6), jnp.int32)),
        classes=np.float32(rng.normal(size=(classes + 1, 8))) if classes else None,
        scale=0.5,
        sde=latent_models._schedule(0.00085, 0.012, 1000),
        output="eps",
        size=8,
        tokenizer=None if classes else folder,
    )


def tokens_of(folder: pathlib.Path) -> int:
    """Write a tokenizer that knows WORDS to the folder; how many tokens it has."""
    letters = sorted({letter for word in WORDS for letter in word})
    merges, vocabulary = [], [*letters, *(f"{letter}</w>" for letter in letters)]
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = ["".join(parts[:2]), *parts[2:]]
            vocabulary.append(parts[0])
    vocabulary = [*dict.fromkeys(vocabulary), tokenizer.START, tokenizer.END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version", *dict.fromkeys(merges)]))
    return len(vocabulary)
