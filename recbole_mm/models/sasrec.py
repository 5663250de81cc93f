r"""SASRecFast, SASRecMM
################################################

Reference:
    Wang-Cheng Kang and Julian McAuley. "Self-Attentive Sequential Recommendation." in ICDM 2018.

SASRecFast is RecBole's SASRec in architecture, initialisation and names of weights, without its
costs: fused attention and activation, batches cut to their longest row, one query at inference,
and, with ``train_objective: all``, the loss at every position that the paper trains with (RecBole
trains on one row for every prefix). It is here so that a baseline does not lose by slowness.

SASRecMM is the simplest multimodal model, the honest peer of every other: an item is the sum of
its id embedding and a linear projection of each feature that it has. [ours]

Shapes: B batch, L sequence length, N items, M modalities, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from recbole_mm.layers.encoder import TransformerEncoder
from recbole_mm.layers.projection import ModalityProjection
from recbole_mm.models.base import MultimodalSequentialRecommender

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

    from recbole_mm.config import Config
    from recbole_mm.data.sequential_dataset import MultimodalSequentialDataset


class SASRecFast(MultimodalSequentialRecommender):
    """RecBole's SASRec with cross-entropy, faster; a state dict of either loads into the other."""

    consumes_features = False
    samples_negatives = True

    def __init__(self, config: Config, dataset: MultimodalSequentialDataset) -> None:
        super().__init__(config, dataset)
        hidden_size = config["hidden_size"]
        # order and names as in RecBole: the same seed draws the same weights
        self.item_embedding = nn.Embedding(self.n_items, hidden_size, padding_idx=0)
        self.position_embedding = nn.Embedding(self.max_seq_length, hidden_size)
        self.trm_encoder = TransformerEncoder(
            n_layers=config["n_layers"],
            n_heads=config["n_heads"],
            hidden_size=hidden_size,
            inner_size=config["inner_size"],
            hidden_dropout_prob=config["hidden_dropout_prob"],
            attn_dropout_prob=config["attn_dropout_prob"],
            hidden_act=config["hidden_act"],
            layer_norm_eps=config["layer_norm_eps"],
        )
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=config["layer_norm_eps"])
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """RecBole's: the padding row is drawn too, and trained as a candidate, not as an input."""
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=self.initializer_range)
        else:
            super()._init_weights(module)

    def item_vectors(self, items: Tensor) -> Tensor:
        """Id embeddings ``(U, D)``."""
        return self.item_embedding.weight[items]

    def _inputs(self, item_seq: Tensor, items: Tensor) -> Tensor:
        # F.embedding, not items[...]: its gradient has one order of summation, whatever the threads
        x = F.embedding(item_seq, items)  # (B, L, D)
        x = x + self.position_embedding.weight[: item_seq.size(1)]
        return self.dropout(self.LayerNorm(x))

    def states(self, item_seq: Tensor, item_seq_len: Tensor, items: Tensor) -> Tensor:
        """States ``(B, L, D)`` at every position."""
        return self.trm_encoder(self._inputs(item_seq, items), item_seq_len)

    def forward(self, item_seq: Tensor, item_seq_len: Tensor, items: Tensor) -> Tensor:
        """User states ``(B, D)``."""
        return self.trm_encoder.last(self._inputs(item_seq, items), item_seq_len)

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor]:
        """Cross-entropy over the catalogue, its padding row included as in RecBole."""
        step = self.step_items(interaction)
        items = self.item_vectors(step.items)
        return (self.next_item_loss(interaction, items, step, padding_excluded=False),)


class SASRecMM(SASRecFast):
    """SASRec whose items add a projection of each feature to their id embedding. [ours].

    An item without a feature gets nothing of it: its vector is the sum of what is there. All else
    is SASRec's, so that a difference between the two is the features' doing.
    """

    consumes_features = True

    def __init__(self, config: Config, dataset: MultimodalSequentialDataset) -> None:
        super().__init__(config, dataset)
        self.project = None
        if self.features:  # without any it is SASRecFast
            self.project = ModalityProjection(
                self.features, config["hidden_size"], norm=self.feature_norm
            )
            self.project.apply(self._init_weights)

    def item_vectors(self, items: Tensor) -> Tensor:
        """Sum of the id embedding and the projected features, ``(U, D)``."""
        ids = super().item_vectors(items)
        if self.project is None:
            return ids
        content, _ = self.project(items)  # (U, M, D)
        return ids + content.sum(1)
