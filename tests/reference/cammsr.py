"""CAMMSR (arXiv 2603.04320) as loops over rows, positions, modalities, experts and categories.

Works on one sequence without padding: vectors e[j][m], presence[j][m], labels[j][c]. Everything is
in the type of the inputs, float64 in the tests.
"""

from __future__ import annotations

import math

import torch

from tests.reference.encoder import gelu, norm, transformer
from tests.reference.losses import info_nce


def softmax(scores):
    total = sum(s.exp() for s in scores)
    return [s.exp() / total for s in scores]


def attentive_gate(weight, e, present, causal):
    """Eq. (6)-(7): gate values [j][m], each (E,); weight (M, D, 3E) holds W_Q, W_K, W_V."""
    L, M = len(e), len(weight)
    E = weight.shape[-1] // 3
    gates = [[torch.zeros(E, dtype=weight.dtype) for _ in range(M)] for _ in range(L)]
    for m in range(M):
        w_q, w_k, w_v = weight[m, :, :E], weight[m, :, E : 2 * E], weight[m, :, 2 * E :]
        for j in range(L):
            keys = [k for k in range(j + 1 if causal else L) if present[k][m]]
            scores = [(e[j][m] @ w_q) @ (e[k][m] @ w_k) / math.sqrt(E) for k in keys]
            for share, k in zip(softmax(scores), keys, strict=True):
                gates[j][m] = gates[j][m] + share * (e[k][m] @ w_v)
    return gates


def linear_gate(weight, bias, e):
    """The ablation: softmax over experts of a linear map."""
    return [
        [
            torch.stack(softmax(list(e_m @ w + b)))
            for e_m, w, b in zip(e_j, weight, bias, strict=True)
        ]
        for e_j in e
    ]


def mixture(w_1, b_1, w_2, b_2, x, gates):
    """Eq. (5) at one position: [m], each (D,), from x (K,) and gates [m][k]."""
    mixed = []
    for m in range(len(gates)):
        s = m if len(w_1) > 1 else 0  # shared or own set
        experts = [
            w_2[s, k] @ gelu(w_1[s, k] @ x + b_1[s, k]) + b_2[s, k] for k in range(w_1.shape[1])
        ]
        mixed.append(sum(gates[m][k] * experts[k] for k in range(len(experts))))
    return mixed


def bce(logit, truth):
    p = 1 / (1 + (-logit).exp())
    return -p.log() if truth else -(1 - p).log()


def category_error(logits, labels, reduction, pool):
    """Eq. (8)-(9): d of one modality at one position that has a category."""
    C = len(logits)
    true = [c for c in range(C) if labels[c]]
    truths = [true] if pool == "multihot" else [[c] for c in true]
    errors = [sum(bce(logits[c], c in truth) for c in range(C)) for truth in truths]
    d = max(errors, key=lambda error: error.item())
    return d / C if reduction == "mean" else d


def guidance(weight, bias, e, present, labels, sign, reduction, pool):
    """Eq. (8)-(11): weights [j][m], and the mean BCE over categories wherever it counts."""
    weights, errors = [], []
    M = len(weight)
    for e_j, there, truth in zip(e, present, labels, strict=True):
        zero = torch.zeros((), dtype=weight.dtype)
        d = [zero] * M
        if any(truth):
            d = [
                category_error(e_j[m] @ weight[m] + bias[m], truth, reduction, pool)
                for m in range(M)
            ]
            errors += [
                category_error(e_j[m] @ weight[m] + bias[m], truth, "mean", "multihot")
                for m in range(M)
                if there[m]
            ]
        shown = [m for m in range(M) if there[m]]
        shares = dict(zip(shown, softmax([sign * d[m] for m in shown]), strict=True))
        weights.append([shares.get(m, zero) for m in range(M)])
    return weights, errors


def fuse(state, e, present, labels, options, prefix=""):
    """Eq. (5)-(11) for one sequence: fused vectors [j][m], weights [j][m], errors that count."""
    seen = [
        [e_m if there else torch.zeros_like(e_m) for e_m, there in zip(e_j, p_j, strict=True)]
        for e_j, p_j in zip(e, present, strict=True)
    ]
    part = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    if options["gate"] == "attentive":
        gates = attentive_gate(part["gate.weight"], seen, present, options["gate_causal"])
    else:
        gates = linear_gate(part["gate.weight"], part["gate.bias"], seen)
    if "guidance.weight" in part:
        weights, errors = guidance(
            part["guidance.weight"],
            part["guidance.bias"],
            seen,
            present,
            labels,
            options["category_weight_sign"],
            options["category_reduction"],
            options["category_pool"],
        )
    else:
        weights, errors = [[there / sum(p_j) for there in p_j] for p_j in present], []
    experts = [part[f"experts.{n}"] for n in ("weight_1", "bias_1", "weight_2", "bias_2")]
    fused = []
    for j in range(len(e)):
        mixed = mixture(*experts, torch.cat(list(seen[j])), gates[j])
        fused.append([e[j][m] + weights[j][m] * mixed[m] for m in range(len(mixed))])
    return fused, weights, errors


def interest(state, name, rows, options):
    """Eq. (12)-(13): states of one modality's Transformer at all positions."""
    rows = [norm(state, f"input_norm.{name}", x, 1e-12) for x in rows]
    start = f"encoder.{name}."
    part = {key.removeprefix(start): t for key, t in state.items() if key.startswith(start)}
    return transformer(part, torch.stack(rows), len(rows), options["n_layers"], options["n_heads"])


def item_vectors(state, features):
    """Eq. (2)-(3): x[i][m]; ``features`` maps a modality to its vectors, None where missing."""
    ids = state["item_embedding.weight"]
    table = []
    for i in range(len(ids)):
        x = [ids[i]]
        for name, vectors in features.items():
            w, b = state[f"project.project.{name}.weight"], state[f"project.project.{name}.bias"]
            x.append(torch.zeros_like(ids[i]) if vectors[i] is None else w @ vectors[i] + b)
        table.append(x)
    return table


def losses(state, features, labels, histories, targets, swapped, options):
    """Eq. (20): the three terms of a batch.

    Args:
        state: Parameters by name.
        features: By modality, vectors of each item, None where missing.
        labels: ``(N, C)``.
        histories: Item ids of each row, without padding.
        targets: One item id for each row, or (every position) a list for each.
        swapped: ``swapped[p][b][j]``: whether pair ``p`` is exchanged there.
        options: The configuration.
    """
    names = ["id", *features]
    table = item_vectors(state, features)
    users, errors, views = [], [], []
    for history in histories:
        position = state["position_embedding.weight"]
        e = [[x + position[j] for x in table[i]] for j, i in enumerate(history)]
        present = [[True, *(v[i] is not None for v in features.values())] for i in history]
        fused, _, d = fuse(state, e, present, labels[history].tolist(), options, "fuse.")
        errors += d
        by_modality = [[fused[j][m] for j in range(len(history))] for m in range(len(names))]
        states = [
            interest(state, name, rows, options)
            for name, rows in zip(names, by_modality, strict=True)
        ]
        users.append([[s[j] for s in states] for j in range(len(history))])
        row_views = []
        for p, (a, b) in enumerate(options["pairs"]):
            exchanged = swapped[p][len(views)]
            first = [fused[j][b if exchanged[j] else a] for j in range(len(history))]
            second = [fused[j][a if exchanged[j] else b] for j in range(len(history))]
            row_views.append(
                (
                    interest(state, names[a], first, options)[-1],
                    interest(state, names[b], second, options)[-1],
                )
            )
        views.append(row_views)

    columns = [torch.stack([x[m] for x in table]) for m in range(len(names))]
    ranking, last_targets = [], []
    for user, target in zip(users, targets, strict=True):
        each = target if isinstance(target, list) else [target]
        last_targets.append(each[-1])
        for z, t in zip(user[-len(each) :], each, strict=True):
            scores = sum(columns[m] @ z[m] for m in range(len(names)))  # Eq. (15), (N,)
            ranking.append(scores[1:].logsumexp(0) - scores[t])  # no padding

    contrast = torch.zeros((), dtype=torch.float64)
    group = last_targets if options["mask_same_target"] else range(len(histories))
    occurs = [
        [any(m == 0 or features[name][i] is not None for i in h) for m, name in enumerate(names)]
        for h in histories
    ]
    for p, (a, b) in enumerate(options["pairs"]):
        both = [there[a] and there[b] for there in occurs]
        first, second = ([row[p][side] for row in views] for side in (0, 1))
        temperature = options["contrast_temperature"]
        contrast = contrast + info_nce(first, second, temperature, group, both)
    mean_error = sum(errors) / len(errors) if errors else torch.zeros((), dtype=torch.float64)
    return (
        sum(ranking) / len(ranking),
        options["contrast_weight"] * contrast,
        options["category_loss_weight"] * mean_error,
    )
