"""MDSRec's graphs and attention, one item, user and position at a time, in float64."""

from __future__ import annotations

import math
from collections import defaultdict

import torch

from tests.reference.encoder import feed_forward, layer_norm, linear

# ------------------------------------------------------------------------------- graphs


def histories(users, items):
    by_user = defaultdict(list)
    for user, item in zip(users, items, strict=True):
        by_user[int(user)].append(int(item))
    return by_user


def co_occurrence(users, items, window):
    """Number of users in whose history i and j stand at most ``window`` places apart, by (i, j)."""
    counts = defaultdict(int)
    for history in histories(users, items).values():
        pairs = set()
        for a in range(len(history)):
            for b in range(a + 1, min(a + window, len(history) - 1) + 1):
                if history[a] != history[b]:
                    pairs.add((history[a], history[b]))
                    pairs.add((history[b], history[a]))
        for pair in pairs:
            counts[pair] += 1
    return counts


def behaviour_graph(users, items, n_items, window, top_k):
    counts = co_occurrence(users, items, window)
    known = [set(history) for history in histories(users, items).values()]
    n_users = [sum(i in history for history in known) for i in range(n_items)]
    rows = []
    for i in range(n_items):
        found = [(-counts[i, j], n_users[j], j) for j in range(n_items) if (i, j) in counts]
        kept = {j: -count for count, _, j in sorted(found)[:top_k]}
        rows.append([kept.get(j, 0) / max(1, sum(kept.values())) for j in range(n_items)])
    return torch.tensor(rows, dtype=torch.float64)


def unit(f):
    length = sum(v * v for v in f) ** 0.5
    return f / length if length > 0 else f


def knn_graph(vectors, k):
    n = len(vectors)
    graph = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        cosine = {j: (unit(vectors[i]) @ unit(vectors[j])).item() for j in range(n) if j != i}
        for j in sorted(cosine, key=lambda j: (-cosine[j], j))[:k]:
            if cosine[j] > 1e-6:
                graph[i, j] = cosine[j]
    return graph


def symmetric_normalise(graph):
    n = len(graph)
    both = torch.zeros_like(graph)
    for i in range(n):
        for j in range(n):
            both[i, j] = (graph[i, j] + graph[j, i]) / 2
    degree = [sum(both[i, j].item() for j in range(n)) for i in range(n)]
    for i in range(n):
        for j in range(n):
            if both[i, j] > 0:
                both[i, j] /= math.sqrt(degree[i] * degree[j])
    return both


def modal_graph(vectors, items, behaviour, relation_graph, k, beta):
    """``items`` are the ids of those that ``vectors`` belong to."""
    n = len(items)
    together = [[behaviour[items[a], items[b]] for b in range(n)] for a in range(n)]
    if relation_graph == "smooth":
        moved = []
        for a in range(n):
            f = unit(vectors[a])
            for b in range(n):
                f = f + together[a][b] * unit(vectors[b])
            moved.append(f)
        alike = knn_graph(moved, k)
    else:
        alike = knn_graph(vectors, k)
        for a in range(n):
            total = alike[a].sum()
            for b in range(n):
                share = alike[a, b] / total if total > 0 else 0.0
                alike[a, b] = beta * share + (1 - beta) * together[a][b]
    graph = torch.zeros_like(behaviour)
    for a in range(n):
        for b in range(n):
            graph[items[a], items[b]] = alike[a, b]
    return graph


def propagate(graph, x, n_layers):
    for _ in range(n_layers):
        x = torch.stack([row @ x for row in graph])
    return x


# ------------------------------------------------------------------------------- attention


def own_centres(rows, theta):
    """One weighted mean of the rows for each row of ``theta``."""
    centres = []
    for direction in theta:
        e = [(row @ direction).exp() for row in rows]
        centres.append(sum(w / sum(e) * row for w, row in zip(e, rows, strict=True)))
    return centres


def shared_centres(rows, centre):
    """Each centre as long as the user's share in it."""
    K, D = centre.shape
    share = [0.0] * K
    for row in rows:
        e = [(row @ c / math.sqrt(D)).exp() for c in centre]
        for k in range(K):
            share[k] = share[k] + e[k] / sum(e) / len(rows)
    return [K * share[k] * centre[k] for k in range(K)]


def interest_layer(state, rows, attention, n_heads, eps):
    """All real positions after one layer."""
    width = len(rows[0]) // n_heads
    after = []
    for j, row in enumerate(rows):
        if attention == "global":
            centres = shared_centres(rows, state["centres.centre"])
        else:
            seen = rows[: j + 1] if attention == "running" else rows
            centres = own_centres(seen, state["centres.theta.weight"])
        query = linear(state, "query", row)
        heads = []
        for h in range(n_heads):
            part = slice(h * width, (h + 1) * width)
            e = [
                (query[part] @ (state["key.weight"] @ c)[part] / math.sqrt(width)).exp()
                for c in centres
            ]
            heads.append(
                sum(
                    w / sum(e) * linear(state, "value", c)[part]
                    for w, c in zip(e, centres, strict=True)
                )
            )
        mixed = linear(state, "dense", torch.cat(heads)) + row
        mixed = layer_norm(mixed, state["LayerNorm.weight"], state["LayerNorm.bias"], eps)
        after.append(feed_forward(state, "feed_forward", mixed, eps))
    return after


def inputs(state, history, vectors, present, eps):
    """Input rows of one history, a list of ids: those of items that have the modality."""
    return [
        layer_norm(
            vectors[item] + state["position_embedding.weight"][place],
            state["norm.weight"],
            state["norm.bias"],
            eps,
        )
        for place, item in enumerate(history)
        if present[item]
    ]


def interest(state, history, vectors, present, n_layers, attention, n_heads, eps=1e-12):
    """The user in one modality, for ``centres``, ``running`` and ``global``."""
    rows = inputs(state, history, vectors, present, eps)
    if not rows:
        return torch.zeros(vectors.shape[1], dtype=vectors.dtype)
    for i in range(n_layers):
        own = {
            name.removeprefix(f"layer.{i}."): value
            for name, value in state.items()
            if name.startswith(f"layer.{i}.")
        }
        rows = interest_layer(own, rows, attention, n_heads, eps)
    return rows[-1]


def attention_fusion(users, heard, mix):
    """Weights of the modalities of one user: softmax over those that the history holds."""
    joined = torch.cat(list(users))
    e = [
        (row @ joined).exp() if there else torch.zeros(())
        for row, there in zip(mix, heard, strict=True)
    ]
    total = sum(e)
    return torch.stack([v / total if total > 0 else v for v in e])
