"""MUFASA's Multimodal Fusion Layer (MFL) and its four losses.

Source: MUFASA, arXiv 2508.09664. [paper]: the title is a semantic anchor across genres; the layer
is trained by (i) cross-genre semantic alignment, (ii) alignment to the collaborative space,
(iii) keeping the similarity structure of titles while no modality collapses, (iv) a regulariser
on the distribution of the fused space. The formulas are not public: all of them are [ours].

Shapes: N items, U distinct items of a batch, M modalities, F width of the anchor's raw features,
D hidden size, H heads, C categories. ``present`` says which modality an item has.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from recbole_mm.errors import check_choice
from recbole_mm.layers.encoder import FeedForward
from recbole_mm.losses.alignment import (
    gaussian_moments,
    similarity_structure,
    uniformity,
    variance_hinge,
)
from recbole_mm.losses.contrastive import (
    cosine_similarity,
    in_batch_info_nce,
    multi_positive_info_nce,
)
from recbole_mm.ops.masking import masked_mean, masked_softmax

FUSION_TERMS = ("semantic", "collaborative", "structure", "distribution")
COLLABORATIVE_TARGETS = ("id", "cooccurrence")
DISTRIBUTIONS = ("gaussian", "uniformity")


class MultimodalFusion(nn.Module):
    r"""Fuse the projected modalities of every item, asked by its anchor.

    .. math::
        z' = \operatorname{LN}(h_a + \operatorname{MHA}(h_a, \{h_m : m \text{ present}\})),
        \qquad z = \operatorname{LN}(z' + \operatorname{FFN}(z'))

    An absent modality has weight exactly zero, whatever stands there. An item without its anchor
    is asked by the mean of what it has. An item without any modality gets the zero vector, and
    no gradient. Items do not see each other: the whole catalogue may be one call. There is no
    dropout: the vectors of the catalogue are the same for all histories of a batch.

    Source: MUFASA; the title as anchor is [paper], the formula [ours].

    Args:
        hidden_size: Width ``D``, a multiple of ``n_heads``.
        anchor: Index of the anchor among the ``M`` modalities.
        n_heads: Heads ``H``.
        inner_size: Width inside the feed-forward layer.
        hidden_act: Activation of the feed-forward layer, see ``layers.encoder.activation``.
        layer_norm_eps: Added to the variance in layer norm.
        use_anchor: ``False`` asks by the mean of the present modalities for every item, the
            "no anchor" ablation.

    Shape:
        - h: ``(N, M, D)``, projected modalities
        - present: ``(N, M)``, bool
        - output: ``(N, D)``

    Raises:
        ValueError: If ``n_heads`` does not divide ``hidden_size``; in a call, if the shapes do
            not fit or there is no modality ``anchor``.
    """

    def __init__(
        self,
        hidden_size: int,
        anchor: int,
        *,
        n_heads: int = 2,
        inner_size: int = 256,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-12,
        use_anchor: bool = True,
    ) -> None:
        super().__init__()
        if hidden_size % n_heads != 0:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of n_heads {n_heads}; change either"
            )
        self.n_heads = n_heads
        self.anchor = anchor
        self.use_anchor = use_anchor
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)  # one would cancel in softmax
        self.value = nn.Linear(hidden_size, hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.feed_forward = FeedForward(hidden_size, inner_size, hidden_act, 0.0, layer_norm_eps)

    def forward(self, h: Tensor, present: Tensor) -> Tensor:
        """Fused item vectors z; shapes as in the class."""
        self._check(h, present)
        h = h.masked_fill(~present[..., None], 0.0)
        asked_by = self._asked_by(h, present)  # (N, D)
        weights = self._weights(asked_by, h, present)  # (N, M, H)
        # products and sums, not a batched matmul or SDPA: M is a handful of keys
        mixed = (weights[..., None] * self._heads(self.value(h))).sum(1).flatten(1)  # (N, D)
        z = self.LayerNorm(asked_by + self.dense(mixed))
        fused: Tensor = self.feed_forward(z)
        return fused.masked_fill(~present.any(1, keepdim=True), 0.0)

    def attention_weights(self, h: Tensor, present: Tensor) -> Tensor:
        """What each modality contributes to an item, for interpretation.

        Returns:
            ``(N, M)``, the mean over heads; a row sums to one, or to zero for
            an item without any modality.
        """
        self._check(h, present)
        h = h.masked_fill(~present[..., None], 0.0)
        return self._weights(self._asked_by(h, present), h, present).mean(-1)

    def _asked_by(self, h: Tensor, present: Tensor) -> Tensor:
        mean = masked_mean(h, present[..., None], dim=1)
        if not self.use_anchor:
            return mean
        return torch.where(present[:, self.anchor, None], h[:, self.anchor], mean)

    def _weights(self, asked_by: Tensor, h: Tensor, present: Tensor) -> Tensor:
        query = self._heads(self.query(asked_by))[:, None]  # (N, 1, H, D/H)
        key = self._heads(self.key(h))  # (N, M, H, D/H)
        scores = (query * key).sum(-1) * key.shape[-1] ** -0.5  # (N, M, H)
        return masked_softmax(scores, present[..., None], dim=1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.n_heads, x.shape[-1] // self.n_heads)

    def _check(self, h: Tensor, present: Tensor) -> None:
        if h.dim() != 3 or present.shape != h.shape[:2]:
            raise ValueError(
                f"h {tuple(h.shape)} and present {tuple(present.shape)} "
                "must be (N, M, D) and (N, M)"
            )
        if not 0 <= self.anchor < h.shape[1]:
            raise ValueError(
                f"anchor {self.anchor} is none of the {h.shape[1]} modalities; "
                f"use 0 to {h.shape[1] - 1}"
            )


class FusionLosses(nn.Module):
    r"""The four losses of the fusion layer on the distinct items of a batch.

    ``semantic``
        Symmetric InfoNCE between :math:`z_i` and :math:`P(h_{a,i})`, P a linear map. Given
        categories, items of another genre (both have categories and share none) whose titles
        have a cosine above ``cross_genre_threshold`` are positives too; items of one group
        (the same non-empty set of categories) are never negatives.
    ``collaborative``
        InfoNCE between :math:`P_c(z_i)` and the id embedding :math:`e_i`, or, with
        ``collaborative_target`` ``cooccurrence``, between :math:`P_c(z_i)` and
        :math:`P_c(z_j)` of the items that are its neighbours in a history. The id embedding
        is no fixed target: it learns from this term, too.
    ``structure``
        Mean over z and the M projected modalities of the divergence of their neighbourhoods
        from those of the titles (``similarity_structure``), plus the mean over modalities of
        ``variance_hinge``.
    ``distribution``
        ``gaussian_moments`` or ``uniformity`` of z.

    An item without its title takes no part in what compares with titles, and no part in
    anything if it has no modality at all; a modality that an item lacks has no influence.

    Source: MUFASA; the four purposes are [paper], every formula and every default is [ours].

    Args:
        hidden_size: Width ``D``.
        anchor: Index of the anchor among the ``M`` modalities.
        semantic_weight: Weight of ``semantic``; a term of weight 0 is not computed and its
            linear map does not exist.
        collaborative_weight: Weight of ``collaborative``.
        structure_weight: Weight of ``structure``.
        distribution_weight: Weight of ``distribution``.
        temperature: Of ``semantic`` and ``collaborative``. [ours]
        structure_temperature: Temperature :math:`\tau_s` of ``structure``. [ours]
        cross_genre_threshold: Cosine of titles above which another genre's item is a positive;
            above 1: none is (that of two equal titles may be rounded to just above 1). [ours]
        collaborative_target: ``id`` or ``cooccurrence``. [ours]
        distribution: ``gaussian`` or ``uniformity``. [ours]

    Raises:
        ValueError: If a weight is negative, a temperature not positive or a choice unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        anchor: int,
        *,
        semantic_weight: float,
        collaborative_weight: float,
        structure_weight: float,
        distribution_weight: float,
        temperature: float = 0.1,
        structure_temperature: float = 0.1,
        cross_genre_threshold: float = 0.8,
        collaborative_target: str = "id",
        distribution: str = "gaussian",
    ) -> None:
        super().__init__()
        self.weights = {
            "semantic": semantic_weight,
            "collaborative": collaborative_weight,
            "structure": structure_weight,
            "distribution": distribution_weight,
        }
        for term, weight in self.weights.items():
            if not weight >= 0:
                raise ValueError(f"{term}_weight must be at least 0, got {weight}")
        self.temperature = temperature
        self.structure_temperature = structure_temperature
        for name in ("temperature", "structure_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        check_choice("collaborative_target", collaborative_target, COLLABORATIVE_TARGETS)
        check_choice("distribution", distribution, DISTRIBUTIONS)
        self.anchor = anchor
        self.cross_genre_threshold = cross_genre_threshold
        self.collaborative_target = collaborative_target
        self.distribution = distribution
        if semantic_weight > 0:
            self.semantic_head = nn.Linear(hidden_size, hidden_size)  # P
        if collaborative_weight > 0:
            self.collaborative_head = nn.Linear(hidden_size, hidden_size)  # P_c

    def forward(
        self,
        z: Tensor,
        h: Tensor,
        present: Tensor,
        anchor_features: Tensor,
        *,
        ids: Tensor | None = None,
        categories: Tensor | None = None,
        neighbours: Tensor | None = None,
        terms: Collection[str] = FUSION_TERMS,
    ) -> dict[str, Tensor]:
        """Weighted losses of ``U`` distinct items.

        Args:
            z: ``(U, D)``, fused vectors.
            h: ``(U, M, D)``, projected modalities.
            present: ``(U, M)`` bool.
            anchor_features: ``(U, F)``, the anchor's raw features (of the titles): a fixed
                target, no gradient flows into them.
            ids: ``(U, D)``, id embeddings, for the collaborative target ``id``.
            categories: ``(U, C)`` bool, or ``None``: no item is told from another by genre.
            neighbours: ``(U, U)`` bool, whether item j is a neighbour of item i in a history,
                for the collaborative target ``cooccurrence``; the diagonal does not matter.
            terms: Names of those to compute.

        Returns:
            Scalars by name, in the order semantic, collaborative, structure, distribution;
            terms of weight 0, and those that are not asked for, are left out.

        Raises:
            ValueError: If the collaborative target is not given.
        """
        some = present.any(1)  # (U,)
        titled = present[:, self.anchor]
        z = z.masked_fill(~some[:, None], 0.0)
        h = h.masked_fill(~present[..., None], 0.0)
        titles = None
        wanted = {term for term in terms if self.weights[term] > 0}
        compares_genres = "semantic" in wanted and categories is not None
        if "structure" in wanted or compares_genres:
            features = anchor_features.detach()  # of no influence where there is no title
            titles = cosine_similarity(features, features)  # (U, U), once: F is wide

        losses = {}
        if "semantic" in wanted:
            losses["semantic"] = self._semantic(z, h[:, self.anchor], titled, titles, categories)
        if "collaborative" in wanted:
            losses["collaborative"] = self._collaborative(z, some, ids, neighbours)
        if "structure" in wanted and titles is not None:
            losses["structure"] = self._structure(z, h, present, titles)
        if "distribution" in wanted:
            regularise = uniformity if self.distribution == "uniformity" else gaussian_moments
            losses["distribution"] = regularise(z, present=some)
        return {term: self.weights[term] * loss for term, loss in losses.items()}

    def _semantic(
        self,
        z: Tensor,
        h_a: Tensor,
        titled: Tensor,
        titles: Tensor | None,
        categories: Tensor | None,
    ) -> Tensor:
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        positive = itself
        ignored = ~_pairs(titled)
        if categories is not None and titles is not None:
            same_group, other_genre = _genres(categories)
            positive = itself | (other_genre & (titles > self.cross_genre_threshold))
            ignored = ignored | (same_group & ~itself)
        return multi_positive_info_nce(
            z,
            self.semantic_head(h_a),
            positive,
            temperature=self.temperature,
            ignore_mask=ignored,
            symmetric=True,
        )

    def _collaborative(
        self, z: Tensor, some: Tensor, ids: Tensor | None, neighbours: Tensor | None
    ) -> Tensor:
        projected = self.collaborative_head(z)  # P_c(z)
        if self.collaborative_target == "id":
            if ids is None:
                raise ValueError("collaborative_target id needs ids: pass the id embeddings")
            return in_batch_info_nce(projected, ids, temperature=self.temperature, present=some)
        if neighbours is None:
            raise ValueError("collaborative_target cooccurrence needs neighbours: pass the mask")
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        return multi_positive_info_nce(
            projected,
            projected,
            neighbours,
            temperature=self.temperature,
            ignore_mask=itself | ~_pairs(some),
        )

    def _structure(self, z: Tensor, h: Tensor, present: Tensor, titles: Tensor) -> Tensor:
        titled = present[:, self.anchor]
        vectors = [(z, titled)]
        vectors += [(h[:, m], present[:, m] & titled) for m in range(h.shape[1])]
        # one by one: a (U, U) matrix at a time stays in the cache, measured up to 2 x faster
        divergences = [
            similarity_structure(
                titles, x, temperature=self.structure_temperature, present=compared
            )
            for x, compared in vectors
        ]
        spread = variance_hinge(h.transpose(0, 1), present=present.T)  # (M,)
        return torch.stack(divergences).mean() + spread.mean()


def _pairs(rows: Tensor) -> Tensor:
    return rows[:, None] & rows[None, :]


def _genres(categories: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of the same non-empty set of categories, and pairs of disjoint ones: (U, U) each."""
    sets = categories.to(torch.float32)
    shared = sets @ sets.T
    size = sets.sum(1)
    known = _pairs(size > 0)
    same = known & (shared == size[:, None]) & (shared == size[None, :])
    return same, known & (shared == 0)
