"""What all models of this package share: features, scoring, objectives.

Shapes: B batch, L sequence length, N items (row 0 is padding), D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor, nn

from recbole_mm.losses.ranking import next_item_cross_entropy

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

    from recbole_mm.config import Config
    from recbole_mm.data.dataset import MultimodalSequentialDataset


class MultimodalSequentialRecommender(SequentialRecommender):
    """A sequential recommender whose items carry frozen features of any number of modalities.

    A subclass defines :meth:`item_table` and :meth:`forward`; scores are dot products of the two.

    Attributes:
        consumes_features: Whether the declared modalities are loaded for it.
        loss_names: Names of the terms of ``calculate_loss``, in its order, for the log.
    """

    input_type = InputType.POINTWISE
    consumes_features: ClassVar[bool] = True
    loss_names: tuple[str, ...] = ("next_item",)

    @classmethod
    def offered_objectives(cls, values: Mapping[str, Any]) -> tuple[str, ...]:
        """What ``train_objective`` may be; only a causal model may offer ``all``.

        Args:
            values: The resolved configuration.
        """
        return ("last", "all")

    def __init__(self, config: Config, dataset: MultimodalSequentialDataset) -> None:
        super().__init__(config, dataset)
        if self.consumes_features:
            self.features = dataset.item_features
        self.train_objective = config["train_objective"]
        self.initializer_range = config["initializer_range"]
        self.loss_memory_mb = config["loss_memory_mb"]
        self.ITEM_TARGETS = f"{self.ITEM_ID}_target{config['LIST_SUFFIX']}"
        self._scoring_table: tuple[tuple[object, ...], Tensor] | None = None

    def item_table(self) -> Tensor:
        """Vectors of all items, ``(N, D)``; row 0 belongs to padding."""
        raise NotImplementedError

    def forward(self, item_seq: Tensor, item_seq_len: Tensor, items: Tensor) -> Tensor:
        """User states ``(B, D)`` at the last real position.

        Args:
            item_seq: ``(B, L)`` item ids, padded on the right with 0.
            item_seq_len: ``(B,)``.
            items: ``(N, D)``, the item table.
        """
        raise NotImplementedError

    def states(self, item_seq: Tensor, item_seq_len: Tensor, items: Tensor) -> Tensor:
        """States ``(B, L, D)`` at every position, each from itself and earlier ones only.

        Only a causal model has them; arguments as in :meth:`forward`.
        """
        raise NotImplementedError

    def predict(self, interaction: Interaction) -> Tensor:
        """Scores ``(B,)`` of the item that each row names."""
        items = self.scoring_table()
        user = self(*self.histories(interaction), items)
        return (user * items[interaction[self.ITEM_ID]]).sum(-1)

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores ``(B, N)`` of all items; column 0 belongs to padding."""
        items = self.scoring_table()
        return self(*self.histories(interaction), items) @ items.T

    def histories(self, interaction: Interaction) -> tuple[Tensor, Tensor]:
        """Item ids ``(B, L')`` and lengths ``(B,)``, cut to the longest row of the batch."""
        length = interaction[self.ITEM_SEQ_LEN]
        return interaction[self.ITEM_SEQ][:, : max(1, int(length.max()))], length

    def next_item_loss(
        self, interaction: Interaction, items: Tensor, *, padding_excluded: bool = True
    ) -> Tensor:
        """Cross-entropy over the catalogue, at the last position or at all of them.

        Args:
            interaction: A batch of training rows, prefixes or windows.
            items: ``(N, D)``, the item table.
            padding_excluded: Leave the padding row out of the softmax. RecBole's own models keep
                it there; it is never a target.
        """
        item_seq, length = self.histories(interaction)
        if self.train_objective == "all":
            targets = interaction[self.ITEM_TARGETS][:, : item_seq.size(1)]  # (B, L)
            real = targets > 0
            state, target = self.states(item_seq, length, items)[real], targets[real]
        else:
            state, target = self(item_seq, length, items), interaction[self.POS_ITEM_ID]
        return next_item_cross_entropy(
            state,
            items,
            target,
            memory_mb=self.loss_memory_mb,
            padding_excluded=padding_excluded,
        )

    def scoring_table(self) -> Tensor:
        """:meth:`item_table`, computed once for an evaluation pass.

        Kept only in evaluation mode without gradients, and only as long as no parameter changes.
        """
        if self.training or torch.is_grad_enabled():
            return self.item_table()
        state = tuple(
            version for p in self.parameters() for version in (p.data_ptr(), p._version, p.dtype)
        )
        if self._scoring_table is None or self._scoring_table[0] != state:
            self._scoring_table = (state, self.item_table())
        return self._scoring_table[1]

    def train(self, mode: bool = True) -> MultimodalSequentialRecommender:
        """Change the mode; an item table kept for evaluation is dropped."""
        self._scoring_table = None
        super().train(mode)
        return self

    def _init_weights(self, module: nn.Module) -> None:
        """RecBole's initialisation of Transformer models, with a zero row for padding."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=self.initializer_range)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight.data[module.padding_idx].zero_()
        elif isinstance(module, nn.LayerNorm):
            module.weight.data.fill_(1.0)
            module.bias.data.zero_()
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.zero_()
