"""Attention of many heads in slices of bounded memory, for networks on large latents.

Self-attention over 64 x 64 latents has 4096^2 logits for each head of each image: 64 MB in float32, and 1 GB for the
two images of a guided step with 8 heads. Slices hold no more than LOGITS of them at a time.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from score_sde.models.layers import attend

LOGITS = 2**24  # at a time; 64 MB in float32, which is one head of one image at 64 x 64


def in_slices(query: Array, key: Array, value: Array) -> Array:
    """`attend`, with at most LOGITS logits at a time: as many of the G at once as fit, of one G as many queries.

    A slice's logits are computed again in the backward pass.
    """
    groups, queries, _ = query.shape
    keys = key.shape[1]
    if groups * queries * keys <= LOGITS:
        return attend(query, key, value)
    rows = min(queries, max(1, LOGITS // keys))
    parts = math.ceil(queries / rows)
    rows = math.ceil(queries / parts)  # even slices: less to fill up
    query = jnp.pad(query, ((0, 0), (0, parts * rows - queries), (0, 0))).reshape(groups, parts, rows, -1)
    at_once = jax.checkpoint(lambda query, key, value: attend(query[None], key[None], value[None])[0])

    def of_group(arguments):
        query, key, value = arguments
        if parts == 1:
            return at_once(query[0], key, value)[None]
        return jax.lax.map(lambda query: at_once(query, key, value), query)

    together = max(1, LOGITS // (rows * keys)) if parts == 1 else None
    h = jax.lax.map(of_group, (query, key, value), batch_size=together)
    return h.reshape(groups, parts * rows, -1)[:, :queries]


def multihead(query: Array, key: Array, value: Array, heads: int) -> Array:
    """softmax(query key^T / sqrt(C / heads)) value by heads, query (B, N, C), key and value (B, M, C) -> (B, N, C).

    The heads follow each other in the channels.
    """
    batch, queries, channels = query.shape
    width = channels // heads
    split = lambda x: x.reshape(batch, -1, heads, width).swapaxes(1, 2).reshape(batch * heads, -1, width)
    h = in_slices(split(query) * width**-0.5, split(key), split(value))
    return h.reshape(batch, heads, queries, width).swapaxes(1, 2).reshape(batch, queries, channels)
