"""Ranking metrics at a bounded memory, under RecBole's evaluator; results of single users.

RecBole's trainer asks for the scores of a batch of users, its collector ranks them, its evaluator
computes the metrics. Here the batch comes back ranked already (:class:`Ranked`), made in pieces
whose scores stay within ``eval_memory_mb``; :class:`Collector` hands RecBole's evaluator what it
expects. Every metric is RecBole's own, and equal to what RecBole gives wherever scores have no
ties; ties are drawn without bias (:mod:`recbole_mm.ops.ranking`).

- Full ranking of our models: vectors of users times chunks of the item table.
- Full ranking of RecBole's models: ``full_sort_predict`` for as many users as the memory allows;
  what a model allocates besides its scores is its own.
- Sampled candidates (``uni100``, ``pop100``): RecBole's path, which holds users x items; ties are
  drawn here too.
- Value metrics of context-aware models: RecBole's path, untouched.

Shapes: B users of a batch, N items, k length of the lists, P pairs of a row and a target.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from recbole.data.dataloader.general_dataloader import FullSortEvalDataLoader
from recbole.evaluator.base_metric import TopkMetric
from recbole.evaluator.collector import Collector as RecBoleCollector
from recbole.evaluator.evaluator import Evaluator as RecBoleEvaluator
from recbole.evaluator.register import metrics_dict
from recbole.model.abstract_recommender import AbstractRecommender
from torch import Tensor

from recbole_mm import compat, distributed
from recbole_mm.data.sequential_dataset import MultimodalSequentialDataset
from recbole_mm.errors import InputError, NumericalError, nearest
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


# What a collector holds a row of for each row of the evaluation.
_OF_ROWS = ("rec.topk", "rec.meanrank", "rec.score", "rec.items", "data.label")


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
        return min(n_rows, max(few, self.tile // 2 // self.n_items))

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


def _joined(parts: list[Ranked]) -> Ranked:
    """Batches as one."""
    offsets = np.cumsum([0, *(len(part.users) for part in parts[:-1])]).tolist()
    rows = torch.cat([part.rows + o for part, o in zip(parts, offsets, strict=True)])
    found = [part.places for part in parts if part.places is not None]
    return Ranked(
        torch.cat([part.users for part in parts]),
        torch.cat([part.topk for part in parts]),
        torch.cat([part.hits for part in parts]),
        rows,
        torch.cat([part.targets for part in parts]),
        Places(*(torch.cat(pair) for pair in zip(*found, strict=True))) if found else None,
    )


class Collector(RecBoleCollector):
    """RecBole's collector, for batches that come ranked.

    Attributes:
        kept: Batches since the last :meth:`take`, while ``keeps`` is set.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.keeps = False
        self.kept: list[Ranked] = []

    @property
    def wants(self) -> dict[str, Any]:
        """Arguments of :func:`rank` for the metrics of the configuration."""
        return {
            "k": max(self.topk),
            "placed": self.keeps or bool(self.register.need("rec.meanrank")),
        }

    def eval_batch_collect(
        self,
        scores_tensor: Tensor | Ranked | None,
        interaction: Interaction,
        positive_u: Tensor,
        positive_i: Tensor,
    ) -> None:
        """Collect what the metrics need; arguments as in RecBole, or a ranked batch as scores.

        Without scores the batch is another process's.
        """
        if scores_tensor is None:
            return
        if not isinstance(scores_tensor, Ranked):
            super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)
            return
        ranked = scores_tensor
        n_targets = torch.bincount(ranked.rows, minlength=ranked.users.size(0))
        if self.register.need("rec.items"):
            if (ranked.topk == 0).any():
                raise InputError(
                    f"topk {self.topk}: a user has fewer candidates than {max(self.topk)}, and the "
                    "metrics of coverage, popularity and diversity would count the empty places; "
                    "lower topk or leave these metrics out"
                )
            self.data_struct.update_tensor("rec.items", ranked.topk)
        if self.register.need("rec.topk"):
            hits = torch.cat((ranked.hits.long(), n_targets[:, None]), 1)
            self.data_struct.update_tensor("rec.topk", hits)
        if self.register.need("rec.meanrank") and ranked.places is not None:
            sums = torch.zeros(len(ranked.users), dtype=torch.float64, device=n_targets.device)
            sums.index_add_(0, ranked.rows, ranked.places.mean_ranks)
            columns = (sums, ranked.places.n_candidates.double(), n_targets.double())
            self.data_struct.update_tensor("rec.meanrank", torch.stack(columns, 1))
        if self.keeps:
            self.kept.append(ranked.cpu())

    def get_data_struct(self) -> Any:
        """What the evaluator needs; forgets what belongs to this evaluation.

        RecBole 1.2.1 moves everything to the CPU, numbers and counters too, which fails: it cannot
        compute the metrics of coverage, popularity and diversity. Bound: RecBole > 1.2.1.
        """
        held = self.data_struct._data_dict
        plain = {key: value for key, value in held.items() if not isinstance(value, Tensor)}
        for key in plain:
            del self.data_struct[key]
        struct = super().get_data_struct()
        for key, value in plain.items():
            struct.set(key, value)
            self.data_struct.set(key, value)
        _gather_rows(struct)
        return struct

    def take(self, dataset: Any) -> PerUser | None:
        """What all processes kept, as results of single users; forgets it."""
        kept = [ranked for part in distributed.gathered(self.kept) for ranked in part]
        self.kept = []
        return _per_user(kept, dataset) if kept else None


def _gather_rows(struct: Any) -> None:
    """Join what each process collected of its rows, in the order of the rows."""
    if distributed.n_processes() == 1:
        return
    mine = {key: struct.get(key) for key in _OF_ROWS if key in struct}
    parts = distributed.gathered(mine)
    for key in dict.fromkeys(key for part in parts for key in part):
        struct.set(key, torch.cat([part[key] for part in parts if key in part]))


class Evaluator(RecBoleEvaluator):
    """RecBole's evaluator, whose metrics of popularity look each item up once.

    RecBole searches a list for each place of each user: a minute for 50,000 lists of 20 items.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for metric in self.metric_class.values():
            for name in ("get_tail", "get_pop"):
                if hasattr(metric, name):
                    setattr(metric, name, _once_an_item(getattr(metric, name)))


def _once_an_item(look_up: Callable[..., NDArray[Any]]) -> Callable[..., NDArray[Any]]:
    def faster(item_matrix: NDArray[Any], counts: dict[int, int]) -> NDArray[Any]:
        items, place = np.unique(item_matrix, return_inverse=True)
        values: NDArray[Any] = look_up(items[None], counts)[0]
        return values[place].reshape(item_matrix.shape)

    return faster


@dataclass(frozen=True, eq=False)
class PerUser:
    """What each row of an evaluation got: R rows, P pairs of a row and a target.

    With leave-one-out there is one row a user and one target a row.

    Attributes:
        users: ``(R,)`` user tokens.
        rows: ``(P,)`` row of each target, ascending.
        targets: ``(P,)`` internal item ids.
        ranks: ``(P,)`` among all candidates of the row, 1 for the best.
        topk: ``(R, k)`` internal item ids, best first; 0 where a row has fewer candidates.
        items: ``(N,)`` item token of each internal id.
    """

    users: NDArray[np.str_]
    rows: NDArray[np.int64]
    targets: NDArray[np.int64]
    ranks: NDArray[np.int64]
    topk: NDArray[np.int64]
    items: NDArray[np.str_]

    def metric(self, name: str) -> NDArray[np.float64]:
        """RecBole's metric of each row, ``(R,)``.

        Args:
            name: ``hit``, ``mrr``, ``ndcg``, ``recall``, ``map`` or ``precision`` and its cut-off,
                as in ``ndcg@10``. The ranks are complete: any cut-off will do.

        Raises:
            InputError: For another name.
        """
        compat.set_numpy_names()
        kind, _, cut = name.lower().partition("@")
        known = {n for n, cls in metrics_dict.items() if issubclass(cls, TopkMetric)}
        if kind not in known or not cut.isdigit() or int(cut) < 1:
            raise InputError(
                f"{name!r} is no metric of single users{nearest(kind, known)}; "
                f"known: {', '.join(sorted(known))}, with a cut-off as in ndcg@10"
            )
        k = int(cut)
        hits = np.zeros((len(self.users), k), dtype=bool)
        inside = self.ranks <= k
        hits[self.rows[inside], self.ranks[inside] - 1] = True
        n_targets = np.bincount(self.rows, minlength=len(self.users))
        formula = metrics_dict[kind]({"topk": [k], "metric_decimal_place": 6})
        needs_count = kind in ("recall", "ndcg", "map")
        values = formula.metric_info(hits, n_targets) if needs_count else formula.metric_info(hits)
        result: NDArray[np.float64] = np.asarray(values[:, k - 1], dtype=np.float64)
        return result

    def frame(self, metrics: Iterable[str]) -> pd.DataFrame:
        """A column for each metric, indexed by user token; mean of a user's rows."""
        columns = {name: self.metric(name) for name in metrics}
        table = pd.DataFrame(columns, index=pd.Index(self.users, name="user"))
        return table if table.index.is_unique else table.groupby(level="user", sort=False).mean()

    def arrays(self) -> dict[str, Any]:
        """The attributes by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def save(self, path: str | Path) -> None:
        """Write an ``.npz``."""
        with Path(path).open("wb") as file:
            np.savez_compressed(file, **self.arrays())

    @classmethod
    def load(cls, path: str | Path) -> PerUser:
        """Read what :meth:`save`, or a run with ``save_per_user``, wrote.

        Raises:
            InputError: If the file is another.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(**{field.name: file[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise InputError(
                f"{path}: not a file of results by user ({error}); "
                "a run writes per_user.npz with save_per_user: True"
            ) from error


@torch.no_grad()
def per_user(model: Any, data: Any, k: int | None = None) -> PerUser:
    """Rank the catalogue for each row of a part, with the weights as they are.

    Args:
        model: A model of this package or of RecBole, or a trainer that has one.
        data: The loader of a part that is evaluated by full ranking.
        k: Length of the lists; the largest of ``topk`` without one.

    Raises:
        InputError: If the part is evaluated on sampled candidates.
        NumericalError: If a score is not finite.
    """
    if not isinstance(data, FullSortEvalDataLoader):
        raise InputError("per_user ranks the whole catalogue: set eval_args mode to full")
    config = data.config
    if isinstance(model, torch.nn.Module):
        ranker = Ranker(model, config, data._dataset)
    else:
        ranker = Ranker(model.model, config, data._dataset, model.without_padding)
    training = ranker.model.training
    ranker.model.eval()
    k = max(config["topk"]) if k is None else k
    try:
        kept = [ranker(batch, k=k, placed=True) for batch in data]
    finally:
        ranker.model.train(training)
    return _per_user(kept, data._dataset)


def _per_user(kept: list[Ranked], dataset: Any) -> PerUser:
    ranked = _joined(kept)
    if ranked.places is None:
        raise ValueError("the batches were ranked without places")
    items = np.asarray(dataset.field2id_token[dataset.iid_field]).astype(str)
    users = np.asarray(dataset.field2id_token[dataset.uid_field]).astype(str)
    return PerUser(
        users=users[ranked.users.cpu().numpy()],
        rows=ranked.rows.cpu().numpy(),
        targets=ranked.targets.cpu().numpy(),
        ranks=ranked.places.ranks.cpu().numpy(),
        topk=ranked.topk.cpu().numpy(),
        items=items,
    )
