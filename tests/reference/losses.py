"""The losses, pair by pair, in float64 (the type of the inputs)."""

from __future__ import annotations

import math

import torch


def cosine(a, b):
    return torch.cosine_similarity(a, b, dim=0)


def mean(terms):
    return sum(terms) / len(terms) if terms else torch.tensor(0.0, dtype=torch.float64)


def info_nce(anchor, positive, temperature, group, present):
    """Present rows; the rows of one group are no negatives of each other."""
    rows = [i for i in range(len(anchor)) if present[i]]
    losses = []
    for i in rows:
        kept = [j for j in rows if j == i or group[j] != group[i]]
        scores = {j: (cosine(anchor[i], positive[j]) / temperature).exp() for j in kept}
        losses.append(-(scores[i] / sum(scores.values())).log())
    return mean(losses)


def multi_positive_info_nce(anchor, candidates, positive, ignored, temperature):
    losses = []
    for i in range(len(anchor)):
        kept = [j for j in range(len(candidates)) if not ignored[i, j]]
        scores = {j: (cosine(anchor[i], candidates[j]) / temperature).exp() for j in kept}
        wanted = [j for j in kept if positive[i, j]]
        if wanted:
            losses.append(mean([-(scores[p] / sum(scores.values())).log() for p in wanted]))
    return mean(losses)


def similarity_structure(similarity, x, temperature, present):
    rows = [i for i in range(len(x)) if present[i]]
    losses = []
    for i in rows:
        others = [j for j in rows if j != i]
        p = [(similarity[i, j] / temperature).exp() for j in others]
        q = [(cosine(x[i], x[j]) / temperature).exp() for j in others]
        losses.append(
            sum(a / sum(p) * ((a / sum(p)) / (b / sum(q))).log() for a, b in zip(p, q, strict=True))
        )
    return mean(losses)


def moments(x, present, d):
    """Mean and unbiased variance of coordinate ``d`` over the present rows."""
    column = [row[d] for row, there in zip(x, present, strict=True) if there]
    average = mean(column)
    return average, sum((v - average) ** 2 for v in column) / (len(column) - 1)


def variance_hinge(x, present, eps):
    hinges = []
    for d in range(x.shape[1]):
        _, variance = moments(x, present, d)
        hinges.append(max(1 - (variance + eps) ** 0.5, 0 * variance))
    return mean(hinges)


def gaussian_moments(x, present, eps):
    terms = []
    for d in range(x.shape[1]):
        mu, variance = moments(x, present, d)
        variance = variance + eps
        terms.append((variance + mu**2 - 1 - variance.log()) / 2)
    return mean(terms)


def uniformity(x, present, t):
    rows = [row / (row @ row).sqrt() for row, there in zip(x, present, strict=True) if there]
    kernels = []
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            if i != j:
                kernels.append((-t * ((a - b) ** 2).sum()).exp())
    return mean(kernels).log()


def next_item_cross_entropy(states, table, target, first=0):
    """``first`` is the first item that takes part in the softmax."""
    losses = []
    for h, y in zip(states, target, strict=True):
        scores = [(h @ table[n]).exp() for n in range(first, len(table))]
        losses.append(-((h @ table[y]).exp() / sum(scores)).log())
    return mean(losses)


def gbce(positive, negatives, n_items, t):
    def sigmoid(v):
        return 1 / (1 + (-v).exp())

    losses = []
    for plus, minus in zip(positive, negatives, strict=True):
        alpha = len(minus) / (n_items - 1)
        beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
        total = beta * math.log(sigmoid(plus)) + sum(math.log(1 - sigmoid(v)) for v in minus)
        losses.append(-total / (len(minus) + 1))
    return mean(losses)
