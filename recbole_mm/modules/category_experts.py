r"""Category-guided attentive mixture of experts (CAMoE) of CAMMSR, arXiv 2603.04320.

A modality that an item lacks, and padding, which is never among the real positions, have no
influence: zeros stand in its place in the input of the experts, it is no key of the gate, and its
weight is exactly zero. [ours: the paper's data are complete]

Shapes: T real positions of a batch, M modalities, D hidden size, E experts, C categories.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_mm.errors import check_choice
from recbole_mm.layers.experts import AttentiveGate, GatedExperts, LinearGate
from recbole_mm.ops.masking import masked_mean, masked_softmax
from recbole_mm.ops.packing import Packing

GATES = ("attentive", "linear")
REDUCTIONS = ("sum", "mean")
POOLS = ("multihot", "max")
SIGNS = (1, -1)


class Guidance(NamedTuple):
    """What the categories say about a position.

    Attributes:
        weights: ``(T, M)``, w; sums to one over the modalities that are present.
        loss: Scalar, mean binary cross-entropy over the categories, the modalities that are present
            and the positions that have a category.
    """

    weights: Tensor
    loss: Tensor


class CategoryGuidance(nn.Module):
    r"""Weights of the modalities, from how badly each of them predicts the item's categories.

    .. math::
        \hat y^m = W_c^m e^m + b_c^m, \qquad
        d^m = \sum_c \operatorname{BCE}(\hat y^m_c, y_c), \qquad
        w^m = \operatorname{softmax}_m (s \, d^m)

    with ``s`` the ``sign``. As printed, ``s = 1``: the modality that predicts the categories
    *worse* gets *more* weight. Where an item has no category all weights are equal. The loss is
    the mean of :math:`\operatorname{BCE}(\hat y^m_c, y_c)`, whatever ``reduction`` and ``pool``.

    Source: CAMMSR, Eq. (8)-(11) [paper], the pool ``max`` too; ``sign`` -1, ``reduction`` mean
    [ours]; the loss [ours: HM4SR has one].

    Args:
        n_modalities: Number of modalities ``M``.
        hidden_size: Width ``D``.
        n_categories: Number of categories ``C``, at least 1.
        sign: 1 as printed, or -1.
        reduction: ``sum`` over categories as printed, or ``mean``.
        pool: ``multihot``: one d against all labels of an item; ``max``: the largest of the d
            against each label alone.

    Shape:
        - e: ``(T, M, D)``
        - present: ``(T, M)`` bool
        - labels: ``(T, C)`` bool

    Raises:
        ValueError: If there is no category or a choice is unknown.
    """

    def __init__(
        self,
        n_modalities: int,
        hidden_size: int,
        n_categories: int,
        sign: int = 1,
        reduction: str = "sum",
        pool: str = "multihot",
    ) -> None:
        super().__init__()
        if n_categories < 1:
            raise ValueError("there is no category to be guided by; set category_guided: False")
        check_choice("category_weight_sign", sign, SIGNS)
        check_choice("category_reduction", reduction, REDUCTIONS)
        check_choice("category_pool", pool, POOLS)
        self.sign = sign
        self.reduction = reduction
        self.pool = pool
        self.weight = nn.Parameter(torch.empty(n_modalities, hidden_size, n_categories))  # W_c
        self.bias = nn.Parameter(torch.empty(n_modalities, n_categories))  # b_c
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weights from a normal distribution, as RecBole does; zero the biases."""
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)

    def forward(self, e: Tensor, present: Tensor, labels: Tensor) -> Guidance:
        """Weigh the modalities of every position; shapes as in the class."""
        known = labels.any(-1, keepdim=True)  # (T, 1)
        logits_MTC = torch.baddbmm(self.bias.unsqueeze(1), e.transpose(0, 1), self.weight)
        target = labels.to(logits_MTC.dtype).expand_as(logits_MTC)
        error = F.binary_cross_entropy_with_logits(logits_MTC, target, reduction="none").sum(-1).T
        loss = masked_mean(error.flatten(), (present & known).flatten(), dim=0) / labels.shape[-1]
        if self.pool == "max":
            # against label c alone it is sum_c' softplus(logit_c') - logit_c; in the type of the
            # error above, since a sum over hundreds of categories has steps of 2 in bfloat16
            logits_MTC = logits_MTC.to(error.dtype)
            lowest = logits_MTC.masked_fill(~labels, torch.inf).amin(-1)
            error = (F.softplus(logits_MTC).sum(-1) - lowest).T
        if self.reduction == "mean":
            error = error / labels.shape[-1]
        d = torch.where(known, error, 0.0)  # (T, M), Eq. (8)-(9)
        return Guidance(masked_softmax(self.sign * d, present), loss)


class Fused(NamedTuple):
    """Output of :class:`CategoryGuidedExperts`.

    Attributes:
        states: ``(T, M, D)``; a missing modality keeps what came in.
        weights: ``(T, M)``, exactly zero for a missing modality.
        category_loss: Scalar, see :class:`Guidance`; 0 without guidance.
    """

    states: Tensor
    weights: Tensor
    category_loss: Tensor


class CategoryGuidedExperts(nn.Module):
    r"""Every modality's vector plus what the experts make of all modalities together.

    .. math::
        \hat e^m = \sum_k g^m_k \operatorname{Expert}^m_k([e^1; \dots; e^M]), \qquad
        \bar e^m = e^m + w^m \hat e^m

    Source: CAMMSR, Eq. (5)-(11) [paper]; experts of its own for each modality [ours: the text is
    ambiguous, ``share_experts`` has one set for all].

    Args:
        n_modalities: Number of modalities ``M``.
        hidden_size: Width ``D``; experts have the widths ``M * D``, ``4 * D``, ``D`` [paper].
        n_experts: Experts of a set.
        n_categories: Number of categories ``C``; 0 means equal weights, no guidance.
        gate: ``attentive`` or ``linear``, see :class:`.AttentiveGate` and :class:`.LinearGate`.
        gate_causal: Whether the attentive gate sees earlier positions only.
        share_experts: Whether all modalities share one set of experts.
        category_weight_sign: See :class:`CategoryGuidance`.
        category_reduction: See :class:`CategoryGuidance`.
        category_pool: See :class:`CategoryGuidance`.

    Shape:
        - e: ``(T, M, D)``
        - present: ``(T, M)`` bool, at least one in a row
        - labels: ``(T, C)`` bool

    Raises:
        ValueError: If a number is out of range or a choice is unknown.
    """

    def __init__(
        self,
        n_modalities: int,
        hidden_size: int,
        n_experts: int = 4,
        n_categories: int = 0,
        gate: str = "attentive",
        gate_causal: bool = False,
        share_experts: bool = False,
        category_weight_sign: int = 1,
        category_reduction: str = "sum",
        category_pool: str = "multihot",
    ) -> None:
        super().__init__()
        check_choice("gate", gate, GATES)
        self.experts = GatedExperts(
            1 if share_experts else n_modalities,
            n_experts,
            n_modalities * hidden_size,
            4 * hidden_size,
            hidden_size,
        )
        self.gate = (
            AttentiveGate(n_modalities, hidden_size, n_experts, gate_causal)
            if gate == "attentive"
            else LinearGate(n_modalities, hidden_size, n_experts)
        )
        self.guidance = (
            CategoryGuidance(
                n_modalities,
                hidden_size,
                n_categories,
                category_weight_sign,
                category_reduction,
                category_pool,
            )
            if n_categories
            else None
        )

    def forward(self, e: Tensor, present: Tensor, labels: Tensor, packing: Packing) -> Fused:
        """Fuse the modalities of every real position; shapes as in the class."""
        seen = torch.where(present.unsqueeze(-1), e, 0.0)
        gates = self.gate(seen, present, packing)  # g: (T, M, E)
        mixed = self.experts(seen.flatten(1), gates)  # ê: (T, M, D)
        if self.guidance is None:
            weights = masked_softmax(e.new_zeros(present.shape), present)  # equal
            category_loss = e.new_zeros(())
        else:
            weights, category_loss = self.guidance(seen, present, labels)  # w: (T, M)
        return Fused(e + weights.unsqueeze(-1) * mixed, weights, category_loss)
