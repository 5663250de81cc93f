r"""Graphs between items: who is consumed together, and who looks alike.

=============================  ====================================================
behaviour graph C              :func:`behaviour_graph`
k nearest neighbours           :func:`knn_graph`
modal graph ``smooth, mix``    :func:`modal_graph`
D^-1/2 A D^-1/2                :func:`symmetric_normalise`
all of a data set, from cache  :func:`item_graphs`
what a graph says              :func:`neighbours`, :func:`overlap`
=============================  ====================================================

Everything is scipy CSR over internal item ids; padding (id 0) has no row and no column. Of the
interactions only those of training are read.

Shapes: T training interactions, N items (row 0 is padding), n items with a modality, F feature
width.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from recbole_mm.data.derive import CACHE_MEND, cache_folder
from recbole_mm.errors import EnvironmentFault, check_choice
from recbole_mm.files import alone, replacing, writing

if TYPE_CHECKING:
    from recbole_mm.data.features import FeatureTable

_LOG = logging.getLogger(__name__)

GRAPH_VERSION = 2
"""Raise it when a change here changes edges: every cache file of before is then a miss."""

RELATION_GRAPHS = ("smooth", "mix")

IntArray: TypeAlias = npt.NDArray[np.integer[Any]]
FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]

_CHUNK = 1 << 20  # interactions, and entries of a matrix, that are sorted at once
_NOISE = 1e-6  # cosines closer than this are equal up to the rounding of their products


@dataclass(frozen=True, eq=False)
class ItemGraphs:
    """The graphs of a data set.

    Attributes:
        behaviour: C, ``(N, N)``: rows sum to one, or are empty; not symmetric.
        modal: By modality, ``(N, N)``: in row i the neighbours of i; not symmetric.
    """

    behaviour: sp.csr_matrix
    modal: Mapping[str, sp.csr_matrix]


# ------------------------------------------------------------------------------- behaviour


def behaviour_graph(
    users: IntArray, items: IntArray, n_items: int, *, window: int, top_k: int
) -> sp.csr_matrix:
    r"""Who is consumed together.

    .. math::
        c_{ij} = |\{u : i \neq j \text{ stand at most } w \text{ places apart in } u\}|, \qquad
        C_{ij} = \frac{c_{ij}}{\sum_{j' \in \operatorname{top-}k(i)} c_{ij'}}

    A user counts once for a pair, however often it recurs. Among equal counts the item with fewer
    users is kept, then the one with the lower id.

    Source: [ours]; the abstract of MDSRec (arXiv 2412.08103) says that behaviour shapes the graphs.

    Args:
        users: ``(T,)``, the interactions of a user standing together, in the order of time.
        items: ``(T,)`` internal ids in [1, N).
        n_items: Number of items ``N``, padding included.
        window: Largest distance ``w`` of two items of a pair; 1 pairs direct neighbours only.
        top_k: Neighbours kept for an item; 0 gives an empty graph.

    Returns:
        ``(N, N)`` float32; each row sums to one, or is empty.

    Raises:
        ValueError: If the arrays do not fit together, ``users`` is not sorted or an id, ``window``
            or ``top_k`` is out of range.
    """
    users, items = np.asarray(users, np.int64), np.asarray(items, np.int64)
    if users.ndim != 1 or users.shape != items.shape:
        raise ValueError(f"users {users.shape} and items {items.shape} must both be (T,)")
    if window < 1 or top_k < 0:
        raise ValueError(f"window must be at least 1 and top_k 0, got {window} and {top_k}")
    if len(users) and (np.diff(users) < 0).any():
        raise ValueError("users must be sorted, the interactions of each in the order of time")
    if len(items) and not 1 <= items.min() <= items.max() < n_items:
        raise ValueError(f"items must lie in [1, {n_items}), got {items.min()} to {items.max()}")

    shape = (n_items, n_items)
    counts = sp.csr_matrix(shape, dtype=np.int64)
    starts = np.flatnonzero(np.diff(users, prepend=users[:1] - 1))
    for first, last in _chunks(np.append(starts, len(users))):
        low, high = _pairs(users[first:last], items[first:last], window)
        ones = np.ones(len(low), np.int64)
        counts = counts + sp.csr_matrix((ones, (low, high)), shape)  # duplicates are summed
    counts = (counts + counts.T).tocsr()

    order = np.lexsort((items, users))
    is_new = np.ones(len(order), bool)
    is_new[1:] = (np.diff(users[order]) != 0) | (np.diff(items[order]) != 0)
    n_users = np.bincount(items[order[is_new]], minlength=n_items)
    return _row_normalise(_row_top_k(counts, top_k, n_users))


def _chunks(bounds: IntArray) -> Iterator[tuple[int, int]]:
    """Runs of whole segments, of ``_CHUNK`` entries or a single segment."""
    first = 0
    while first < len(bounds) - 1:
        last = int(np.searchsorted(bounds, bounds[first] + _CHUNK, side="right")) - 1
        last = max(last, first + 1)
        yield int(bounds[first]), int(bounds[last])
        first = last


def _pairs(users: IntArray, items: IntArray, window: int) -> tuple[IntArray, IntArray]:
    """Pairs ``low < high`` of items within the window; each once for a user."""
    pairs = []
    for distance in range(1, min(window, len(users) - 1) + 1):
        left, right = items[:-distance], items[distance:]
        kept = (users[:-distance] == users[distance:]) & (left != right)
        a, b = left[kept], right[kept]
        pairs.append(np.stack([users[distance:][kept], np.minimum(a, b), np.maximum(a, b)]))
    if not pairs:
        return items[:0], items[:0]
    triples = np.concatenate(pairs, axis=1)
    triples = triples[:, np.lexsort(triples[::-1])]
    is_new = np.ones(triples.shape[1], bool)
    is_new[1:] = (np.diff(triples, axis=1) != 0).any(axis=0)
    return triples[1, is_new], triples[2, is_new]


def _row_top_k(matrix: sp.csr_matrix, k: int, rank: IntArray | None = None) -> sp.csr_matrix:
    """The k largest entries of each row; among equals the lower ``rank`` first, if given."""
    kept = np.zeros(matrix.nnz, bool)
    bounds = matrix.indptr.astype(np.int64)
    for first, last in _chunks(bounds):
        column, value = matrix.indices[first:last], matrix.data[first:last]
        row = np.searchsorted(bounds, np.arange(first, last), side="right")
        keys = (column, -value, row) if rank is None else (column, rank[column], -value, row)
        order = np.lexsort(keys)
        # rows stand together, before and after; a row begins where its number changes
        begins = np.flatnonzero(np.diff(row, prepend=-1))
        place = np.arange(len(row)) - np.repeat(begins, np.diff(begins, append=len(row)))
        kept[first + order[place < k]] = True
    row = np.repeat(np.arange(matrix.shape[0]), np.diff(bounds))
    return sp.csr_matrix((matrix.data[kept], (row[kept], matrix.indices[kept])), matrix.shape)


def _row_normalise(matrix: sp.csr_matrix) -> sp.csr_matrix:
    total = np.asarray(matrix.sum(axis=1), np.float64).ravel()
    inverse = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)
    return sp.csr_matrix(sp.diags(inverse) @ matrix, dtype=np.float32)


# ------------------------------------------------------------------------------- modalities


def knn_graph(vectors: FloatArray, k: int, *, block_mb: int = 256) -> sp.csr_matrix:
    """The k nearest neighbours of each item by cosine, exact.

    Scores exist for a block of items at a time, never for all pairs. Similarities that are not
    positive make no neighbours: an all-zero vector has none. Among cosines that equal the k-th up
    to rounding, the items with the lower numbers are kept: which product computed them, on which
    machine and in which blocks, does not matter.

    Args:
        vectors: ``(n, F)``.
        k: Neighbours of an item, itself not counted.
        block_mb: Memory for one block of scores, in MiB; a block has at least one item.

    Returns:
        ``(n, n)`` float32; in row i the cosine of each neighbour of i. Not symmetric.

    Raises:
        ValueError: If ``k`` is below 1 or a vector is not finite.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    n = len(vectors)
    unit = _unit_rows(vectors)
    is_finite = np.isfinite(unit.sum(axis=1))
    if not is_finite.all():
        bad = int((~is_finite).argmax())
        raise ValueError(f"vector {bad} holds NaN or Inf; mask such items")
    k = min(k, n - 1)
    if k < 1:
        return sp.csr_matrix((n, n), dtype=np.float32)

    rows = max(1, min(n, block_mb * 2**20 // (4 * n)))
    scores = np.empty((rows, n), np.float32)
    cosines, neighbour = torch.empty(n, k), torch.empty(n, k, dtype=torch.int64)
    for start in range(0, n, rows):
        block = slice(start, min(start + rows, n))
        # numpy's product: torch's may be told to round to bfloat16
        product = np.matmul(unit[block], unit.T, out=scores[: block.stop - start])
        s = torch.from_numpy(product)  # (rows, n)
        s.diagonal(start).fill_(-torch.inf)
        best, index = s.topk(k + 1)  # one more than needed shows whether the cut is a tie
        cut = best[:, k - 1]
        for row in ((cut - best[:, k] < _NOISE) & (best[:, k] > _NOISE)).nonzero().flatten():
            above = (s[row] > cut[row] + _NOISE).nonzero().flatten()  # fewer than k
            equal = ((s[row] - cut[row]).abs() <= _NOISE).nonzero().flatten()
            index[row, :k] = torch.cat([above, equal])[:k]
        neighbour[block] = index[:, :k]
        cosines[block] = s.gather(1, index[:, :k])

    kept = (cosines > _NOISE).flatten().numpy()
    row = np.repeat(np.arange(n), k)
    entries = (cosines.flatten().numpy()[kept], (row[kept], neighbour.flatten().numpy()[kept]))
    return sp.csr_matrix(entries, shape=(n, n), dtype=np.float32)


def modal_graph(
    vectors: FloatArray,
    items: IntArray,
    behaviour: sp.csr_matrix,
    *,
    relation_graph: str,
    knn_k: int,
    mix_beta: float,
) -> sp.csr_matrix:
    r"""Who looks alike in one modality, in the light of behaviour.

    ``smooth`` moves each vector towards those of the items it is consumed with, then looks for
    neighbours; ``mix`` looks for neighbours of the vectors as they are, and adds behaviour:

    .. math::
        \hat f = \bar f + C \bar f, \quad A = \operatorname{kNN}(\hat f)
        \qquad\text{or}\qquad
        A = \beta \, \operatorname{kNN}(f) + (1 - \beta) \, C

    where :math:`\bar f` has length 1, the edges of kNN weigh the cosine and, in ``mix``, sum to one
    in each row as those of C do. Signals are carried by :func:`symmetric_normalise` of A.

    Source: ``smooth`` [inferred: SMGL, by an author of MDSRec]; ``mix`` [ours]; the cosine as
    weight [inferred: LATTICE].

    Args:
        vectors: ``(n, F)``, those of ``items``.
        items: ``(n,)`` ids of the items that have the modality, ascending. All others have no row
            and no column, and lend nothing to their neighbours in C.
        behaviour: ``(N, N)``, of :func:`behaviour_graph`.
        relation_graph: ``smooth`` or ``mix``.
        knn_k: Neighbours of an item.
        mix_beta: :math:`\beta` of ``mix``, 0 to 1. 1 is the plain kNN graph, without behaviour.

    Returns:
        A, ``(N, N)`` float32; not symmetric.

    Raises:
        ValueError: If an option is unknown or out of range.
    """
    check_choice("relation_graph", relation_graph, RELATION_GRAPHS)
    if not 0 <= mix_beta <= 1:
        raise ValueError(f"mix_beta must lie in [0, 1], got {mix_beta}")
    together = behaviour[items][:, items]  # (n, n)
    if relation_graph == "smooth":
        unit = _unit_rows(vectors)
        unit += together @ unit
        alike = knn_graph(unit, knn_k)
    else:
        alike = mix_beta * _row_normalise(knn_graph(vectors, knn_k)) + (1 - mix_beta) * together
    alike = alike.tocoo()
    entries = (alike.data, (items[alike.row], items[alike.col]))
    return sp.csr_matrix(entries, shape=behaviour.shape, dtype=np.float32)


def symmetric_normalise(adjacency: sp.csr_matrix) -> sp.csr_matrix:
    r"""Both directions of every edge, divided by the degrees of its ends.

    .. math::
        S = \tfrac{1}{2} (A + A^\top), \qquad \tilde A = D^{-1/2} S D^{-1/2}, \quad
        D_{ii} = \textstyle\sum_j S_{ij}

    An edge that only one end asked for weighs half of one that both did. Eigenvalues lie in
    [-1, 1], so that no number of layers makes a signal grow.

    Args:
        adjacency: ``(N, N)``, entries not negative.

    Returns:
        ``(N, N)`` float32, exactly symmetric; items without an edge have an empty row and column.
    """
    both = sp.csr_matrix((adjacency + adjacency.T) / 2, dtype=np.float64)
    both.eliminate_zeros()
    degree = np.asarray(both.sum(axis=1)).ravel()
    inverse_root = np.divide(1.0, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    both = both.tocoo()
    # one product of the two roots, so that (i, j) and (j, i) round alike
    weight = both.data * (inverse_root[both.row] * inverse_root[both.col])
    return sp.csr_matrix((weight, (both.row, both.col)), both.shape, dtype=np.float32)


def _unit_rows(vectors: FloatArray) -> npt.NDArray[np.float32]:
    """A copy, each row of length one; zero rows stay zero."""
    unit = np.array(vectors, dtype=np.float32)
    # the largest entry first: squares of float32 overflow at 1e19
    largest = np.maximum(unit.max(axis=1, initial=0.0), -unit.min(axis=1, initial=0.0))[:, None]
    np.divide(unit, largest, out=unit, where=largest > 0)
    length = np.sqrt(np.einsum("nf,nf->n", unit, unit))[:, None]
    np.divide(unit, length, out=unit, where=length > 0)
    return unit


# ------------------------------------------------------------------------------- a data set


def item_graphs(
    features: FeatureTable,
    users: IntArray,
    items: IntArray,
    *,
    behaviour_window: int,
    behaviour_k: int,
    relation_graph: str,
    knn_k: int,
    mix_beta: float,
    cache_dir: str | Path | None = None,
) -> ItemGraphs:
    """The behaviour graph and the graph of each modality, computed or read from the cache.

    A cache file is found by a sha256 of all that the graph depends on: the vectors and who has
    them, the training interactions, the parameters. Another split, another feature file or another
    parameter is another file. Of processes that need one at the same time, one computes it and the
    others wait. A file that does not hold what was written to it is computed anew; a cache that
    cannot be written costs a warning.

    Args:
        features: Modalities over N items.
        users: As in :func:`behaviour_graph`, training interactions only.
        items: Likewise.
        behaviour_window: ``window`` of :func:`behaviour_graph`.
        behaviour_k: ``top_k`` of :func:`behaviour_graph`.
        relation_graph: As in :func:`modal_graph`.
        knn_k: Likewise.
        mix_beta: Likewise.
        cache_dir: Folder of the files; ``None`` for
            :func:`~recbole_mm.data.derive.default_cache_dir`.

    Raises:
        ValueError: as :func:`behaviour_graph` and :func:`modal_graph`.
    """
    folder = cache_folder(cache_dir)
    N = features.n_items
    options: dict[str, Any] = {"n_items": N, "window": behaviour_window, "top_k": behaviour_k}
    base = _digest(options, np.asarray(users, np.int64), np.asarray(items, np.int64))
    behaviour = _cached(
        folder / f"graph-behaviour-{base[:32]}.npz",
        "behaviour graph",
        lambda: behaviour_graph(users, items, N, window=behaviour_window, top_k=behaviour_k),
    )

    modal: dict[str, sp.csr_matrix] = {}
    options = {"relation_graph": relation_graph, "knn_k": knn_k}
    if relation_graph == "mix":
        options["mix_beta"] = mix_beta
    for name, modality in features.items():
        present = modality.present.nonzero().flatten()  # (n,)
        vectors = modality.values[modality.rows[present]].float().numpy()  # (n, F)
        who = present.numpy()

        def build(vectors: FloatArray = vectors, who: IntArray = who) -> sp.csr_matrix:
            return modal_graph(
                vectors,
                who,
                behaviour,
                relation_graph=relation_graph,
                knn_k=knn_k,
                mix_beta=mix_beta,
            )

        key = _digest({**options, "behaviour": base}, vectors, who)
        modal[name] = _cached(folder / f"graph-modal-{key[:32]}.npz", f"{name} graph", build)
    return ItemGraphs(behaviour, modal)


def _digest(options: Mapping[str, Any], *arrays: npt.NDArray[Any]) -> str:
    digest = hashlib.sha256(
        json.dumps({"version": GRAPH_VERSION, **options}, sort_keys=True).encode()
    )
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _cached(path: Path, what: str, build: Callable[[], sp.csr_matrix]) -> sp.csr_matrix:
    graph = _read(path, logging.DEBUG)  # a file that is no good is told of below
    if graph is None:
        waiting = f"{path}: another process computes it; waiting for it"
        try:
            with alone(path.with_name(f".{path.name}.lock"), CACHE_MEND, waiting):
                graph = _read(path)  # another process may have made it
                if graph is None:
                    graph = _built(what, build)
                    with writing(path, CACHE_MEND):
                        _write(path, graph)
                    return graph
        except EnvironmentFault as error:
            _LOG.warning("%s: not kept for the next run: %s", what, error)
            return _built(what, build) if graph is None else graph
    _LOG.info("%s: computed earlier, %s", what, path)
    return graph


def _built(what: str, build: Callable[[], sp.csr_matrix]) -> sp.csr_matrix:
    begin = time.perf_counter()
    graph = build()
    _LOG.info("%s: %d edges in %.1f s", what, graph.nnz, time.perf_counter() - begin)
    return graph


def _read(path: Path, level: int = logging.WARNING) -> sp.csr_matrix | None:
    """The graph in a file, or ``None`` if there is no file or it is damaged, which is logged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = {name: file[name] for name in ("data", "indices", "indptr", "shape")}
            # indices that were tampered with would make the sparse product read anywhere
            if str(file["sha256"]) == _digest({}, *parts.values()):
                entries = (parts["data"], parts["indices"], parts["indptr"])
                return sp.csr_matrix(entries, shape=tuple(parts["shape"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _LOG.log(level, "%s: cannot be read (%s); computed anew", path, error)
        return None
    _LOG.log(level, "%s: not what was written to it; computed anew", path)
    return None


def _write(path: Path, graph: sp.csr_matrix) -> None:
    """All of the file, or none."""
    shape = np.array(graph.shape, np.int64)
    parts = {"data": graph.data, "indices": graph.indices, "indptr": graph.indptr, "shape": shape}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **parts, sha256=np.array(_digest({}, *parts.values())))


# ------------------------------------------------------------------------------- reading one


def neighbours(graph: sp.csr_matrix, item: int, k: int) -> list[tuple[int, float]]:
    """The ``k`` heaviest edges in the row of ``item``, heaviest first; fewer if it has fewer.

    Raises:
        ValueError: If ``item`` is padding or no item, or ``k`` is below 1.
    """
    if not 1 <= item < graph.shape[0] or k < 1:
        raise ValueError(f"item must lie in [1, {graph.shape[0]}) and k be >= 1: {item}, {k}")
    row = slice(graph.indptr[item], graph.indptr[item + 1])
    found, weight = graph.indices[row], graph.data[row]
    order = np.lexsort((found, -weight))[:k]
    return [(int(found[i]), float(weight[i])) for i in order]


def overlap(graphs: Mapping[str, sp.csr_matrix], k: int) -> dict[tuple[str, str], float]:
    r"""How much two graphs agree: the mean Jaccard index of an item's ``k`` neighbours.

    .. math::
        J = \operatorname{mean}_i \frac{|N_a(i) \cap N_b(i)|}{|N_a(i) \cup N_b(i)|}

    over the items that have a neighbour in both graphs.

    Returns:
        By pair of names; NaN for two graphs that share no item.

    Raises:
        ValueError: If ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    sets = {name: _heaviest(graph, k) for name, graph in graphs.items()}
    found = {}
    for a, b in itertools.combinations(sets, 2):
        both = sets[a].multiply(sets[b]).sum(axis=1)
        shared = np.asarray(both, np.float64).ravel()  # (N,)
        size_a, size_b = np.diff(sets[a].indptr), np.diff(sets[b].indptr)
        known = (size_a > 0) & (size_b > 0)
        jaccard = shared[known] / (size_a + size_b - shared)[known]
        found[a, b] = float(jaccard.mean()) if known.any() else float("nan")
    return found


def _heaviest(graph: sp.csr_matrix, k: int) -> sp.csr_matrix:
    """Ones at the ``k`` heaviest edges of each row."""
    top = _row_top_k(graph, k)
    return sp.csr_matrix((np.ones(top.nnz, np.int64), top.indices, top.indptr), top.shape)
