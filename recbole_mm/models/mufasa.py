r"""MUFASA
################################################

Reference:
    "MUFASA", a multimodal fusion and sparse attention-based alignment model for long sequential
    recommendation. https://arxiv.org/abs/2508.09664

The abstract is public, the formulas are not. It fixes two parts and what each is for:

=================================================  ===========================================
Multimodal Fusion Layer (MFL), title as anchor     :class:`.MultimodalFusion`
its four losses                                    :class:`.FusionLosses`
Sparse Attention-guided Alignment Layer (SAL)      :class:`.SparseAlignmentEncoder`
item vector, user vector, score, objective         :class:`MUFASA`
=================================================  ===========================================

Every formula is [ours]; ``properties/model/MUFASA.yaml`` marks each choice. Without a key are the
factor :math:`1 / \sqrt D` of the fused content and the layer norm before SAL, and in SAL the first
bias of the gates, which favours the window, and keys without a bias.

Shapes: B batch, L sequence length, N items, U distinct items of a batch, M modalities, D hidden
size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_mm.config_rules import at_least, one_of, positive
from recbole_mm.errors import InputError, nearest
from recbole_mm.explain import Table, by_activity, by_category, weight_columns
from recbole_mm.layers.projection import ModalityProjection
from recbole_mm.models.base import MultimodalSequentialRecommender
from recbole_mm.modules.multimodal_fusion import (
    COLLABORATIVE_TARGETS,
    DISTRIBUTIONS,
    FUSION_TERMS,
    FusionLosses,
    MultimodalFusion,
)
from recbole_mm.modules.sparse_alignment import COMPRESSIONS, SparseAlignmentEncoder
from recbole_mm.ops.masking import padding_mask
from recbole_mm.ops.sparse_attention import SELECTIONS

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

    from recbole_mm.config import Config
    from recbole_mm.data.sequential_dataset import MultimodalSequentialDataset
    from recbole_mm.explain import Material

_LOG = logging.getLogger(__name__)

DEFAULT_ANCHOR = "text"  # need not be there; another one that is not is a slip
POSITIONS = ("rotary", "learned")


class MUFASA(MultimodalSequentialRecommender):
    r"""Fused content plus id per item, sparse attention over a long history.

    .. math::
        v_i = z_i / \sqrt{D} + e_i, \qquad
        u = \operatorname{SAL}(\operatorname{LN}(v_{s_1}), \dots)_{\text{last}}, \qquad
        \text{score}_i = u^\top v_i

    with :math:`z_i` the fused content, which layer norm keeps at length :math:`\sqrt D` (hence the
    division: scores start near one), and :math:`e_i` a trained id embedding. Without modalities
    it is the id-only model, with ``use_id: False`` the content-only one.

    Positions are distances (``position: rotary``, inside SAL), so that a history may be longer than
    any in training; ``learned`` adds an embedding of each of the ``MAX_ITEM_LIST_LENGTH``
    positions to :math:`v` instead: those that no training history reached stay as they were drawn.
    """

    samples_negatives = True

    @classmethod
    def check_options(cls, values: Mapping[str, Any]) -> None:
        """As in the base class."""
        super().check_options(values)
        at_least(values, 0, *(f"{term}_weight" for term in FUSION_TERMS), "mfl_pretrain_epochs")
        at_least(values, 1, "window_size", "block_size", "n_selected_blocks")
        at_least(values, 2, "mfl_batch_items")  # the losses compare items with each other
        at_least(values, -1, "cross_genre_threshold")
        positive(values, "temperature", "structure_temperature")
        one_of(values, "collaborative_target", COLLABORATIVE_TARGETS)
        one_of(values, "distribution", DISTRIBUTIONS)
        aligns_ids = (
            values.get("collaborative_target") == "id" and values.get("collaborative_weight") != 0
        )
        if values.get("use_id") is False and aligns_ids and values.get("modalities"):
            raise InputError(
                "use_id: False with collaborative_target: id: no score reads the id embeddings, so "
                "that who is consumed together never reaches them; set collaborative_target: "
                "cooccurrence, or collaborative_weight: 0"
            )
        one_of(values, "selection", SELECTIONS)
        one_of(values, "compression", COMPRESSIONS)
        one_of(values, "position", POSITIONS)

    def __init__(self, config: Config, dataset: MultimodalSequentialDataset) -> None:
        super().__init__(config, dataset)
        hidden_size = config["hidden_size"]
        self.use_id = config["use_id"]
        self.mfl_batch_items = config["mfl_batch_items"]
        self.collaborative_target = config["collaborative_target"]
        names = self.features.names
        if not names and not self.use_id:
            raise ValueError("use_id is False and there is no modality: nothing describes an item")

        weights = {f"{term}_weight": config[f"{term}_weight"] for term in FUSION_TERMS}
        self.aligns_ids = (
            bool(names)
            and weights["collaborative_weight"] > 0
            and config["collaborative_target"] == "id"
        )
        if self.use_id:
            self.item_embedding = nn.Embedding(self.n_items, hidden_size, padding_idx=0)  # e
        if names:
            anchor = config["anchor_modality"]
            self.anchor = names.index(anchor) if anchor in names else 0
            if anchor not in names and (meant := nearest(anchor, names)):
                raise ValueError(f"anchor_modality: {anchor!r} is no modality here{meant}")
            if anchor not in (*names, DEFAULT_ANCHOR):
                _LOG.warning(
                    "anchor_modality: %r is none of the modalities %s; %s anchors them",
                    *(anchor, ", ".join(names), names[0]),
                )
            self.project = ModalityProjection(
                self.features, hidden_size, hidden_layers=2, norm=self.feature_norm
            )
            self.fusion = MultimodalFusion(
                hidden_size,
                self.anchor,
                n_heads=config["n_heads"],
                inner_size=config["inner_size"],
                hidden_act=config["hidden_act"],
                layer_norm_eps=config["layer_norm_eps"],
                use_anchor=config["use_anchor"],
            )
        self.fusion_losses = (
            FusionLosses(
                hidden_size,
                self.anchor,
                **weights,
                temperature=config["temperature"],
                structure_temperature=config["structure_temperature"],
                cross_genre_threshold=config["cross_genre_threshold"],
                collaborative_target=self.collaborative_target,
                distribution=config["distribution"],
            )
            if names and any(weights.values())
            else None
        )
        if config["freeze_mfl"]:
            self._check_frozen(config)
        # beside the next item; terms of weight 0 are not computed, nor what trains nothing more
        self.joint_terms = tuple(
            term
            for term in FUSION_TERMS
            if names and weights[f"{term}_weight"] > 0
            if not config["freeze_mfl"] or (term == "collaborative" and self.aligns_ids)
        )
        self.loss_names = ("next_item", *self.joint_terms)

        self.position_embedding = (
            nn.Embedding(self.max_seq_length, hidden_size)  # p
            if config["position"] == "learned"
            else None
        )
        self.norm = nn.LayerNorm(hidden_size, eps=config["layer_norm_eps"])
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])
        self.encoder = SparseAlignmentEncoder(
            hidden_size,
            n_layers=config["n_layers"],
            n_heads=config["n_heads"],
            inner_size=config["inner_size"],
            hidden_act=config["hidden_act"],
            hidden_dropout_prob=config["hidden_dropout_prob"],
            attn_dropout_prob=config["attn_dropout_prob"],
            layer_norm_eps=config["layer_norm_eps"],
            window_size=config["window_size"],
            block_size=config["block_size"],
            n_selected_blocks=config["n_selected_blocks"],
            selection=config["selection"],
            compression=config["compression"],
            block_evolution=config["block_evolution"],
            rotary=self.position_embedding is None,
            use_window=config["use_window"],
            use_block=config["use_block"],
            use_selected=config["use_selected"],
        )
        categories = dataset.item_categories
        genres = None if categories is None else _telling(categories.multi_hot)
        self.register_buffer("genres", genres, persistent=False)
        self.apply(self._init_weights)
        # what stands in a history for an item without id and content; layer norm has no gradient
        # to speak of at the zero vector that such an item has as a candidate
        self.unknown = (
            None
            if self.use_id or not names
            else nn.Parameter(torch.randn(hidden_size) * self.initializer_range)
        )

    def _check_frozen(self, config: Config) -> None:
        if not self.features.names:
            return  # there is no fusion layer
        if self.fusion_losses is None or config["mfl_pretrain_epochs"] == 0:
            raise ValueError(
                "freeze_mfl: True keeps the fusion layer as pre-training left it, and there is no "
                "pre-training; set mfl_pretrain_epochs and a loss weight above 0, or freeze_mfl: "
                "False"
            )
        if config["collaborative_weight"] > 0 and self.collaborative_target == "cooccurrence":
            raise ValueError(
                "freeze_mfl: True with collaborative_target: cooccurrence: pre-training sees no "
                "history and nothing would train that loss; use collaborative_target: id, or "
                "collaborative_weight: 0"
            )

    # ------------------------------------------------------------------ items

    def item_vectors(self, items: Tensor) -> Tensor:
        """Fused content and id embedding, ``(U, D)``."""
        return self._vectors(items, self._fused(items))

    def _fused(self, items: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Fused content z (U, D), projections h (U, M, D), presence (U, M)."""
        if not self.features.names:
            return None
        h, present = self.project(items)
        return self.fusion(h, present), h, present

    def _vectors(self, items: Tensor, fused: tuple[Tensor, Tensor, Tensor] | None) -> Tensor:
        if fused is None:
            return self.item_embedding.weight[items]
        content = fused[0] * fused[0].size(-1) ** -0.5
        return content + self.item_embedding.weight[items] if self.use_id else content

    # ------------------------------------------------------------------ users

    def _inputs(self, item_seq: Tensor, items: Tensor) -> Tensor:
        if self.unknown is not None:
            is_blank = (items == 0).all(-1, keepdim=True)
            items = torch.where(is_blank, self.unknown, items)
        x = F.embedding(item_seq, items)  # (B, L, D); items[...] sums its gradient in any order
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[: item_seq.size(1)]
        return self.dropout(self.norm(x))

    def states(self, item_seq: Tensor, item_seq_len: Tensor, items: Tensor) -> Tensor:
        """States ``(B, L, D)`` at every position."""
        return self.encoder(self._inputs(item_seq, items), item_seq_len)

    def forward(self, item_seq: Tensor, item_seq_len: Tensor, items: Tensor) -> Tensor:
        """User vectors ``(B, D)``, the states at the last real positions."""
        return self.encoder.last(self._inputs(item_seq, items), item_seq_len)

    # ------------------------------------------------------------------ interpretation

    @torch.no_grad()
    def explain(self, material: Material) -> dict[str, Table]:
        """Attention of the fusion layer over the modalities, gates of the sparse attention.

        Returns:
            ``fusion_by_category``, with modalities: their mean attention weight over the items of
            each category; items without any modality are left out. ``gates_by_activity``: by
            layer, the mean gate of each branch at the last position, where the user vector is
            read. A gate scales its branch, 0 to 1; gates do not sum to one, and a large gate on a
            small vector adds little.
        """
        tables = {}
        names = weight_columns(self.features.names)
        if names:
            h, present = self.project(self.all_items())
            weights = self.fusion.attention_weights(h, present).cpu().double()  # (N, M)
            described = present.any(1).cpu()
            described[0] = False
            tables["fusion_by_category"] = Table(
                by_category(
                    weights.numpy() * described[:, None].numpy(),
                    described.long().numpy(),
                    names,
                    material.categories,
                    "items",
                ),
                "MUFASA, all items: fusion by category",
                names,
                "mean attention to a modality",
            )
        gates = self._gate_frame(material)
        branches = self.encoder.branches
        tables["gates_by_activity"] = Table(
            by_activity(gates, branches, panel="layer"),
            "MUFASA, test histories: gates of the sparse attention by user activity",
            branches,
            "mean gate of a branch",
            panel="layer",
        )
        return tables

    def _gate_frame(self, material: Material) -> pd.DataFrame:
        """Gates at the last position: a row for each test history and layer."""
        parts = []
        for batch in material.batches():
            item_seq, length = self.histories(batch)
            gates = self.encoder.last_gates(self._inputs(item_seq, self.scoring_table()), length)
            for layer, values in enumerate(gates.cpu().unbind(1), 1):
                frame = pd.DataFrame(values.numpy(), columns=list(self.encoder.branches))
                parts.append(frame.assign(history_length=length.cpu().numpy(), layer=layer))
        return pd.concat(parts, ignore_index=True)

    # ------------------------------------------------------------------ objective

    def calculate_loss(self, interaction: Interaction) -> tuple[Tensor, ...]:
        """Next-item cross-entropy, then the weighted fusion losses in the order of the paper."""
        step = self.step_items(interaction)
        fused = self._fused(step.items)
        next_item = self.next_item_loss(interaction, self._vectors(step.items, fused), step)
        if self.fusion_losses is None or fused is None or not self.joint_terms:
            return (next_item,)
        chosen = self._distinct_items(interaction)  # (U,)
        neighbours = (
            self._neighbours(interaction, chosen)
            if self.collaborative_target == "cooccurrence"
            else None
        )
        z, h, present = (part[step.place[chosen]] for part in fused)
        return (
            next_item,
            *self._terms(
                self.fusion_losses, chosen, z, h, present, neighbours, self.joint_terms
            ).values(),
        )

    def fusion_terms(self, items: Tensor) -> dict[str, Tensor]:
        """The weighted fusion losses of items ``(U,)`` alone, for pre-training."""
        fused = self._fused(items)
        if self.fusion_losses is None or fused is None:
            raise ValueError("there are no fusion losses: no modality, or every weight is 0")
        # no history is at hand: with co-occurrence as target, no item has a positive
        nobody = torch.zeros(len(items), len(items), dtype=torch.bool, device=items.device)
        return self._terms(self.fusion_losses, items, *fused, nobody, FUSION_TERMS)

    def catalogue_batches(self) -> list[Tensor]:
        """All real items in random batches of ``mfl_batch_items``."""
        order = torch.randperm(self.n_items - 1, device=self.norm.weight.device)
        return list(torch.split(order + 1, self.mfl_batch_items))

    def fusion_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the fusion layer and of its losses, without the id embeddings."""
        if self.features.names:
            yield from self.project.parameters()
            yield from self.fusion.parameters()
        if self.fusion_losses is not None:
            yield from self.fusion_losses.parameters()

    def _terms(
        self,
        losses: FusionLosses,
        items: Tensor,
        z: Tensor,
        h: Tensor,
        present: Tensor,
        neighbours: Tensor | None,
        names: tuple[str, ...],
    ) -> dict[str, Tensor]:
        anchor = self.project.features[self.features.names[self.anchor]]
        terms: dict[str, Tensor] = losses(
            z,
            h,
            present,
            anchor(items),
            ids=self.item_embedding.weight[items] if self.aligns_ids else None,
            categories=None if self.genres is None else self.genres[items],
            neighbours=neighbours,
            terms=names,
        )
        return terms

    def _distinct_items(self, interaction: Interaction) -> Tensor:
        """Real items of histories and targets ``(U,)``, at most ``mfl_batch_items``, at random."""
        item_seq, length = self.histories(interaction)
        real = padding_mask(length, item_seq.size(1))
        items: Tensor = torch.unique(torch.cat([item_seq[real], interaction[self.POS_ITEM_ID]]))
        if len(items) > self.mfl_batch_items:
            keep = torch.randperm(len(items), device=items.device)[: self.mfl_batch_items]
            items = items[keep]
        return items

    def _neighbours(self, interaction: Interaction, items: Tensor) -> Tensor:
        """Whether two of ``items`` follow each other in a row of the batch, ``(U, U)``.

        A row is a history and, behind it, its target.
        """
        item_seq, length = self.histories(interaction)
        rows = F.pad(item_seq, (0, 1))
        rows = rows.scatter(1, length[:, None], interaction[self.POS_ITEM_ID][:, None])
        place = torch.full((self.n_items,), -1, dtype=torch.long, device=items.device)
        place[items] = torch.arange(len(items), device=items.device)
        real = padding_mask(length, item_seq.size(1))
        first, second = place[rows[:, :-1][real]], place[rows[:, 1:][real]]
        both = (first >= 0) & (second >= 0)
        mask = torch.zeros(len(items), len(items), dtype=torch.bool, device=items.device)
        mask[first[both], second[both]] = True
        return mask | mask.T


def _telling(multi_hot: Tensor) -> Tensor:
    """Categories of items (N, C), without those that more than nine tenths of the items have.

    Such a category, often the root of a shop's tree, says nothing of the genre; with it no two
    items would be of different genres.
    """
    return multi_hot & (multi_hot.sum(0) <= 0.9 * multi_hot.any(1).sum())
