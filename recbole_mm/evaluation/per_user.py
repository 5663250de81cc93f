"""What each row of an evaluation got: metrics of single users, ranks, lists."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from recbole.data.dataloader.general_dataloader import FullSortEvalDataLoader
from recbole.evaluator.base_metric import TopkMetric
from recbole.evaluator.register import metrics_dict

from recbole_mm import compat
from recbole_mm.errors import InputError, nearest
from recbole_mm.evaluation.ranker import Ranked, Ranker
from recbole_mm.ops.ranking import Places


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
        if kind not in known or not cut.isdecimal() or int(cut) < 1:
            near = "" if kind in known else nearest(kind, known)
            raise InputError(
                f"{name!r} is no metric of single users{near}; "
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
            file = np.load(path, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array")
            with file:
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
    return per_user_of(kept, data._dataset)


def per_user_of(kept: list[Ranked], dataset: Any) -> PerUser:
    """What ranked batches with places, of one part, say of each row."""
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
