"""The model: a small llama, written so that its weights go into a GGUF as they are.

Rotary embedding turns neighbouring pairs (2i, 2i + 1), which is how ggml's "normal" rope does it: no permutation of
q and k is needed at export. Layers are stacked along a first axis and walked by a scan.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Shape(NamedTuple):
    """Sizes of the model; every row is a multiple of 32, so that any quantisation of ggml fits."""
    layers: int = 8
    width: int = 192
    hidden: int = 448
    heads: int = 6
    kv_heads: int = 2
    pieces: int = 2048
    context: int = 512

    @property
    def head_width(self):
        return self.width // self.heads


RMS_EPSILON = 1e-5
ROPE_BASE = 10000.0


def new_weights(shape, seed):
    """Small random weights; the two matrices that write to the residual stream start smaller the deeper the model."""
    random = np.random.default_rng(seed)
    n, w, h = shape.layers, shape.width, shape.hidden
    kv = shape.kv_heads * shape.head_width

    def matrix(*size, scale=1.0):
        return (random.standard_normal(size) * scale / math.sqrt(size[-1])).astype(np.float32)

    deep = 1.0 / math.sqrt(2 * n)
    return {
        "token_embd": matrix(shape.pieces, w, scale=math.sqrt(w) * 0.02),
        "attn_norm": np.ones((n, w), np.float32),
        "attn_q": matrix(n, w, w), "attn_k": matrix(n, kv, w), "attn_v": matrix(n, kv, w),
        "attn_output": matrix(n, w, w, scale=deep),
        "ffn_norm": np.ones((n, w), np.float32),
        "ffn_gate": matrix(n, h, w), "ffn_up": matrix(n, h, w), "ffn_down": matrix(n, w, h, scale=deep),
        "output_norm": np.ones(w, np.float32),
        "output": matrix(shape.pieces, w, scale=0.5),
    }


IN_LAYER = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")


def norm(x, weight):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + RMS_EPSILON) * weight


def rope(x, cos, sin):
    """x: (batch, time, heads, head width)"""
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def logits(weights, tokens, shape):
    """tokens: (batch, time) -> (batch, time, pieces)"""
    batch, time = tokens.shape
    d = shape.head_width
    angle = np.arange(time)[:, None] * ROPE_BASE ** (-np.arange(0, d, 2) / d)
    cos, sin = (jnp.asarray(f(angle), jnp.float32)[None, :, None, :] for f in (np.cos, np.sin))
    future = jnp.asarray(np.triu(np.full((time, time), -1e9, np.float32), 1))

    def layer(x, w):
        y = norm(x, w["attn_norm"])
        q = rope((y @ w["attn_q"].T).reshape(batch, time, shape.heads, d), cos, sin)
        k = rope((y @ w["attn_k"].T).reshape(batch, time, shape.kv_heads, d), cos, sin)
        v = (y @ w["attn_v"].T).reshape(batch, time, shape.kv_heads, d)
        q = q.reshape(batch, time, shape.kv_heads, shape.heads // shape.kv_heads, d)
        score = jnp.einsum("btgrd,bsgd->bgrts", q, k) / math.sqrt(d) + future
        mixed = jnp.einsum("bgrts,bsgd->btgrd", jax.nn.softmax(score, -1), v).reshape(batch, time, shape.width)
        x = x + mixed @ w["attn_output"].T
        y = norm(x, w["ffn_norm"])
        x = x + (jax.nn.silu(y @ w["ffn_gate"].T) * (y @ w["ffn_up"].T)) @ w["ffn_down"].T
        return x, None

    x = weights["token_embd"][tokens]
    x, _ = jax.lax.scan(layer, x, {name: weights[name] for name in IN_LAYER})
    return norm(x, weights["output_norm"]) @ weights["output"].T


def loss(weights, tokens, shape):
    """Mean cross entropy of the next token, in nats."""
    log_probability = jax.nn.log_softmax(logits(weights, tokens[:, :-1], shape), -1)
    return -jnp.mean(jnp.take_along_axis(log_probability, tokens[:, 1:, None], -1))
