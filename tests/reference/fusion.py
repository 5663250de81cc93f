"""MUFASA's fusion layer and its four losses, item by item and head by head, in float64."""

from __future__ import annotations

import math

import torch

from tests.reference import losses
from tests.reference.encoder import feed_forward, layer_norm, linear


def query(h, present, anchor, use_anchor):
    """The anchor of one item (M, D), or the mean of what the item has."""
    if use_anchor and present[anchor]:
        return h[anchor]
    return losses.mean([h[m] for m in range(len(h)) if present[m]])


def weights(state, h, present, anchor, n_heads, use_anchor=True):
    """``[head][modality]``, the attention weights of one item that has something."""
    width = h.shape[1] // n_heads
    q = linear(state, "query", query(h, present, anchor, use_anchor))
    table = []
    for k in range(n_heads):
        part = slice(k * width, (k + 1) * width)
        e = [
            (q[part] @ (state["key.weight"] @ h[m])[part] / math.sqrt(width)).exp()
            if present[m]
            else 0.0
            for m in range(len(h))
        ]
        table.append([v / sum(e) for v in e])
    return table


def fuse(state, h, present, anchor, n_heads, use_anchor=True, eps=1e-12):
    """z of one item."""
    if not any(present):
        return torch.zeros(h.shape[1], dtype=h.dtype)
    width = h.shape[1] // n_heads
    heads = []
    for k, row in enumerate(weights(state, h, present, anchor, n_heads, use_anchor)):
        part = slice(k * width, (k + 1) * width)
        seen = [m for m in range(len(h)) if present[m]]
        heads.append(sum(row[m] * linear(state, "value", h[m])[part] for m in seen))
    z = query(h, present, anchor, use_anchor) + linear(state, "dense", torch.cat(heads))
    z = layer_norm(z, state["LayerNorm.weight"], state["LayerNorm.bias"], eps)
    return feed_forward(state, "feed_forward", z, eps)


def semantic(head, z, h, present, anchor, features, categories, temperature, threshold):
    items = [i for i in range(len(z)) if present[i, anchor]]
    if not items:
        return torch.tensor(0.0, dtype=z.dtype)
    genres = [{c for c in range(categories.shape[1]) if categories[i, c]} for i in items]
    n = len(items)
    positive, ignored = torch.zeros(n, n), torch.zeros(n, n)
    for a in range(n):
        for b in range(n):
            another_genre = genres[a] and genres[b] and not genres[a] & genres[b]
            alike = losses.cosine(features[items[a]], features[items[b]]) > threshold
            positive[a, b] = a == b or bool(another_genre and alike)
            ignored[a, b] = a != b and bool(genres[a]) and genres[a] == genres[b]
    fused = torch.stack([z[i] for i in items])
    titles = torch.stack([linear(head, "semantic_head", h[i, anchor]) for i in items])
    there = losses.multi_positive_info_nce(fused, titles, positive, ignored, temperature)
    back = losses.multi_positive_info_nce(titles, fused, positive.T, ignored.T, temperature)
    return (there + back) / 2


def collaborative_id(head, z, present, ids, temperature):
    projected = torch.stack([linear(head, "collaborative_head", row) for row in z])
    return losses.info_nce(projected, ids, temperature, range(len(z)), present.any(1))


def collaborative_cooccurrence(head, z, present, neighbours, temperature):
    items = [i for i in range(len(z)) if present[i].any()]
    projected = torch.stack([linear(head, "collaborative_head", z[i]) for i in items])
    itself = torch.eye(len(items))
    return losses.multi_positive_info_nce(
        projected, projected, neighbours[items][:, items], itself, temperature
    )


def structure(z, h, present, anchor, features, temperature):
    U, M = present.shape
    cosines = torch.zeros(U, U, dtype=z.dtype)
    for i in range(U):
        for j in range(U):
            cosines[i, j] = losses.cosine(features[i], features[j])
    titled = present[:, anchor]
    divergences = [losses.similarity_structure(cosines, z, temperature, titled)]
    hinges = []
    for m in range(M):
        both = [bool(titled[i] and present[i, m]) for i in range(U)]
        divergences.append(losses.similarity_structure(cosines, h[:, m], temperature, both))
        hinges.append(losses.variance_hinge(h[:, m], present[:, m], 1e-4))
    return losses.mean(divergences) + losses.mean(hinges)
