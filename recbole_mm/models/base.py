"""What all models of this package share: features, scoring, objectives.

Shapes: B batch, L sequence length, N items (row 0 is padding), D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recbole_mm import config_rules
from recbole_mm.errors import InputError
from recbole_mm.losses.ranking import gbce_loss, next_item_cross_entropy

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

    from recbole_mm.config import Config
    from recbole_mm.data.sequential_dataset import MultimodalSequentialDataset


class StepItems(NamedTuple):
    """Items of a training step.

    Attributes:
        items: ``(U,)`` internal ids in ascending order, padding first.
        place: ``(N,)`` row of each of them in a table of their vectors.
        negatives: ``(K,)`` rows of sampled negatives, or ``None`` without sampling.
    """

    items: Tensor
    place: Tensor
    negatives: Tensor | None


class MultimodalSequentialRecommender(SequentialRecommender):
    """A sequential recommender whose items carry frozen features of any number of modalities.

    A subclass defines :meth:`item_vectors` (or :meth:`item_table`), :meth:`forward` and
    ``calculate_loss``, a tuple of terms such as ``(self.next_item_loss(...),)``; scores are dot
    products of the two.
    With :meth:`states` it can be trained with ``train_objective: all``.

    Attributes:
        consumes_features: Whether the declared modalities are loaded for it.
        samples_negatives: Whether it offers ``n_negatives``: its ``calculate_loss`` takes
            :meth:`step_items`, and hands them on to :meth:`next_item_loss`.
        loss_names: Names of the terms of ``calculate_loss``, in its order, for the log.
    """

    input_type = InputType.POINTWISE
    consumes_features: ClassVar[bool] = True
    # what this class reads; a properties file or `default_config` of a subclass is stronger
    common_config: ClassVar[dict[str, Any]] = {
        "train_neg_sample_args": None,
        "initializer_range": 0.02,
        "feature_norm": None,
        "loss_memory_mb": 512,
        "n_negatives": 0,
        "gbce_t": 0.75,
    }
    samples_negatives: ClassVar[bool] = False
    loss_names: tuple[str, ...] = ("next_item",)

    @classmethod
    def offered_objectives(cls, values: Mapping[str, Any]) -> tuple[str, ...]:
        """What ``train_objective`` may be; only a causal model may offer ``all``.

        Args:
            values: The resolved configuration.
        """
        return ("last", "all")

    @classmethod
    def check_options(cls, values: Mapping[str, Any]) -> None:
        """Refuse values of the model's own keys, before any data is read.

        A model of one's own may add rules; :mod:`recbole_mm.config_rules` has words for them.

        Args:
            values: The resolved configuration.

        Raises:
            InputError: On a value that the model cannot have.
        """
        config_rules.at_least(values, 1, "loss_memory_mb")
        config_rules.at_least(values, 0, "n_negatives")
        config_rules.share(values, "gbce_t")

    def __init__(self, config: Config, dataset: MultimodalSequentialDataset) -> None:
        super().__init__(config, dataset)
        if self.consumes_features:
            self.features = dataset.item_features
            self.feature_norm = config["feature_norm"]
        self.train_objective = config["train_objective"]
        self.initializer_range = config["initializer_range"]
        self.loss_memory_mb = config["loss_memory_mb"]
        self.n_negatives = config["n_negatives"] if self.samples_negatives else 0
        self.gbce_t = config["gbce_t"] if self.samples_negatives else 0.0
        if not 0 <= self.n_negatives < self.n_items - 1:
            raise ValueError(
                f"n_negatives must lie between 0 and {self.n_items - 2}, one less than there are "
                f"items; got {self.n_negatives}"
            )
        self.ITEM_TARGETS = f"{self.ITEM_ID}_target{config['LIST_SUFFIX']}"
        self._scoring_table: tuple[tuple[object, ...], Tensor] | None = None

    def item_table(self) -> Tensor:
        """Vectors of all items, ``(N, D)``; row 0 belongs to padding."""
        return self.item_vectors(self.all_items())

    def item_vectors(self, items: Tensor) -> Tensor:
        """Vectors ``(U, D)`` of the items ``(U,)``; a model without it overrides `item_table`."""
        raise NotImplementedError

    def all_items(self) -> Tensor:
        """Internal ids of all items, ``(N,)``."""
        return torch.arange(self.n_items, device=next(self.parameters()).device)

    def step_items(self, interaction: Interaction) -> StepItems:
        """Items whose vectors a training step needs: all, or the batch's and the negatives'."""
        if not self.n_negatives:
            everything = self.all_items()
            return StepItems(everything, everything, None)
        device = interaction[self.ITEM_SEQ].device
        # one pool of negatives for the whole batch: each target sees the same, in one product
        pool = torch.randint(1, self.n_items, (self.n_negatives,), device=device)
        # the targets of a window are its own later items and, at its end, POS_ITEM_ID
        parts = [pool.new_zeros(1), interaction[self.ITEM_SEQ], interaction[self.POS_ITEM_ID], pool]
        items: Tensor = torch.unique(torch.cat([part.flatten() for part in parts]))
        place = torch.zeros(self.n_items, dtype=torch.long, device=device)
        place[items] = torch.arange(len(items), device=device)
        return StepItems(items, place, place[pool])

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
        raise InputError(
            f"train_objective all needs {type(self).__name__}.states, which is not defined; define "
            "it, or set train_objective: last"
        )

    def predict(self, interaction: Interaction) -> Tensor:
        """Scores ``(B,)`` of the item that each row names."""
        items = self.scoring_table()
        user = self(*self.histories(interaction), items)
        return (user * items[interaction[self.ITEM_ID]]).sum(-1)

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores ``(B, N)`` of all items; column 0 belongs to padding."""
        return self.user_vectors(interaction) @ self.scoring_table().T

    def user_vectors(self, interaction: Interaction) -> Tensor:
        """Vectors ``(B, D)`` whose products with :meth:`scoring_table` are the scores.

        Evaluation multiplies them with some items at a time. A model with other scores overrides
        `full_sort_predict` instead, which then is what evaluation asks for.
        """
        return self(*self.histories(interaction), self.scoring_table())

    def histories(self, interaction: Interaction) -> tuple[Tensor, Tensor]:
        """Item ids ``(B, L')`` and lengths ``(B,)``, cut to the longest row of the batch."""
        length = interaction[self.ITEM_SEQ_LEN]
        return interaction[self.ITEM_SEQ][:, : max(1, int(length.max()))], length

    def next_item_loss(
        self,
        interaction: Interaction,
        items: Tensor,
        step: StepItems | None = None,
        *,
        padding_excluded: bool = True,
    ) -> Tensor:
        """Loss of the next item, at the last position or at all of them.

        Cross-entropy over the catalogue, or, with ``n_negatives``, gSASRec's generalised binary
        cross-entropy against negatives that are drawn uniformly and shared by the batch.

        Args:
            interaction: A batch of training rows, prefixes or windows.
            items: ``(N, D)``, the item table; ``(U, D)``, vectors of ``step.items``, with one.
            step: What :meth:`step_items` gave; ``None`` for all items.
            padding_excluded: Leave the padding row out of the softmax. RecBole's own models keep
                it there; it is never a target.
        """
        item_seq, length = self.histories(interaction)
        everywhere = self.train_objective == "all"
        target = interaction[self.ITEM_TARGETS if everywhere else self.POS_ITEM_ID]
        if self.n_negatives and step is None:
            raise ValueError("n_negatives needs the items of the step, step_items(...)")
        if step is not None:
            item_seq, target = step.place[item_seq], step.place[target]
        if everywhere:
            target = target[:, : item_seq.size(1)]  # (B, L)
            state = self.states(item_seq, length, items)[target > 0]
            target = target[target > 0]
        else:
            state = self(item_seq, length, items)
        if step is not None and step.negatives is not None:
            return self._sampled_loss(state, items, target, step.negatives)
        return next_item_cross_entropy(
            state,
            items,
            target,
            memory_mb=self.loss_memory_mb,
            padding_excluded=padding_excluded,
        )

    def _sampled_loss(
        self, state: Tensor, items: Tensor, target: Tensor, negatives: Tensor
    ) -> Tensor:
        # F.embedding, not items[...]: its gradient has one order of summation, whatever the threads
        candidates = F.embedding(negatives, items)  # (K, D)

        def of_some(state: Tensor, target: Tensor) -> Tensor:
            positive = (state * F.embedding(target, items)).sum(-1)  # (T',)
            logits = state @ candidates.T  # (T', K)
            logits = logits.masked_fill(target[:, None] == negatives, float("-inf"))
            mean = gbce_loss(positive, logits, n_items=self.n_items - 1, t=self.gbce_t)
            return mean * len(target)

        # logits, what is left of them by the mask, and both gradients
        rows = max(1, int(self.loss_memory_mb * 2**20 / (4 * 4 * len(negatives))))
        if len(target) <= rows:
            return of_some(state, target) / max(1, len(target))
        # the scores of a piece are computed again in the backward pass, where no other's are kept
        pieces = zip(torch.split(state, rows), torch.split(target, rows), strict=True)
        losses = [
            checkpoint(of_some, *piece, use_reentrant=False, preserve_rng_state=False)
            for piece in pieces
        ]
        return torch.stack(losses).sum() / len(target)

    def scoring_table(self) -> Tensor:
        """:meth:`item_table`, computed once for an evaluation pass.

        Kept only in evaluation mode without gradients, and only as long as no parameter and no
        buffer changes in a way that autograd counts (writing to ``.data`` is none; ``train()`` and
        ``eval()`` drop the table).
        """
        if self.training or torch.is_grad_enabled():
            return self.item_table()
        device = next(self.parameters()).device.type
        state = (
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            *(
                version
                for p in (*self.parameters(), *self.buffers())
                for version in (p.data_ptr(), p._version, p.dtype)
            ),
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
