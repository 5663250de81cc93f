"""Scores of a batch of users, made and ranked in pieces.

Shapes: B users of a batch, N items, k length of the lists, P pairs of a row and a target.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from recbole.model.abstract_recommender import AbstractRecommender
from torch import Tensor

from recbole_mm.data.sequential_dataset import MultimodalSequentialDataset
from recbole_mm.errors import NumericalError
from recbole_mm.models.base import MultimodalSequentialRecommender
from recbole_mm.ops.aligned_products import AlignedProducts, aligned_rows
from recbole_mm.ops.ranking import Chunks, Places, places, top_k

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

    from recbole_mm.config import Config

_LOG = logging.getLogger(__name__)

# Scores that are in work at once on a CPU, 16 MiB: more than the caches hold is slower.
_CPU_TILE = 4 << 20
_MOST_ITEMS = 1 << 31  # of a catalogue, where a pair of row and item is one number
# Users of a product, if there are that many: fewer are slower.
_ROWS = 128
# Users that a model of RecBole's scores at once, if memory allows: fewer make its calls costly.
_FEW_ROWS = 32
# Scores, their copies while they are ranked, and the random numbers of ties.
_COPIES = 8
# What one pair of user and item takes inside a model that only has `predict`: about 1,000 floats.
_BYTES_A_PAIR = 4096


class Ranked(NamedTuple):
    """What the metrics need to know of a batch.

    Attributes:
        users: ``(B,)`` internal ids.
        topk: ``(B, k)`` item ids, best first; 0 where a row has fewer candidates.
        hits: ``(B, k)`` bool, whether each of them is a target.
        rows: ``(P,)`` row of each target, ascending.
        targets: ``(P,)`` item ids.
        places: Ranks of the targets, if asked for.
    """

    users: Tensor
    topk: Tensor
    hits: Tensor
    rows: Tensor
    targets: Tensor
    places: Places | None

    def put(self, rows: slice, part: Ranked) -> None:
        """Write what was found for some rows."""
        self.topk[rows] = part.topk
        self.hits[rows] = part.hits
        if self.places is not None and part.places is not None:
            first = int(torch.searchsorted(self.rows, rows.start))
            pairs = slice(first, first + part.rows.size(0))
            self.places.ranks[pairs] = part.places.ranks
            self.places.mean_ranks[pairs] = part.places.mean_ranks
            self.places.n_candidates[rows] = part.places.n_candidates

    def cpu(self) -> Ranked:
        """The same on the CPU."""
        users, topk, hits, rows, targets = (part.cpu() for part in self[:5])
        found = self.places and Places(*(part.cpu() for part in self.places))
        return Ranked(users, topk, hits, rows, targets, found)


def rank(
    chunks: Chunks, users: Tensor, rows: Tensor, targets: Tensor, *, k: int, placed: bool
) -> Ranked:
    """Rank the scores of some users.

    Args:
        chunks: The scores; masked items are ``-inf``.
        users: ``(B,)`` internal ids, what ties are drawn by.
        rows: ``(P,)`` row of each target, ascending.
        targets: ``(P,)`` item ids.
        k: Length of the lists.
        placed: Whether ``places`` are wanted; takes another pass over the scores.
    """
    _, topk = top_k(chunks, users, k)
    hits = torch.zeros_like(topk, dtype=torch.bool)
    if rows.numel():
        pairs = (rows * _MOST_ITEMS + targets).sort().values
        row = torch.arange(topk.size(0), device=topk.device)[:, None]
        listed = row * _MOST_ITEMS + topk
        near = torch.searchsorted(pairs, listed).clamp_(max=pairs.numel() - 1)
        hits = (pairs[near] == listed) & (topk > 0)
    found = places(chunks, users, rows, targets) if placed else None
    return Ranked(users, topk, hits, rows, targets, found)


class Ranker:
    """Scores and ranks the batches of a full ranking within ``eval_memory_mb``.

    Args:
        model: A model of this package or of RecBole.
        config: The resolved configuration.
        dataset: The part that is evaluated.
        prepare: What is done to a batch before the model sees it.
    """

    def __init__(
        self,
        model: Any,
        config: Config,
        dataset: Any,
        prepare: Callable[[Interaction], Interaction] = lambda batch: batch,
    ) -> None:
        self.model = model
        self.config = config
        self.dataset = dataset
        self.prepare = prepare
        self.n_items = int(dataset.item_num)
        self.device = torch.device(config["device"])
        memory = int(config["eval_memory_mb"] * 2**20)
        self.most_scores = memory // _COPIES // 4
        on_cpu = self.device.type == "cpu"
        self.tile = min(self.most_scores, _CPU_TILE) if on_cpu else self.most_scores
        self.n_pairs = max(1, memory // _BYTES_A_PAIR)
        kind = type(model)
        ours = MultimodalSequentialRecommender.full_sort_predict
        self.multiplies = kind.full_sort_predict is ours
        self.only_predicts = kind.full_sort_predict is AbstractRecommender.full_sort_predict
        self.most_rows: int | None = None  # what a device had memory for
        self._item_features: Any = None

    def __call__(self, batched_data: Any, *, k: int, placed: bool) -> Ranked:
        """Rank one batch of RecBole's ``FullSortEvalDataLoader``; arguments as in :func:`rank`.

        Raises:
            NumericalError: If a score is not finite.
        """
        interaction, history, positive_u, positive_i = batched_data
        if not self.config["mask_history"]:
            history = None  # RecBole's general loaders bring it along
        elif isinstance(self.dataset, MultimodalSequentialDataset):
            history = self.dataset.history(interaction)
        interaction = self.prepare(interaction).to(self.device)
        users = interaction[self.config["USER_ID_FIELD"]]
        targets = _Pairs.of(positive_u, positive_i, self.device)
        masked = None if history is None else _Pairs.of(history[0], history[1], self.device)
        # one table for all pieces: what outlives a piece would split the memory of its scores
        whole = _unranked(users, targets, k=k, placed=placed)
        done, step = 0, self._rows_at_once(users.size(0))
        while done < users.size(0):
            full = False
            try:
                for rows, chunks in self._scores(interaction, done, done + step, masked):
                    some = targets.of_rows(rows)
                    whole.put(rows, rank(chunks, users[rows], *some, k=k, placed=placed))
                    del chunks  # the next piece finds the memory of this one
            except torch.cuda.OutOfMemoryError:
                if step == 1:
                    raise
                full = True
            if full:  # out here, where the error holds no tensors any more
                step = self.most_rows = step // 2
                _LOG.warning("evaluation: out of device memory, going on with %d users", step)
                torch.cuda.empty_cache()
            else:
                done += step
        return whole

    def sampled(
        self,
        scores: Tensor,
        interaction: Interaction,
        row: Tensor,
        positive_u: Tensor,
        positive_i: Tensor,
        *,
        k: int,
        placed: bool,
    ) -> Ranked:
        """Rank sampled candidates that RecBole scored; ``scores`` of the others are ``-inf``.

        Raises:
            NumericalError: If a score is not finite.
        """
        users = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        row = row.to(scores.device)
        users[row] = interaction[self.config["USER_ID_FIELD"]].to(scores.device)
        drawn = scores[row, interaction[self.config["ITEM_ID_FIELD"]].to(scores.device)]
        if not torch.isfinite(drawn).all():
            raise NumericalError(
                f"evaluation: the score of a sampled item is {drawn[~torch.isfinite(drawn)][0]}; "
                "the model has diverged"
            )
        targets = _Pairs.of(positive_u, positive_i, scores.device)
        return rank(lambda: ((0, scores),), users, *targets, k=k, placed=placed)

    def _rows_at_once(self, n_rows: int) -> int:
        """Users that go through the model together."""
        if self.most_rows is not None:
            return min(n_rows, self.most_rows)
        if self.multiplies:
            return n_rows
        if self.only_predicts:
            return min(n_rows, max(1, self.n_pairs // self.n_items))
        # a model makes its scores anew each time: smaller ones find the memory of the last
        few = max(1, min(_FEW_ROWS, self.most_scores // self.n_items))
        return min(n_rows, max(few, self.tile // self.n_items))

    def _scores(
        self, interaction: Interaction, start: int, stop: int, masked: _Pairs | None
    ) -> Iterator[tuple[slice, Chunks]]:
        """Rows of the batch and their scores, piece by piece; a piece lives until the next."""
        batch = interaction[start:stop]
        if not self.multiplies:
            scores = self._predict(batch) if self.only_predicts else self._full_sort(batch)
            self._settle(scores, 0, start, masked)
            yield slice(start, start + scores.size(0)), lambda: ((0, scores),)
            return
        vectors = self.model.user_vectors(batch)  # (B, D)
        items = self.model.scoring_table()  # (N, D)
        n_rows = min(len(vectors), max(_ROWS, self.tile // self.n_items))
        width = min(self.n_items, max(_ROWS, self.tile // n_rows))
        buffer = aligned_rows(vectors, n_rows, width)
        for first in range(0, len(vectors), n_rows):
            some = vectors[first : first + n_rows]
            rows = slice(start + first, start + first + len(some))
            yield rows, self._products(some, items, width, buffer, rows.start, masked)

    def _products(
        self,
        vectors: Tensor,
        items: Tensor,
        width: int,
        buffer: Tensor,
        first_row: int,
        masked: _Pairs | None,
    ) -> Chunks:
        whole: list[Tensor] = []  # scores that fit the buffer are not computed again

        def chunks() -> Iterator[tuple[int, Tensor]]:
            if whole:
                yield 0, whole[0]
                return
            for start in range(0, self.n_items, width):
                some = items[start : start + width]
                scores = buffer[: len(vectors), : len(some)]
                torch.mm(vectors, some.T, out=scores)
                self._settle(scores, start, first_row, masked)
                if len(some) == self.n_items:
                    whole.append(scores)
                yield start, scores

        return chunks

    def _full_sort(self, batch: Interaction) -> Tensor:
        with AlignedProducts(self.n_items):
            scores: Tensor = self.model.full_sort_predict(batch)
        return scores.reshape(-1, self.n_items)

    def _predict(self, batch: Interaction) -> Tensor:
        """Scores of all items by ``predict``, as RecBole's trainer gets them, piece by piece."""
        if self._item_features is None:
            self._item_features = self.dataset.get_item_feature().to(self.device)
        pairs = batch.repeat_interleave(self.n_items)
        pairs.update(self._item_features.repeat(len(batch)))
        scores = [
            self.model.predict(pairs[start : start + self.n_pairs]).reshape(-1)
            for start in range(0, len(pairs), self.n_pairs)
        ]
        return torch.cat(scores).view(-1, self.n_items)

    def _settle(self, scores: Tensor, start: int, first_row: int, masked: _Pairs | None) -> None:
        """Check scores, then give padding and masked items ``-inf``, in place."""
        if start == 0:
            scores[:, 0] = 0.0
        # NaN and infinity reach the sum; a sum may overflow by itself
        if not math.isfinite(scores.sum()):
            wrong = (~torch.isfinite(scores)).nonzero()
            if len(wrong):
                row, item = wrong[0].tolist()
                raise NumericalError(
                    f"evaluation: the score of item id {start + item} in row {first_row + row} is "
                    f"{scores[row, item].item()}; the model has diverged"
                )
        if start == 0:
            scores[:, 0] = -torch.inf
        if masked is not None:
            rows, items = masked.of_rows(slice(first_row, first_row + scores.size(0)))
            if scores.size(1) < self.n_items:
                inside = (items >= start) & (items < start + scores.size(1))
                rows, items = rows[inside], items[inside] - start
            scores[rows, items] = -torch.inf


class _Pairs(NamedTuple):
    """Pairs of a row of a batch and an item, by ascending row."""

    rows: Tensor
    items: Tensor

    @classmethod
    def of(cls, rows: Tensor, items: Tensor, device: torch.device) -> _Pairs:
        rows, items = rows.to(device), items.to(device)
        if bool((rows[1:] < rows[:-1]).any()):
            rows, order = rows.sort(stable=True)
            items = items[order]
        return cls(rows, items)

    def of_rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Rows, counted from the first of the slice, and items."""
        bounds = torch.tensor([rows.start, rows.stop], device=self.rows.device)
        first, last = torch.searchsorted(self.rows, bounds).tolist()
        return self.rows[first:last] - rows.start, self.items[first:last]


def _unranked(users: Tensor, targets: _Pairs, *, k: int, placed: bool) -> Ranked:
    """A batch before anything is known of it; see :meth:`Ranked.put`."""
    n_pairs = targets.rows.size(0)
    return Ranked(
        users,
        users.new_zeros(users.size(0), k),
        users.new_zeros(users.size(0), k, dtype=torch.bool),
        *targets,
        Places(
            users.new_zeros(n_pairs),
            users.new_zeros(n_pairs, dtype=torch.float64),
            torch.zeros_like(users),
        )
        if placed
        else None,
    )
