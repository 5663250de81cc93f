"""Post-norm Transformer, position by position and head by head, in float64."""

from __future__ import annotations

import math

import torch


def layer_norm(x, weight, bias, eps):
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return torch.stack([(v - mean) / (variance + eps) ** 0.5 for v in x]) * weight + bias


def norm(state, name, x, eps):
    """Layer norm, or tanh(alpha x) if that is what the state holds."""
    if f"{name}.alpha" in state:
        return torch.tanh(state[f"{name}.alpha"] * x)
    return layer_norm(x, state[f"{name}.weight"], state[f"{name}.bias"], eps)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def linear(state, name, x):
    return state[f"{name}.weight"] @ x + state[f"{name}.bias"]


def attention(state, name, j, rows, visible, n_heads, eps):
    """State of position ``j`` after attending to the positions in ``visible``."""
    width = len(rows[j]) // n_heads
    query = linear(state, f"{name}.query", rows[j])
    heads = []
    for h in range(n_heads):
        part = slice(h * width, (h + 1) * width)
        scores = [
            query[part] @ linear(state, f"{name}.key", rows[k])[part] / math.sqrt(width)
            for k in visible
        ]
        total = sum(s.exp() for s in scores)
        heads.append(
            sum(
                s.exp() / total * linear(state, f"{name}.value", rows[k])[part]
                for s, k in zip(scores, visible, strict=True)
            )
        )
    mixed = linear(state, f"{name}.dense", torch.cat(heads)) + rows[j]
    return norm(state, f"{name}.LayerNorm", mixed, eps)


def feed_forward(state, name, x, eps):
    y = linear(state, f"{name}.dense_2", gelu(linear(state, f"{name}.dense_1", x))) + x
    return norm(state, f"{name}.LayerNorm", y, eps)


def transformer(state, x, length, n_layers, n_heads, eps=1e-12):
    """Real positions of one sequence ``x`` (L, D), each from earlier ones: ``length`` vectors."""
    rows = [x[j] for j in range(length)]
    for i in range(n_layers):
        after = []
        for j in range(length):
            name = f"layer.{i}.multi_head_attention"
            y = attention(state, name, j, rows, range(j + 1), n_heads, eps)
            after.append(feed_forward(state, f"layer.{i}.feed_forward", y, eps))
        rows = after
    return rows
