"""Windowed, block-level and selective attention, query by query and head by head, in float64.

One sequence: q, k, v are (H, L, d); block_key and block_value (H, L // b, d).
"""

from __future__ import annotations

import math

import torch

from tests.reference import encoder


def attend(query, keys, values):
    """Softmax attention of one query over a list of keys; zero over none."""
    if len(keys) == 0:
        return torch.zeros_like(query)
    scores = keys @ query / math.sqrt(len(query))
    weights = (scores - scores.max()).exp()
    return (weights / weights.sum()) @ values


def visible_blocks(j, b, n_blocks):
    """Blocks that are finished when query j stands there: (c + 1) b - 1 <= j."""
    return [c for c in range(n_blocks) if (c + 1) * b - 1 <= j]


def block_merit(j, q, block_key, b):
    """Block-level attention probability of each visible block, summed over the heads."""
    visible = visible_blocks(j, b, block_key.shape[1])
    merit = dict.fromkeys(visible, 0.0)
    for h in range(len(q)):
        scores = [(q[h, j] @ block_key[h, c]).item() / math.sqrt(q.shape[-1]) for c in visible]
        highest = max(scores, default=0.0)
        total = sum(math.exp(s - highest) for s in scores)
        for c, s in zip(visible, scores, strict=True):
            merit[c] += math.exp(s - highest) / total
    return merit


def choose(j, q, block_key, b, n, selection):
    """Blocks that query j attends to token by token, besides its own; best first."""
    own = j // b
    if n == 1:
        return []
    chooser = j if selection == "query" else own * b
    merit = block_merit(chooser, q, block_key, b)
    others = [c for c in merit if c != own]
    return sorted(others, key=lambda c: (-merit[c], c))[: n - 1]


def sparse_attention(
    q,
    k,
    v,
    gate,
    length,
    *,
    block_size,
    window_size=None,
    block_key=None,
    block_value=None,
    n_selected_blocks=None,
    selection="query",
    chosen=None,
):
    """(H, L, d), zero from ``length`` on; ``chosen[j]`` replaces the choice of query j."""
    b = block_size
    rows = []
    for j in range(q.shape[1]):
        others = []
        if j < length and n_selected_blocks is not None:
            others = (
                choose(j, q.detach(), block_key.detach(), b, n_selected_blocks, selection)
                if chosen is None
                else chosen[j]
            )
        heads = []
        for h in range(len(q)):
            branches = []
            if j < length and window_size is not None:
                seen = slice(max(0, j - window_size + 1), j + 1)
                branches.append(attend(q[h, j], k[h, seen], v[h, seen]))
            if j < length and block_value is not None:
                n_visible = len(visible_blocks(j, b, block_value.shape[1]))
                branches.append(
                    attend(q[h, j], block_key[h, :n_visible], block_value[h, :n_visible])
                )
            if j < length and n_selected_blocks is not None:
                tokens = [t for c in [*others, j // b] for t in range(c * b, (c + 1) * b) if t <= j]
                branches.append(attend(q[h, j], k[h, tokens], v[h, tokens]))
            weighted = [gate[h, j, g] * branch for g, branch in enumerate(branches)]
            heads.append(sum(weighted, start=torch.zeros_like(q[h, j])))
        rows.append(torch.stack(heads))
    return torch.stack(rows, dim=1)


def choice_margin(j, q, block_key, b, n, selection):
    """How far query j is from choosing otherwise: least merit chosen less most merit left."""
    own = j // b
    merit = block_merit(j if selection == "query" else own * b, q, block_key, b)
    values = sorted((merit[c] for c in merit if c != own), reverse=True)
    return math.inf if len(values) < n or n == 1 else values[n - 2] - values[n - 1]


def block_vectors(state, x, b, n_heads, compression, block_evolution):
    """Vector of each finished block of x (L, D), after it attended to the earlier ones."""
    vectors = []
    for c in range(len(x) // b):
        tokens = [x[c * b + t] for t in range(b)]
        vector = sum(tokens) / b
        if compression == "mlp":
            inner = [
                encoder.gelu(
                    encoder.linear(
                        state, "compress.dense_1", token + state["compress.place.weight"][t]
                    )
                )
                for t, token in enumerate(tokens)
            ]
            vector = vector + encoder.linear(state, "compress.dense_2", sum(inner) / b)
        vectors.append(vector)
    if block_evolution:
        return [
            encoder.attention(state, "evolve", c, vectors, range(c + 1), n_heads, 1e-12)
            for c in range(len(vectors))
        ]
    return vectors


def rotated(x, positions):
    """Rows of x (H, T, d) turned by their positions, a pair of numbers at a time."""
    half = x.shape[-1] // 2
    turned = []
    for row, t in zip(x.unbind(1), positions, strict=True):
        first, second = [], []
        for i in range(half):
            angle = t * 10_000 ** (-2 * i / x.shape[-1])
            a, b = row[:, i], row[:, half + i]
            first.append(a * math.cos(angle) - b * math.sin(angle))
            second.append(b * math.cos(angle) + a * math.sin(angle))
        turned.append(torch.stack(first + second, dim=-1))
    return torch.stack(turned, dim=1) if turned else x


def layer(
    state,
    x,
    length,
    *,
    n_heads,
    offset,
    window_size,
    block_size,
    n_selected_blocks,
    selection,
    compression,
    block_evolution,
    rotary,
):
    """One SAL attention layer over x (L, D), all branches on, without dropout: (length, D)."""
    x = x[:length]  # causal, and no unfinished block is seen: padding cannot matter

    def heads(name, vectors):
        bias = state.get(f"{name}.bias", 0.0)
        rows = [state[f"{name}.weight"] @ vector + bias for vector in vectors]
        width = len(state[f"{name}.weight"]) // n_heads
        stacked = torch.stack(rows) if rows else x.new_zeros(0, n_heads * width)
        return stacked.view(len(rows), n_heads, width).transpose(0, 1)  # (H, L, d)

    def placed(name, vectors, positions):
        rows = heads(name, vectors)
        return rotated(rows, positions) if rotary else rows

    blocks = block_vectors(state, x, block_size, n_heads, compression, block_evolution)
    middles = [c * block_size + (block_size - 1) / 2 for c in range(len(blocks))]
    mixed = sparse_attention(
        placed("query", x, range(length)),
        placed("key", x, range(length)),
        heads("value", x),
        torch.sigmoid(heads("gate", x) + torch.tensor(offset, dtype=x.dtype)),
        length,
        block_size=block_size,
        window_size=window_size,
        block_key=placed("key", blocks, middles),
        block_value=heads("value", blocks),
        n_selected_blocks=n_selected_blocks,
        selection=selection,
    )  # (H, L, d)
    return torch.stack(
        [
            encoder.layer_norm(
                x[j] + encoder.linear(state, "dense", mixed[:, j].flatten()),
                state["LayerNorm.weight"],
                state["LayerNorm.bias"],
                1e-12,
            )
            for j in range(length)
        ]
    )
