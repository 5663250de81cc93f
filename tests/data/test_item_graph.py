from __future__ import annotations

import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from recbole_mm.data import item_graph
from recbole_mm.data.features import FeatureTable, ModalityFeatures
from recbole_mm.data.item_graph import (
    behaviour_graph,
    item_graphs,
    knn_graph,
    modal_graph,
    neighbours,
    overlap,
    symmetric_normalise,
)
from tests.reference import mdsrec as reference

OPTIONS = {
    "behaviour_window": 2,
    "behaviour_k": 3,
    "relation_graph": "smooth",
    "knn_k": 2,
    "mix_beta": 0.5,
}


def dense(graph):
    return torch.from_numpy(graph.toarray()).double()


def interactions(seed=0, n_users=12, n_items=11, longest=9):
    """Histories with repeats; item 10 occurs in none of them."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, longest, n_users)
    return np.repeat(np.arange(n_users), length), rng.integers(1, n_items - 1, length.sum())


def vectors(n, width=5, seed=0):
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


# ------------------------------------------------------------------------------- behaviour


@pytest.mark.parametrize("window", [1, 2, 50])
@pytest.mark.parametrize("top_k", [1, 3, 50])
@pytest.mark.parametrize("seed", range(3))
def test_behaviour_graph_equals_loop_reference(window, top_k, seed):
    users, items = interactions(seed)
    graph = behaviour_graph(users, items, 11, window=window, top_k=top_k)
    expected = reference.behaviour_graph(users, items, 11, window, top_k)
    assert_close(dense(graph), expected, atol=1e-7, rtol=0)  # the graph is float32


def test_behaviour_graph_in_many_chunks_is_the_same(monkeypatch):
    users, items = interactions(n_users=40)
    whole = behaviour_graph(users, items, 11, window=3, top_k=4)
    monkeypatch.setattr(item_graph, "_CHUNK", 5)
    assert_close(dense(behaviour_graph(users, items, 11, window=3, top_k=4)), dense(whole))


def test_a_user_counts_once_for_a_pair():
    users = np.array([0, 0, 0, 0, 1, 1])
    items = np.array([1, 2, 1, 2, 1, 3])
    graph = behaviour_graph(users, items, 4, window=3, top_k=5)
    assert neighbours(graph, 1, 5) == [(2, 0.5), (3, 0.5)]


def test_equal_counts_keep_the_item_with_fewer_users():
    users = np.array([0, 0, 0, 1])
    items = np.array([2, 1, 3, 2])  # 2 and 3 both stand beside 1 once, 2 is more popular
    graph = behaviour_graph(users, items, 4, window=1, top_k=1)
    assert neighbours(graph, 1, 5) == [(3, 1.0)]


def test_histories_of_two_users_do_not_touch():
    graph = behaviour_graph(np.array([0, 1]), np.array([1, 2]), 3, window=5, top_k=5)
    assert graph.nnz == 0


def test_no_interactions_give_an_empty_graph():
    nothing = np.zeros(0, np.int64)
    graph = behaviour_graph(nothing, nothing, 4, window=1, top_k=1)
    assert graph.shape == (4, 4)
    assert graph.nnz == 0


@pytest.mark.parametrize(
    ("users", "items", "options", "message"),
    [
        ([0, 1, 0], [1, 1, 1], {}, "users must be sorted"),
        ([0, 0], [1], {}, r"\(T,\)"),
        ([0, 0], [0, 1], {}, r"items must lie in \[1, 5\), got 0 to 1"),
        ([0, 0], [1, 5], {}, r"items must lie in \[1, 5\), got 1 to 5"),
        ([0], [1], {"window": 0}, "window must be at least 1 and top_k 0, got 0 and 1"),
        ([0], [1], {"top_k": -1}, "window must be at least 1 and top_k 0, got 1 and -1"),
    ],
)
def test_bad_interactions_are_refused(users, items, options, message):
    options = {"window": 1, "top_k": 1} | options
    with pytest.raises(ValueError, match=message):
        behaviour_graph(np.array(users), np.array(items), 5, **options)


# ------------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("k", [1, 4, 40])
def test_knn_equals_loop_reference(k):
    f = vectors(30)
    f[7] = 0
    expected = reference.knn_graph(torch.from_numpy(f).double(), k)
    assert_close(dense(knn_graph(f, k)), expected, atol=1e-6, rtol=0)  # float32 cosines


def test_knn_in_many_blocks_is_the_same(monkeypatch):
    f = vectors(700)  # 1 MiB holds 374 rows of scores
    assert_close(dense(knn_graph(f, 3, block_mb=1)), dense(knn_graph(f, 3)), atol=1e-6, rtol=0)


def test_knn_has_no_more_than_a_block_of_scores(monkeypatch):
    shapes = []
    product = np.matmul

    def seen(a, b, out):
        shapes.append(out.shape)
        return product(a, b, out=out)

    monkeypatch.setattr(item_graph.np, "matmul", seen)
    knn_graph(vectors(700), 3, block_mb=1)
    assert shapes == [(374, 700), (326, 700)]


def test_knn_keeps_the_lower_number_among_equals():
    f = np.eye(3, dtype=np.float32)[[0, 0, 1, 0, 0, 0]]
    graph = knn_graph(f, 2)
    assert {j for j, _ in neighbours_of(graph, 5)} == {0, 1}
    assert {j for j, _ in neighbours_of(graph, 0)} == {1, 3}
    assert neighbours_of(graph, 2) == []  # orthogonal to all


@pytest.mark.parametrize("block_mb", [1, 256])
def test_knn_keeps_the_lower_numbers_though_products_round_differently(monkeypatch, block_mb):
    """30 looks, each 20 times, at scales whose rows of length one differ in their last digits."""
    rng = np.random.default_rng(0)
    look = rng.permutation(np.repeat(np.arange(30), 20))
    scale = rng.choice(np.array([1, 3, 7, 0.1], np.float32), len(look))
    f = vectors(30, width=64)[look] * scale[:, None]
    product = np.matmul

    def shaken(a, b, out):
        noise = rng.uniform(-3e-7, 3e-7, out.shape).astype(np.float32)
        return np.add(product(a, b, out=out), noise, out=out)

    monkeypatch.setattr(item_graph.np, "matmul", shaken)
    graph = knn_graph(f, 5, block_mb=block_mb)
    for i in range(len(look)):
        same = [j for j in np.flatnonzero(look == look[i]) if j != i]
        assert [j for j, _ in neighbours_of(graph, i)] == same[:5]


def neighbours_of(graph, row):
    entries = slice(graph.indptr[row], graph.indptr[row + 1])
    return list(zip(graph.indices[entries].tolist(), graph.data[entries].tolist(), strict=True))


@settings(deadline=None, max_examples=20)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 2**16))
def test_knn_does_not_depend_on_scale_and_follows_the_order_of_rows(scale, seed):
    f = vectors(20, seed=seed)
    order = np.random.default_rng(seed).permutation(20)
    moved = dense(knn_graph((scale * f)[order], 3))
    assert_close(moved, dense(knn_graph(f, 3))[order][:, order], atol=1e-6, rtol=0)


def test_knn_of_huge_and_tiny_vectors_is_finite():
    f = vectors(6) * np.array([[1e30], [1e-30], [1], [1e30], [1e-30], [1]], np.float32)
    assert_close(dense(knn_graph(f, 2)), dense(knn_graph(vectors(6), 2)), atol=1e-6, rtol=0)


def test_knn_refuses_vectors_that_are_not_finite():
    f = vectors(5)
    f[3, 1] = np.nan
    with pytest.raises(ValueError, match="vector 3 holds NaN or Inf"):
        knn_graph(f, 2)


def test_knn_of_a_lonely_item_is_empty():
    assert knn_graph(vectors(1), 3).nnz == 0


# ------------------------------------------------------------------------------- modalities


@pytest.mark.parametrize("relation_graph", ["smooth", "mix"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_modal_graph_equals_loop_reference(relation_graph, beta):
    users, items = interactions()
    behaviour = behaviour_graph(users, items, 11, window=2, top_k=3)
    who = np.array([1, 2, 4, 5, 6, 8, 10])
    f = vectors(len(who))
    graph = modal_graph(f, who, behaviour, relation_graph=relation_graph, knn_k=2, mix_beta=beta)
    expected = reference.modal_graph(
        torch.from_numpy(f).double(), who, dense(behaviour), relation_graph, 2, beta
    )
    assert_close(dense(graph), expected, atol=1e-6, rtol=0)  # float32 cosines


@pytest.mark.parametrize("relation_graph", ["smooth", "mix"])
def test_normalised_modal_graph_is_exactly_symmetric_and_without_absent_items(relation_graph):
    users, items = interactions()
    behaviour = behaviour_graph(users, items, 11, window=2, top_k=3)
    who = np.array([1, 2, 4, 5, 6, 8, 10])
    graph = modal_graph(
        vectors(len(who)), who, behaviour, relation_graph=relation_graph, knn_k=2, mix_beta=0.5
    )
    graph = symmetric_normalise(graph).toarray()
    assert (graph == graph.T).all()
    assert not graph[[0, 3, 7, 9]].any()
    assert graph[who].any(axis=1).all()
    assert not graph.diagonal().any()


def test_behaviour_draws_items_of_different_looks_together():
    # 1 and 2 look alike, 3 looks like 4; all users take 1 and 3 together
    f = np.array([[1, 0.0], [1, 0.2], [0.1, 1], [0.3, 1]], np.float32)
    together = behaviour_graph(np.array([0, 0]), np.array([1, 3]), 5, window=1, top_k=1)
    options = {"relation_graph": "smooth", "knn_k": 1, "mix_beta": 0.5}
    who = np.arange(1, 5)
    alone = modal_graph(f, who, sp.csr_matrix((5, 5), dtype=np.float32), **options)
    assert neighbours(alone, 1, 1)[0][0] == 2
    assert neighbours(modal_graph(f, who, together, **options), 1, 1)[0][0] == 3


def test_symmetric_normalise_equals_loop_reference():
    rng = np.random.default_rng(0)
    matrix = rng.random((8, 8)) * (rng.random((8, 8)) < 0.4)
    matrix[2], matrix[:, 2] = 0, 0
    graph = symmetric_normalise(sp.csr_matrix(matrix))
    expected = reference.symmetric_normalise(torch.from_numpy(matrix))
    assert_close(dense(graph), expected, atol=1e-7, rtol=0)  # the graph is float32


def test_normalised_graph_lets_no_signal_grow():
    graph = symmetric_normalise(sp.random(40, 40, 0.1, format="csr", random_state=0))
    assert abs(np.linalg.eigvalsh(graph.toarray())).max() <= 1 + 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relation_graph": "smoth"}, "relation_graph: 'smoth' is unknown; use one of smooth, mix"),
        ({"mix_beta": 1.5}, r"mix_beta must lie in \[0, 1\], got 1.5"),
        ({"knn_k": 0}, "k must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    options = {"relation_graph": "smooth", "knn_k": 2, "mix_beta": 0.5} | options
    nothing = sp.csr_matrix((5, 5), dtype=np.float32)
    with pytest.raises(ValueError, match=message):
        modal_graph(vectors(4), np.arange(1, 5), nothing, **options)


# ------------------------------------------------------------------------------- a data set


def looks(seed=0):
    """Items 3 and 4 look the same: who has a vector must tell them apart."""
    f = vectors(11, seed=seed)
    f[4] = f[3]
    return f


def table(seed=0, absent=(3,), n_items=11):
    """One modality ``look``; its rows stand in an order of their own, in half precision."""
    present = torch.ones(n_items, dtype=torch.bool)
    present[[0, *absent]] = False
    order = torch.arange(n_items).flip(0)
    rows = torch.where(present, order.argsort(), 0)
    values = torch.from_numpy(looks(seed)).half()[order]
    look = ModalityFeatures("look", values, rows, present, SimpleNamespace())
    return FeatureTable([look], n_items)


def files(folder):
    names = {path.name for path in folder.iterdir()}
    return sorted(name for name in names if not name.endswith(".lock"))  # which stays


def test_graphs_of_a_data_set_equal_those_of_its_parts(tmp_path):
    users, items = interactions()
    graphs = item_graphs(table(), users, items, **OPTIONS, cache_dir=tmp_path)
    behaviour = behaviour_graph(users, items, 11, window=2, top_k=3)
    who = np.array([1, 2, 4, 5, 6, 7, 8, 9, 10])
    f = looks().astype(np.float16).astype(np.float32)[who]
    look = modal_graph(f, who, behaviour, relation_graph="smooth", knn_k=2, mix_beta=0.5)
    assert_close(dense(graphs.behaviour), dense(behaviour))
    assert list(graphs.modal) == ["look"]
    assert_close(dense(graphs.modal["look"]), dense(look))


def test_second_call_reads_the_cache(tmp_path, monkeypatch):
    users, items = interactions()
    first = item_graphs(table(), users, items, **OPTIONS, cache_dir=tmp_path)
    for name in ("behaviour_graph", "modal_graph"):
        monkeypatch.setattr(item_graph, name, None)  # calling it would fail
    second = item_graphs(table(), users, items, **OPTIONS, cache_dir=tmp_path)
    assert len(files(tmp_path)) == 2
    assert_close(dense(second.behaviour), dense(first.behaviour))
    assert_close(dense(second.modal["look"]), dense(first.modal["look"]))


def moved(items):
    """The training interactions of another split: one item is another one."""
    other = items.copy()
    other[5] = other[5] % 9 + 1
    return other


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a | {"items": moved(a["items"])},
        lambda a: a | {"users": a["users"] // 2},
        lambda a: a | {"features": table(seed=1)},
        lambda a: a | {"features": table(absent=(4,))},
        lambda a: a | {"behaviour_window": 3},
        lambda a: a | {"behaviour_k": 2},
        lambda a: a | {"relation_graph": "mix"},
        lambda a: a | {"knn_k": 3},
    ],
    ids=["item", "user", "features", "presence", "window", "behaviour_k", "relation", "knn_k"],
)
def test_any_other_input_is_computed_anew(tmp_path, change):
    users, items = interactions()
    inputs = {"features": table(), "users": users, "items": items, **OPTIONS}
    item_graphs(**inputs, cache_dir=tmp_path)
    found = item_graphs(**change(inputs), cache_dir=tmp_path)
    fresh = item_graphs(**change(inputs), cache_dir=tmp_path / "fresh")
    assert_close(dense(found.behaviour), dense(fresh.behaviour))
    assert_close(dense(found.modal["look"]), dense(fresh.modal["look"]))


def test_beta_is_part_of_the_key_of_mix(tmp_path):
    users, items = interactions()
    for beta in (0.2, 0.8):
        options = OPTIONS | {"relation_graph": "mix", "mix_beta": beta}
        item_graphs(table(), users, items, **options, cache_dir=tmp_path)
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize("damage", ["cut", "text", "forged"])
def test_damaged_cache_file_is_computed_anew(tmp_path, damage, caplog):
    users, items = interactions()
    first = item_graphs(table(), users, items, **OPTIONS, cache_dir=tmp_path)
    for path in tmp_path.glob("*.npz"):
        if damage == "cut":
            os.truncate(path, path.stat().st_size // 2)
        elif damage == "text":
            path.write_text("not an archive")
        else:
            with np.load(path) as file:
                parts = dict(file)
            parts["indices"] += 1000  # would be read beyond the end
            np.savez(path, **parts)
    with caplog.at_level(logging.WARNING):
        second = item_graphs(table(), users, items, **OPTIONS, cache_dir=tmp_path)
    assert caplog.text.count("computed anew") == 2
    assert_close(dense(second.modal["look"]), dense(first.modal["look"]))


def test_pickle_in_a_cache_file_is_not_executed(tmp_path):
    users, items = interactions()
    canary = tmp_path / "canary"

    class Trap:
        def __reduce__(self):
            return Path.touch, (canary,)

    cache = tmp_path / "cache"
    item_graphs(table(), users, items, **OPTIONS, cache_dir=cache)
    for path in cache.glob("*.npz"):
        np.savez(path, data=np.array([Trap()], dtype=object))
    item_graphs(table(), users, items, **OPTIONS, cache_dir=cache)
    assert not canary.exists()


def test_nothing_is_left_of_a_write_that_failed(tmp_path, monkeypatch, caplog):
    users, items = interactions()

    def full(file, **parts):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(item_graph.np, "savez", full)
    with caplog.at_level(logging.WARNING):
        graphs = item_graphs(table(), users, items, **OPTIONS, cache_dir=tmp_path)
    assert graphs.behaviour.nnz > 0
    assert files(tmp_path) == []
    assert "set feature_cache_dir or RECBOLE_MM_CACHE" in caplog.text


def test_a_cache_that_is_no_folder_costs_a_warning(tmp_path, caplog):
    users, items = interactions()
    (tmp_path / "cache").write_text("")
    graphs = item_graphs(table(), users, items, **OPTIONS, cache_dir=tmp_path / "cache")
    whole = item_graphs(table(), users, items, **OPTIONS, cache_dir=tmp_path / "other")
    assert_close(dense(graphs.modal["look"]), dense(whole.modal["look"]))
    assert caplog.text.count("set feature_cache_dir or RECBOLE_MM_CACHE") == 2


def test_of_two_that_need_a_graph_one_computes_and_the_other_waits(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="recbole_mm.files")
    users, items = interactions()
    compute, calls, started = item_graph.behaviour_graph, [], threading.Event()

    def slow(*args, **options):
        calls.append(1)
        started.set()
        ends = time.monotonic() + 60
        while "another process computes it" not in caplog.text and time.monotonic() < ends:
            time.sleep(0.01)
        return compute(*args, **options)

    def needed():
        return item_graphs(table(), users, items, **OPTIONS, cache_dir=tmp_path)

    monkeypatch.setattr(item_graph, "behaviour_graph", slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(needed)
        assert started.wait(60)
        second = pool.submit(needed)
        graphs = [first.result(60).behaviour, second.result(60).behaviour]
    assert len(calls) == 1
    assert_close(dense(graphs[0]), dense(graphs[1]))


def test_default_folder_is_that_of_derived_features(tmp_path, monkeypatch):
    monkeypatch.setenv("RECBOLE_MM_CACHE", str(tmp_path))
    item_graphs(table(), *interactions(), **OPTIONS)
    assert len(files(tmp_path)) == 2


# ------------------------------------------------------------------------------- reading one


def test_neighbours_are_sorted_by_weight_then_id():
    graph = sp.csr_matrix(np.array([[0, 0, 0, 0], [0, 0, 2, 2], [0, 5, 0, 1], [0, 0, 0, 0]]))
    assert neighbours(graph, 1, 5) == [(2, 2.0), (3, 2.0)]
    assert neighbours(graph, 2, 1) == [(1, 5.0)]
    assert neighbours(graph, 3, 1) == []
    for item in (0, 4, -1):
        with pytest.raises(ValueError, match=r"item must lie in \[1, 4\)"):
            neighbours(graph, item, 1)


def test_overlap_equals_loop_over_items():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 30, 30)) * (rng.random((2, 30, 30)) < 0.2)
    a[:, 0] = a[0] = b[:, 0] = b[0] = 0  # padding
    a[4] = 0
    graphs = {"a": sp.csr_matrix(a), "b": sp.csr_matrix(b)}
    for k in (1, 3, 100):
        found = []
        for i in range(1, 30):
            first, second = ({j for j, _ in neighbours(g, i, k)} for g in graphs.values())
            if first and second:
                found.append(len(first & second) / len(first | second))
        assert len(found) < 29
        assert overlap(graphs, k)["a", "b"] == pytest.approx(np.mean(found))


def test_overlap_of_a_graph_with_itself_is_one_and_with_nothing_is_not_a_number():
    graph = symmetric_normalise(sp.random(30, 30, 0.2, format="csr", random_state=0))
    found = overlap({"a": graph, "b": graph, "none": sp.csr_matrix((30, 30))}, 3)
    assert found["a", "b"] == 1.0
    assert np.isnan(found["a", "none"])
