"""Contrastive losses on cosine similarity.

A row that is not present, or of which every pair is ignored, influences neither value nor
gradient, whatever stands there, NaN included. With fewer than two usable rows there is nothing
to contrast: the loss is exactly 0, and so is its gradient.

Shapes: ... any leading dimensions, B batch (anchors), C candidates, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_mm.ops.masking import masked_mean


def cosine_similarity(left: Tensor, right: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cosine of every row of ``left`` with every row of ``right``; 0 for a row of zeros.

    Args:
        left: ``(..., B, D)``.
        right: ``(..., C, D)``.
        temperature: What to divide by; here, on B x D numbers, it costs next to nothing.

    Returns:
        ``(..., B, C)``, in float32 or wider.
    """
    # eps: float16, which autocast may bring, rounds the default 1e-12 to 0
    left = F.normalize(left, dim=-1, eps=1e-6) / temperature
    similarity = left @ F.normalize(right, dim=-1, eps=1e-6).mT
    return similarity.to(torch.promote_types(similarity.dtype, torch.float32))


def in_batch_info_nce(
    anchor: Tensor,
    positive: Tensor,
    *,
    temperature: float,
    group: Tensor | None = None,
    present: Tensor | None = None,
) -> Tensor:
    r"""InfoNCE with the other rows of the batch as negatives.

    .. math::
        \ell_i = -\log \frac{\exp(s_{ii} / \tau)}{\sum_{j \in N(i)} \exp(s_{ij} / \tau)},
        \qquad N(i) = \{i\} \cup \{j : g_j \neq g_i\}

    where :math:`s_{ij}` is the cosine similarity of anchor ``i`` and positive ``j``.
    Rows of the same group (for example the same target item) are false negatives
    of each other and leave the denominator.

    Source: van den Oord et al., *Representation Learning with Contrastive
    Predictive Coding*, 2018, Eq. (4).

    Args:
        anchor: ``(B, D)``.
        positive: ``(B, D)``; row ``i`` is the positive of anchor ``i``.
        temperature: :math:`\tau`, positive.
        group: ``(B,)`` integer group ids, or ``None`` when all rows are distinct.
        present: ``(B,)`` bool; rows to use, as anchor and as negative. ``None`` means all.

    Returns:
        Scalar, the mean over the present rows.

    Raises:
        ValueError: If the shapes differ or ``temperature`` is not positive.
    """
    if anchor.shape != positive.shape:
        raise ValueError(f"anchor {tuple(anchor.shape)} != positive {tuple(positive.shape)}")
    _check_temperature(temperature)
    B = len(anchor)
    if present is None:
        present = anchor.new_ones(B, dtype=torch.bool)
    _check_shape("present", present, (B,))

    # rows are blanked before the product: 0 * NaN in its gradient would be NaN
    anchor = anchor.masked_fill(~present[:, None], 0.0)
    positive = positive.masked_fill(~present[:, None], 0.0)
    logits = cosine_similarity(anchor, positive, temperature=temperature)  # (B, B)
    ignored = ~present[None, :]
    if group is not None:
        _check_shape("group", group, (B,))
        ignored = ignored | (group[:, None] == group[None, :])
    itself = torch.eye(B, dtype=torch.bool, device=anchor.device)
    logits = logits.masked_fill(ignored & ~itself, float("-inf"))
    per_row = F.cross_entropy(logits, torch.arange(B, device=anchor.device), reduction="none")
    return masked_mean(per_row, present, dim=0)


def multi_positive_info_nce(
    anchor: Tensor,
    candidates: Tensor,
    positive_mask: Tensor,
    *,
    temperature: float,
    ignore_mask: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    r"""InfoNCE of anchors that may have several positives, or none.

    .. math::
        \ell_i = -\frac{1}{|P(i)|} \sum_{p \in P(i)}
        \log \frac{\exp(s_{ip} / \tau)}{\sum_{j \in K(i)} \exp(s_{ij} / \tau)}

    where :math:`s_{ij}` is the cosine similarity of anchor ``i`` and candidate ``j``,
    :math:`K(i)` the candidates that are not ignored and :math:`P(i) \subseteq K(i)` the
    positives among them. An anchor without a positive has no loss and is not counted.

    Source: Khosla et al., *Supervised Contrastive Learning*, NeurIPS 2020, Eq. (2). One
    departure: the pair ``(i, i)`` is a pair like any other; ignore it where it should not count.

    Args:
        anchor: ``(B, D)``.
        candidates: ``(C, D)``.
        positive_mask: ``(B, C)`` bool; pairs to be drawn together.
        temperature: :math:`\tau`, positive.
        ignore_mask: ``(B, C)`` bool; pairs that are neither negative nor, whatever
            ``positive_mask`` says, positive. ``None`` means none.
        symmetric: Whether to average with the loss that has anchors and candidates swapped.

    Returns:
        Scalar, the mean over the anchors that have a positive; 0 if there are none.

    Raises:
        ValueError: If the shapes do not fit or ``temperature`` is not positive.
    """
    _check_temperature(temperature)
    if anchor.shape[1:] != candidates.shape[1:]:
        raise ValueError(
            f"anchor {tuple(anchor.shape)} and candidates {tuple(candidates.shape)} "
            "must have the same width"
        )
    B, C = len(anchor), len(candidates)
    if ignore_mask is None:
        ignore_mask = torch.zeros_like(positive_mask)
    _check_shape("positive_mask", positive_mask, (B, C))
    _check_shape("ignore_mask", ignore_mask, (B, C))

    # rows are blanked before the product: 0 * NaN in its gradient would be NaN
    anchor = anchor.masked_fill(ignore_mask.all(1)[:, None], 0.0)
    candidates = candidates.masked_fill(ignore_mask.all(0)[:, None], 0.0)
    logits = cosine_similarity(anchor, candidates, temperature=temperature)  # (B, C)
    # not -inf: the gradient of a row with nothing left would pass through NaN
    logits = logits.masked_fill(ignore_mask, torch.finfo(logits.dtype).min)
    positive = positive_mask & ~ignore_mask
    loss = _mean_surprise(logits, positive, dim=1)
    if symmetric:
        loss = (loss + _mean_surprise(logits, positive, dim=0)) / 2
    return loss


def _mean_surprise(logits: Tensor, positive: Tensor, dim: int) -> Tensor:
    """Mean of -log softmax over the positives of a slice, then over slices that have some."""
    per_slice = logits.logsumexp(dim) - masked_mean(logits, positive, dim)
    return masked_mean(per_slice, positive.any(dim), dim=0)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")
