"""Data sets of sequential models: rows that point at whole histories."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from recbole.data.dataset import Dataset, SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType
from torch import Tensor

from recbole_mm.data.dataset import MultimodalDataset
from recbole_mm.data.sequences import Histories, SequenceRows, ranges, take
from recbole_mm.errors import InputError

TARGET_ROW = "_target_row"
"""Field of an evaluation batch, with ``mask_history``: where :meth:`history` finds the past."""


class MultimodalSequentialDataset(MultimodalDataset, SequentialDataset):
    """RecBole's ``SequentialDataset`` whose sequences are gathered when a batch is made.

    Batches equal RecBole's, bit for bit, apart from the time, which is float64.

    With ``train_objective: all`` a training row is a window instead of a prefix: up to L items of a
    user's training history in ``item_id_list``, the item that follows each of them in
    ``item_id_target_list`` (0 where padding), the last of these in ``item_id``. The windows of a
    user do not overlap and end at the last training target, so that each target of the prefix rows
    occurs once. Validation and test rows stay as they are.

    With ``mask_history`` an evaluation batch has the field ``_target_row``, for :meth:`history`.
    """

    gathers_histories = True

    def __init__(self, config: Any) -> None:
        self._serves_evaluation = False
        if config["benchmark_filename"] is not None:
            for key, value, instead in (
                ("mask_history", True, False),
                ("train_objective", "all", "last"),
            ):
                if config[key] == value:
                    raise InputError(
                        f"{key}: {value} needs whole histories, but benchmark_filename gives "
                        f"lists that are cut already; set {key}: {instead}"
                    )
        super().__init__(config)

    def data_augmentation(self) -> None:
        """A row for every prefix of a user's history, without its lists."""
        self._aug_presets()
        target_list = f"{self.iid_field}_target{self.config['LIST_SUFFIX']}"
        if self._predicts_everywhere:
            self.set_field_property(
                target_list,
                FeatureType.TOKEN_SEQ,
                FeatureSource.INTERACTION,
                self.max_item_list_len,
            )
        self.sort(by=self.uid_field)  # stable: the order of time holds within a user
        columns = self.inter_feat.interaction
        users = columns[self.uid_field]
        is_first = torch.ones(len(users), dtype=torch.bool)
        is_first[1:] = users[1:] != users[:-1]
        source = Histories(
            columns=columns,
            first=is_first.nonzero().squeeze(1),
            lists={
                field: getattr(self, f"{field}_list_field")
                for field in columns
                if field != self.uid_field
            },
            targets=(self.iid_field, target_list),
            length_field=self.item_list_length_field,
            max_length=self.max_item_list_len,
        )
        self.inter_feat = source.prefixes()

    def _leave_out(self, is_cold: Tensor) -> None:
        """Likewise, out of the targets and out of the histories that lead to them."""
        rows = self.inter_feat
        self.inter_feat = rows.without(is_cold[rows.source.columns[self.iid_field]])

    def _all_times(self) -> NDArray[np.float64]:
        times: NDArray[np.float64] = self.inter_feat.source.columns[self.time_field].numpy()
        return times

    @property
    def _predicts_everywhere(self) -> bool:
        return self.config["train_objective"] == "all"

    def _prepare_parts(self, parts: list[Dataset]) -> None:
        for part in parts[1:]:
            part._serves_evaluation = True
        if self._predicts_everywhere:
            parts[0].inter_feat = parts[0].inter_feat.windows()

    def _n_targets(self) -> int:
        feat = self.inter_feat
        return len(feat.targets()) if isinstance(feat, SequenceRows) else len(feat)

    def __getitem__(self, index: Any, join: bool = True) -> Interaction:
        """Rows with their lists, joined with the features of their user and item."""
        rows = self.inter_feat[index]
        if isinstance(rows, SequenceRows):
            target = rows.target
            rows = rows.gather()
            if self._serves_evaluation and self.config["mask_history"]:
                rows[TARGET_ROW] = target
        return self.join(rows) if join else rows

    def inter_matrix(self, form: str = "coo", value_field: str | None = None) -> Any:
        """RecBole's user-item matrix of the interactions of this part."""
        feat = self.inter_feat
        if not isinstance(feat, SequenceRows):
            return super().inter_matrix(form, value_field)
        return self._create_sparse_matrix(
            take(Interaction(dict(feat.source.columns)), feat.interactions()),
            self.uid_field,
            self.iid_field,
            form,
            value_field,
        )

    def training_interactions(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Users and items of this part's interactions, by user and, within a user, exact time.

        Of a training part these are the true histories, each interaction once, however many
        prefix rows or windows repeat it; nothing of validation or test is among them.

        Returns:
            Two arrays of internal ids, of the same length.

        Raises:
            InputError: If the data come as lists, which do not say what is one interaction.
        """
        if not isinstance(self.inter_feat, SequenceRows):
            raise InputError(
                f"{self.config['model']} learns from whole training histories, but "
                "benchmark_filename gives lists that are cut already; give .inter"
            )
        columns = self.inter_feat.source.columns
        rows = torch.sort(self.inter_feat.interactions()).values
        return columns[self.uid_field][rows].numpy(), columns[self.iid_field][rows].numpy()

    def counter(self, field: str) -> Counter[Any]:
        """How often each id of a token field occurs in this part's interactions.

        RecBole counts the targets, without the first interaction of every user, so that metrics of
        popularity differ between a sequential model and a general one with the same lists.
        """
        feat = self.inter_feat
        if isinstance(feat, SequenceRows):
            return Counter(feat.source.columns[field][feat.interactions()].numpy())
        return super().counter(field)

    def history(self, interaction: Interaction) -> tuple[Tensor, Tensor]:
        """All earlier items of the user of each evaluation row, not only the last L.

        The target of a row is left out of its own history, as RecBole's general loaders do.

        Args:
            interaction: A batch of this part, from a data set with ``mask_history``.

        Returns:
            Two tensors of the same length, so that ``scores[history] = -inf`` masks: the number of
            a row in the batch, and the internal id of an item that the row's user had before.

        Raises:
            InputError: If the batch does not come from an evaluation part with ``mask_history``.
        """
        if TARGET_ROW not in interaction:
            raise InputError(
                "the batch has no history: it is not of an evaluation part of a data set built "
                "with mask_history: True"
            )
        target = interaction[TARGET_ROW].cpu()
        source = self.inter_feat.source
        first = source.first_of(target)
        row, position = ranges(first, target - first)
        items = source.columns[self.iid_field]
        is_other = items[position] != items[target][row]
        device = interaction[TARGET_ROW].device
        return row[is_other].to(device), items[position[is_other]].to(device)
