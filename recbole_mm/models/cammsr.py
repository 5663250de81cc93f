r"""CAMMSR
################################################

Reference:
    Jinfeng Xu et al. "CAMMSR: Category-Guided Attentive Mixture of Experts for Multimodal
    Sequential Recommendation." in ICDE 2026. https://arxiv.org/abs/2603.04320

How the paper maps to this file:

=======================================================  ====================================
Eq. (2)-(3), item vectors x                              :meth:`CAMMSR.item_table`
Eq. (4), positions                                       :meth:`CAMMSR.forward`
Eq. (5)-(11), experts, attentive gate, category weights  :class:`.CategoryGuidedExperts`
Eq. (12)-(15), user interest, score                      :meth:`CAMMSR.forward`
Eq. (16)-(18), modality swap contrast                    :meth:`CAMMSR.calculate_loss`
Eq. (20), total objective                                :meth:`CAMMSR.calculate_loss`
=======================================================  ====================================

Shapes: B batch, L sequence length, T real positions of the batch, N items, M modalities (the id
is the first), P pairs of modalities, V sequences to encode, D hidden size, C categories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_mm.config_rules import at_least, one_of, positive, share
from recbole_mm.errors import InputError
from recbole_mm.explain import Table, by_activity, by_category, weight_columns
from recbole_mm.layers.encoder import NORMS, TransformerEncoder, normalisation
from recbole_mm.layers.experts import AttentiveGate, GatedExperts, LinearGate
from recbole_mm.layers.projection import ModalityProjection
from recbole_mm.losses.contrastive import in_batch_info_nce
from recbole_mm.losses.ranking import next_item_cross_entropy
from recbole_mm.models.base import MultimodalSequentialRecommender
from recbole_mm.modules.category_experts import (
    GATES,
    POOLS,
    REDUCTIONS,
    SIGNS,
    CategoryGuidance,
    CategoryGuidedExperts,
    Fused,
)
from recbole_mm.ops.augmentation import swap, swap_mask
from recbole_mm.ops.packing import Packing

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

    from recbole_mm.config import Config
    from recbole_mm.data.sequential_dataset import MultimodalSequentialDataset
    from recbole_mm.explain import Material


class CAMMSR(MultimodalSequentialRecommender):
    r"""Modalities fused by experts, one Transformer for each, scores summed over modalities.

    .. math::
        Z^m = \operatorname{Transformer}^m(\operatorname{drop}(\operatorname{DyT}^m(\bar e^m)))
        _{\text{last}}, \qquad \text{score}_i = \sum_m \langle Z^m, x^m_i \rangle

    The sum over modalities is one product: tables and user states hold the modalities side by
    side, in the width ``M * D``.

    Departures from the paper: none in its equations but for two tuned defaults, the mean over
    categories in place of their sum and a temperature of the contrast, which
    ``ablation/CAMMSR/paper_values.yaml`` undoes with the other tuned values. Where it leaves a
    choice open, the properties file names the default and its source; without a key are: the causal
    mask of the Transformers, and candidates without a position [inferred: HM4SR], and the direction
    of the contrast, whose anchor is the first modality of a pair [ours]. Its data are complete;
    ours need not be [ours]: of a modality that an item lacks, the vector x is zero, so that it adds
    nothing to the item's score; it is no key of the gate, its weight is zero and it is never
    swapped; its Transformer sees the position alone. A history without any item of a modality takes
    no part in the contrast of its pairs. Everything that treats a position on its own skips
    padding. The softmax of the loss leaves the padding item out.

    Raises:
        InputError: If a key has an impossible value, or categories are missing.
    """

    loss_names = ("next_item", "swap_contrast", "category")
    no_all_positions_reason: ClassVar[str] = (
        "its gate sees the whole history, later items too "
        "(gate_causal: True makes it see earlier ones only)"
    )

    @classmethod
    def offered_objectives(cls, values: Mapping[str, Any]) -> tuple[str, ...]:
        """``all`` only with a gate that sees no later item."""
        causal = values["gate_causal"] or values["gate"] == "linear"
        return ("last", "all") if causal else ("last",)

    @classmethod
    def check_options(cls, values: Mapping[str, Any]) -> None:
        """As in the base class."""
        super().check_options(values)
        at_least(values, 1, "n_experts")
        at_least(values, 0, "contrast_weight", "category_loss_weight")
        positive(values, "contrast_temperature")
        share(values, "swap_ratio")
        one_of(values, "input_norm", NORMS)
        one_of(values, "gate", GATES)
        one_of(values, "category_weight_sign", SIGNS)
        one_of(values, "category_reduction", REDUCTIONS)
        one_of(values, "category_pool", POOLS)

    def __init__(self, config: Config, dataset: MultimodalSequentialDataset) -> None:
        super().__init__(config, dataset)

        # hyper-parameters; meanings and sources in properties/model/CAMMSR.yaml
        self.hidden_size = config["hidden_size"]
        self.swap_ratio = config["swap_ratio"]
        self.contrast_weight = config["contrast_weight"]
        self.contrast_temperature = config["contrast_temperature"]
        self.mask_same_target = config["mask_same_target"]
        self.category_loss_weight = config["category_loss_weight"]
        features = dataset.item_features
        names = features.names
        self.modality_names = ("id", *names)  # a feature may not have that name
        M = len(self.modality_names)
        pairs = _pairs(config["swap_pairs"], self.modality_names)
        categories = _categories(config, dataset, M)

        # layers, in the order in which the data meets them
        self.item_embedding = nn.Embedding(self.n_items, self.hidden_size, padding_idx=0)
        self.project = (
            ModalityProjection(features, self.hidden_size, norm=self.feature_norm)
            if names
            else None
        )
        self.position_embedding = nn.Embedding(self.max_seq_length, self.hidden_size)  # p
        try:
            self.fuse = CategoryGuidedExperts(
                M,
                self.hidden_size,
                config["n_experts"],
                categories.shape[1],
                gate=config["gate"],
                gate_causal=config["gate_causal"],
                share_experts=config["share_experts"],
                category_weight_sign=config["category_weight_sign"],
                category_reduction=config["category_reduction"],
                category_pool=config["category_pool"],
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        eps = config["layer_norm_eps"]
        self.input_norm = nn.ModuleDict(
            {
                name: normalisation(config["input_norm"], self.hidden_size, eps)
                for name in self.modality_names
            }
        )
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])
        self.encoder = nn.ModuleDict(
            {
                name: TransformerEncoder(
                    n_layers=config["n_layers"],
                    n_heads=config["n_heads"],
                    hidden_size=self.hidden_size,
                    inner_size=config["inner_size"],
                    hidden_dropout_prob=config["hidden_dropout_prob"],
                    attn_dropout_prob=config["attn_dropout_prob"],
                    hidden_act=config["hidden_act"],
                    layer_norm_eps=eps,
                    norm="dyt" if config["dyt_in_encoder"] else "layernorm",
                )
                for name in self.modality_names
            }
        )

        # constants; none of them is saved
        has_id = torch.ones(self.n_items, 1, dtype=torch.bool)
        present = torch.cat([has_id, features.present], dim=1)
        self.register_buffer("present", present, persistent=False)  # (N, M)
        self.register_buffer("categories", categories, persistent=False)  # (N, C)
        self.register_buffer("pairs", pairs, persistent=False)  # (2, P)
        # views sorted by the modality whose Transformer encodes them, and the way back
        owner = pairs.flatten()  # (2P,)
        order = owner.argsort(stable=True)
        self.register_buffer("view_order", order, persistent=False)
        self.register_buffer("view_place", order.argsort(), persistent=False)
        self.n_views = owner.bincount(minlength=M).tolist()

        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """RecBole's initialisation, for the parts that hold many linear maps in one tensor too."""
        super()._init_weights(module)
        if isinstance(module, (AttentiveGate, LinearGate, GatedExperts, CategoryGuidance)):
            module.reset_parameters(self.initializer_range)

    # ------------------------------------------------------------------ items and users

    def item_table(self) -> Tensor:
        """Item vectors x of all modalities side by side, Eq. (2)-(3): ``(N, M * D)``."""
        ids = self.item_embedding.weight  # (N, D)
        if self.project is None:
            return ids
        content, _ = self.project(self.all_items())  # (N, M - 1, D)
        return torch.cat([ids, content.flatten(1)], dim=1)

    def forward(self, item_seq: Tensor, item_seq_len: Tensor, items: Tensor) -> Tensor:
        """User states Z of all modalities side by side, Eq. (4)-(14): ``(B, M * D)``."""
        packing = Packing(item_seq_len, item_seq.size(1))
        fused = self._fused(item_seq, packing, items)
        return torch.cat(self._encode_last(_by_modality(fused), packing, item_seq_len), -1)[0]

    def states(self, item_seq: Tensor, item_seq_len: Tensor, items: Tensor) -> Tensor:
        """User states at every position, ``(B, L, M * D)``; for a causal gate only."""
        packing = Packing(item_seq_len, item_seq.size(1))
        fused = self._fused(item_seq, packing, items)
        return self._encode_all(_by_modality(fused), packing, item_seq_len)

    @torch.no_grad()
    def modality_weights(self, interaction: Interaction) -> tuple[Tensor, Tensor]:
        r"""What the categories, or their absence, make the experts weigh in each modality.

        The weights are those of the experts' output :math:`\hat e^m` beside a modality's own
        vector; they do not say how much the modality adds to a score.

        Args:
            interaction: A batch of histories.

        Returns:
            ``(B, L, M)``, in the order of ``modality_names``, w of Eq. (11): sums to one at a real
            position, exactly zero for a modality that the item lacks and at padding; and
            ``(B, L)`` bool, ``True`` at real positions. L is the longest history of the batch.
        """
        item_seq, length = self.histories(interaction)
        packing = Packing(length, item_seq.size(1))
        weights = self._fused(item_seq, packing, self.scoring_table()).weights
        return packing.pad(weights), packing.real

    @torch.no_grad()
    def explain(self, material: Material) -> dict[str, Table]:
        """Means of :meth:`modality_weights` over the test histories.

        With ``category_loss_weight: 0``, as printed, no loss of their own trains the maps that
        predict categories. With ``category_reduction: sum``, as printed, and many categories the
        weights are nearly one-hot, and on which modality differs from seed to seed; with ``mean``
        they are nearly equal.

        Returns:
            ``modality_by_category``: over the positions whose item has the category;
            ``modality_by_activity``: of each history its mean over positions, then over histories.
            A modality that an item lacks counts with its weight, zero.
        """
        names, M = weight_columns(self.modality_names), len(self.modality_names)
        totals = torch.zeros(self.n_items, M, dtype=torch.float64)
        counts = torch.zeros(self.n_items, dtype=torch.int64)
        users = []
        for batch in material.batches():
            weights, real = (part.cpu() for part in self.modality_weights(batch))
            items = self.histories(batch)[0].cpu()[real]  # (T,)
            totals.index_add_(0, items, weights[real].double())
            counts += items.bincount(minlength=self.n_items)
            length = real.sum(1)
            mean = weights.double().sum(1) / length[:, None]  # padding weighs zero
            frame = pd.DataFrame(mean.numpy(), columns=list(names))
            users.append(frame.assign(history_length=length.numpy()))
        what = "mean weight w of the experts' output"
        return {
            "modality_by_category": Table(
                by_category(
                    totals.numpy(), counts.numpy(), names, material.categories, "positions"
                ),
                "CAMMSR, test histories: modalities by category",
                names,
                what,
            ),
            "modality_by_activity": Table(
                by_activity(pd.concat(users), names),
                "CAMMSR, test histories: modalities by user activity",
                names,
                what,
            ),
        }

    def _fused(self, item_seq: Tensor, packing: Packing, items: Tensor) -> Fused:
        """Fused vectors of the real positions, Eq. (4)-(11)."""
        ids = packing.pack(item_seq)  # (T,)
        x = F.embedding(ids, items).view(len(ids), -1, self.hidden_size)  # (T, M, D)
        e = x + self.position_embedding(packing.position).unsqueeze(1)
        fused: Fused = self.fuse(e, self.present[ids], self.categories[ids], packing)
        return fused

    def _inputs(self, name: str, fused: Tensor, packing: Packing) -> Tensor:
        """Eq. (12), (V, T, D), laid out for a Transformer: (V * B, L, D)."""
        return packing.pad(self.dropout(self.input_norm[name](fused)), dim=1).flatten(0, 1)

    def _encode_last(
        self, fused: Sequence[Tensor], packing: Packing, length: Tensor
    ) -> list[Tensor]:
        """Last states of V_m sequences of each modality: (V_m, T, D) to (V_m, B, D)."""
        states = []
        for name, sequences in zip(self.modality_names, fused, strict=True):
            V, B = len(sequences), len(length)
            if V == 0:
                states.append(sequences.new_zeros(0, B, self.hidden_size))
                continue
            inputs = self._inputs(name, sequences, packing)
            encoder = cast(TransformerEncoder, self.encoder[name])
            states.append(encoder.last(inputs, length.repeat(V)).view(V, B, -1))
        return states

    def _encode_all(self, fused: Sequence[Tensor], packing: Packing, length: Tensor) -> Tensor:
        """States at every position of one sequence of each modality: (1, T, D) to (B, L, M * D)."""
        states = [
            self.encoder[name](self._inputs(name, sequence, packing), length)
            for name, sequence in zip(self.modality_names, fused, strict=True)
        ]
        return torch.cat(states, dim=-1)

    # ------------------------------------------------------------------ objective

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. (20): next-item cross-entropy, weighted swap contrast, weighted category loss.

        A term of weight 0 is not computed; 0 stands in its place.
        """
        item_seq, length = self.histories(interaction)
        target = interaction[self.POS_ITEM_ID]  # (B,)
        items = self.item_table()
        packing = Packing(length, item_seq.size(1))
        fused = self._fused(item_seq, packing, items)
        sequences = _by_modality(fused)
        contrast = category = items.new_zeros(())

        contrasted = self.contrast_weight > 0 and self.pairs.size(1) > 0
        views = self._views(fused, self.present[packing.pack(item_seq)]) if contrasted else None
        view_states: list[Tensor] = []
        if self.train_objective == "all":
            states = self._encode_all(sequences, packing, length)  # (B, L, M * D)
            targets = interaction[self.ITEM_TARGETS][:, : item_seq.size(1)]  # (B, L)
            real = targets > 0
            user, next_item = states[real], targets[real]
            if views is not None:
                view_states = self._encode_last(views, packing, length)
        else:
            if views is not None:  # one pass for a modality's history and its views
                sequences = [torch.cat(both) for both in zip(sequences, views, strict=True)]
            last = self._encode_last(sequences, packing, length)
            user, next_item = torch.cat([states[0] for states in last], -1), target
            view_states = [states[1:] for states in last]

        ranking = next_item_cross_entropy(
            user, items, next_item, memory_mb=self.loss_memory_mb, padding_excluded=True
        )
        if views is not None:
            first, second = torch.cat(view_states)[self.view_place].chunk(2)  # (P, B, D) each
            seen = self.present[item_seq] & packing.real.unsqueeze(-1)  # (B, L, M)
            has = seen.any(1).T[self.pairs]  # (2, P, B)

            def pair_loss(one: Tensor, other: Tensor, both: Tensor) -> Tensor:
                return in_batch_info_nce(
                    one,
                    other,
                    temperature=self.contrast_temperature,
                    group=target if self.mask_same_target else None,
                    present=both,
                )

            each = torch.vmap(pair_loss)(first, second, has[0] & has[1])  # (P,)
            contrast = self.contrast_weight * each.sum()
        if self.category_loss_weight > 0:
            category = self.category_loss_weight * fused.category_loss
        return ranking, contrast, category

    def _views(self, fused: Fused, present: Tensor) -> list[Tensor]:
        """Swapped sequences, Eq. (16), by the modality that encodes them: (V_m, T, D) each."""
        states = fused.states.transpose(0, 1)  # (M, T, D)
        first, second = self.pairs
        swappable = (present[:, first] & present[:, second]).T  # (P, T)
        views = swap(states[first], states[second], swap_mask(swappable, self.swap_ratio))
        return list(torch.split(torch.cat(views)[self.view_order], self.n_views))


def _by_modality(fused: Fused) -> list[Tensor]:
    """The one sequence that each modality encodes, (1, T, D) each."""
    return [states.unsqueeze(0) for states in fused.states.unbind(1)]


def _pairs(chosen: Any, names: tuple[str, ...]) -> Tensor:
    """Numbers of the modalities of each pair, (2, P) int64; all pairs if none are chosen."""
    if chosen is None:
        chosen = list(combinations(names, 2))
    numbers: list[tuple[int, int]] = []
    for pair in chosen:
        if (
            not isinstance(pair, (list, tuple))
            or len(pair) != 2
            or pair[0] == pair[1]
            or not set(pair) <= set(names)
        ):
            raise InputError(
                f"swap_pairs: {pair!r} is not a pair of different modalities; "
                f"choose two of {', '.join(names)}, for example [[{names[0]}, {names[-1]}]]"
            )
        numbers.append((names.index(pair[0]), names.index(pair[1])))
    if len({frozenset(pair) for pair in numbers}) < len(numbers):
        raise InputError(f"swap_pairs: {chosen!r} names a pair twice; remove one")
    return torch.tensor(numbers, dtype=torch.int64).view(-1, 2).T.contiguous()


def _categories(config: Config, dataset: MultimodalSequentialDataset, n_modalities: int) -> Tensor:
    """Categories of all items (N, C) bool; C is 0 where nothing depends on them."""
    weight = config["category_loss_weight"]
    if not config["category_guided"] and weight > 0:
        raise InputError(
            f"category_loss_weight {weight} trains the category guidance, "
            "which category_guided: False switches off; set one of the two"
        )
    # the weight of a single modality is 1, whatever its category
    if not config["category_guided"] or (n_modalities == 1 and weight == 0):
        return torch.zeros(dataset.num(config["ITEM_ID_FIELD"]), 0, dtype=torch.bool)
    table = dataset.item_categories
    if table is None:
        raise InputError(
            "category_guided: True needs categories; set category_field to the column of .item "
            "that holds them, or category_guided: False"
        )
    return table.multi_hot
