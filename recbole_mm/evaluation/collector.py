"""RecBole's collector and evaluator, for batches that come ranked."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from recbole.evaluator.collector import Collector as RecBoleCollector
from recbole.evaluator.evaluator import Evaluator as RecBoleEvaluator
from torch import Tensor

from recbole_mm import distributed
from recbole_mm.errors import InputError
from recbole_mm.evaluation.per_user import PerUser, per_user_of
from recbole_mm.evaluation.ranker import Ranked

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

    from recbole_mm.config import Config

# What a collector holds a row of for each row of the evaluation.
_OF_ROWS = ("rec.topk", "rec.meanrank", "rec.score", "rec.items", "data.label")


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
        return per_user_of(kept, dataset) if kept else None


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
