"""The text encoder of CLIP (Radford et al. 2021), whose hidden states Stable Diffusion attends to.

Its prompts become numbers in score_sde/tokenizer.py. `dtype` is the computation type; parameters are float32 where they
are initialized here, and may have any floating-point type.
"""

import re
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from score_sde.errors import UserError
from score_sde.models.attention import attend
from score_sde.models.layers import DTYPES, require
from score_sde.models.names import parameters, published, shapes_of
from score_sde.models.transformer import LayerNorm

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's CLIP: Stable Diffusion 1
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # OpenCLIP: Stable Diffusion 2
}


class Layer(nn.Module):
    """Causal self-attention, then two linear maps, each behind a normalization and with a residual: (B, L, D)."""

    hidden: int
    heads: int
    activation: str
    dtype: str

    @nn.compact
    def __call__(self, h: Array) -> Array:
        batch, length, width = h.shape
        dense = lambda features, name: nn.Dense(features, dtype=jnp.dtype(self.dtype), name=name)
        norm = lambda name: LayerNorm(self.dtype, name=name)
        split = lambda x: (
            x.reshape(batch, length, self.heads, -1).swapaxes(1, 2).reshape(-1, length, width // self.heads)
        )
        x = norm("norm_0")(h)
        query, key, value = (split(dense(width, name)(x)) for name in ("query", "key", "value"))
        x = attend(query * query.shape[-1] ** -0.5, key, value, causal=True)
        x = x.reshape(batch, self.heads, length, -1).swapaxes(1, 2).reshape(batch, length, width)
        h = h + dense(width, "out")(x)
        x = ACTIVATIONS[self.activation](dense(self.hidden, "linear_0")(norm("norm_1")(h)))
        return h + dense(width, "linear_1")(x)


class CLIPText(nn.Module):
    """Hidden states (B, L, width) of tokens (B, L), after the final normalization; the defaults are ViT-L/14's.

    Padding is attended to like all else, as published. The states behind the last layer but one, which Stable
    Diffusion 2 takes, are those of a network with one layer less.

    length      the most tokens: all sequences are filled up to it
    hidden      features between the two linear maps of a layer
    activation  "quick_gelu" or "gelu", the exact one
    """

    vocab_size: int = 49408
    length: int = 77
    width: int = 768
    hidden: int = 3072
    layers: int = 12
    heads: int = 12
    activation: str = "quick_gelu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        require(self, dtype=DTYPES, activation=list(ACTIVATIONS))
        if self.width % self.heads:
            raise UserError(f"a text encoder of width {self.width} cannot have {self.heads} heads")
        super().__post_init__()

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        if tokens.shape[1] > self.length:
            raise UserError(f"{tokens.shape[1]} tokens are more than the text encoder's {self.length}")
        embed = lambda count, name: nn.Embed(count, self.width, dtype=jnp.dtype(self.dtype), name=name)
        h = embed(self.vocab_size, "tokens")(tokens)
        h = h + embed(self.length, "positions")(jnp.arange(tokens.shape[1]))[None]
        for i in range(self.layers):
            h = Layer(self.hidden, self.heads, self.activation, self.dtype, name=f"layer_{i}")(h)
        return LayerNorm(self.dtype, name="norm")(h)


# -- published names --

TOP = {
    "tokens": "text_model.embeddings.token_embedding",
    "positions": "text_model.embeddings.position_embedding",
    "norm": "text_model.final_layer_norm",
}
LAYER = {
    "norm_0": "layer_norm1",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "norm_1": "layer_norm2",
    "linear_0": "mlp.fc1",
    "linear_1": "mlp.fc2",
}
# OpenCLIP's names, in the single files of Stable Diffusion 2: transformers' names, as above. Its attn.in_proj is three.
OPENCLIP_TOP = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
OPENCLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
UNUSED = ("text_model.embeddings.position_ids", "text_projection.weight", "text_projection", "logit_scale", "attn_mask")


def from_published(state: Mapping[str, np.ndarray], network: CLIPText) -> dict:
    """The parameter tree of `network` from a state_dict of transformers' CLIPTextModel, or of OpenCLIP's text part.

    Layers beyond those of `network` are left out. UserError as of names.parameters.
    """
    state = transformers_names(state)
    layers = dict(TOP)
    for i in range(network.layers):
        layers |= {f"layer_{i}/{ours}": f"text_model.encoder.layers.{i}.{theirs}" for ours, theirs in LAYER.items()}
    beyond = [name for name in state if (number := layer_of(name)) is not None and number >= network.layers]
    shapes = shapes_of(network, jax.ShapeDtypeStruct((1, network.length), jnp.int32))
    return parameters(state, published(layers, shapes), shapes, unused=[*UNUSED, *beyond])


def transformers_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state_dict under the names above; OpenCLIP has others, transformers 5 writes them without `text_model.`."""
    if "positional_embedding" in state:
        return from_openclip(state)
    prefix = "text_model." if "embeddings.token_embedding.weight" in state else ""
    return {prefix + name: array for name, array in state.items()}


def from_openclip(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state_dict of OpenCLIP's text part under transformers' names; its queries, keys and values are rows of one."""
    renamed = {}
    for name, array in state.items():
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)([._])(weight|bias)", name)
        if match is None:
            renamed[OPENCLIP_TOP.get(name, name)] = array
            continue
        number, layer, _, leaf = match.groups()
        prefix = f"text_model.encoder.layers.{number}."
        if layer == "attn.in_proj" and len(array) % 3 == 0:
            for part, rows in zip("qkv", np.split(array, 3), strict=True):
                renamed[f"{prefix}self_attn.{part}_proj.{leaf}"] = rows
        else:
            renamed[f"{prefix}{OPENCLIP_LAYER.get(layer, layer)}.{leaf}"] = array
    return renamed


def layer_of(name: str) -> int | None:
    """The number of the layer in a transformers' name; None outside of all layers."""
    match = re.match(r"text_model\.encoder\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def of_state(state: Mapping[str, np.ndarray], **changes) -> CLIPText:
    """The network that a published state_dict belongs to; `changes` are further arguments.

    OpenCLIP's is used without its last layer, and with "gelu". Heads have 64 channels in all that are published; others
    are to be given.
    """
    openclip = "positional_embedding" in state
    names = transformers_names(state)
    try:
        vocab_size, width = names["text_model.embeddings.token_embedding.weight"].shape
        length = len(names["text_model.embeddings.position_embedding.weight"])
        hidden = len(names["text_model.encoder.layers.0.mlp.fc1.bias"])
    except (KeyError, ValueError) as error:
        raise UserError(f"this is no text encoder of CLIP: {error}") from None
    layers = 1 + max(number for name in names if (number := layer_of(name)) is not None)
    arguments = dict(
        vocab_size=vocab_size,
        length=length,
        width=width,
        hidden=hidden,
        layers=layers - openclip,
        heads=max(1, width // 64),
        activation="gelu" if openclip else "quick_gelu",
    )
    return CLIPText(**arguments | changes)
