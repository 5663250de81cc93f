"""Losses on the geometry of a batch of vectors: similarity structure, spread, distribution.

Every loss takes a ``present`` mask. A row that is not present influences neither value nor
gradient, whatever stands there, NaN included. With fewer than two present rows there is no
geometry: the loss is exactly 0, and so is its gradient.

Shapes: ... any leading dimensions (for example modalities; each has its own loss), B batch,
D width. ``present`` (..., B) is broadcast against the leading dimensions of ``x``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recbole_mm.losses.contrastive import cosine_similarity
from recbole_mm.ops.masking import masked_mean

_EPS = 1e-4  # added to a variance: keeps the gradient, and the logarithm, finite at zero


def similarity_structure(
    similarity: Tensor,
    x: Tensor,
    *,
    temperature: float,
    present: Tensor | None = None,
) -> Tensor:
    r"""Divergence of the neighbourhoods in ``x`` from those that ``similarity`` gives.

    .. math::
        p_{ij} = \operatorname{softmax}_{j \neq i}(t_{ij} / \tau), \quad
        q_{ij} = \operatorname{softmax}_{j \neq i}(\cos(x_i, x_j) / \tau), \quad
        \ell = \frac{1}{B} \sum_i \sum_{j \neq i} p_{ij} \log \frac{p_{ij}}{q_{ij}}

    Source: ours for MUFASA; the form is that of Hinton & Roweis, *Stochastic Neighbor
    Embedding*, NeurIPS 2002, Eq. (3), with cosine in place of distance.

    Args:
        similarity: ``(..., B, B)``, the :math:`t_{ij}` to be kept, for example the cosine
            similarities of titles. Its gradient is that of the formula: detach it where it
            is a fixed target.
        x: ``(..., B, D)``.
        temperature: :math:`\tau`, positive.
        present: ``(..., B)`` bool; ``None`` means all. An absent row is nobody's neighbour.

    Returns:
        ``(...)``, the mean over the present rows, at least 0.

    Raises:
        ValueError: If the shapes do not fit or ``temperature`` is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    B = x.shape[-2]
    if similarity.shape[-2:] != (B, B):
        raise ValueError(f"similarity must end in ({B}, {B}), got {tuple(similarity.shape)}")
    present = _present_rows(x, present)
    x = x.masked_fill(~present[..., None], 0.0)

    itself = torch.eye(B, dtype=torch.bool, device=x.device)
    ignored = ~(present[..., :, None] & present[..., None, :]) | itself  # (..., B, B)
    log_p = _log_softmax(similarity / temperature, ignored)
    log_q = _log_softmax(cosine_similarity(x, x, temperature=temperature), ignored)
    per_row = (log_p.exp() * (log_p - log_q)).sum(-1)  # (..., B)
    return masked_mean(per_row, present, dim=-1)


def variance_hinge(x: Tensor, *, present: Tensor | None = None) -> Tensor:
    r"""Keep every coordinate spread out: a batch must not collapse into one point.

    .. math::
        \ell = \frac{1}{D} \sum_d \max\bigl(0,\ 1 - \sqrt{\operatorname{Var}_i(x_{id}) +
        \epsilon}\bigr)

    Source: Bardes et al., *VICReg*, ICLR 2022, Eq. (1), with :math:`\gamma = 1`; the variance
    is the unbiased one.

    Args:
        x: ``(..., B, D)``.
        present: ``(..., B)`` bool; ``None`` means all.

    Returns:
        ``(...)``, between 0 and 1.

    Raises:
        ValueError: If ``present`` does not fit ``x``.
    """
    present = _present_rows(x, present)
    _, variance = _moments(x, present)
    hinge = (1 - (variance + _EPS).sqrt()).clamp(min=0).mean(-1)
    return _if_two(hinge, present)


def gaussian_moments(x: Tensor, *, present: Tensor | None = None) -> Tensor:
    r"""KL divergence of the moments of a batch from a standard normal, per coordinate.

    .. math::
        \ell = \frac{1}{D} \sum_d \frac{1}{2} \bigl(\sigma_d^2 + \mu_d^2 - 1 - \log
        \sigma_d^2\bigr), \qquad \sigma_d^2 = \operatorname{Var}_i(x_{id}) + \epsilon

    Source: Kingma & Welling, *Auto-Encoding Variational Bayes*, ICLR 2014, App. B, on moments
    of the batch (ours); the variance is the unbiased one. Divided by ``D`` so that a weight
    keeps its meaning when the width changes (ours).

    Args:
        x: ``(..., B, D)``.
        present: ``(..., B)`` bool; ``None`` means all.

    Returns:
        ``(...)``, in nats, at least 0.

    Raises:
        ValueError: If ``present`` does not fit ``x``.
    """
    present = _present_rows(x, present)
    mean, variance = _moments(x, present)
    variance = variance + _EPS
    divergence = (variance + mean.square() - 1 - variance.log()).mean(-1) / 2
    return _if_two(divergence, present)


def uniformity(x: Tensor, *, present: Tensor | None = None, t: float = 2.0) -> Tensor:
    r"""Spread the directions of a batch over the sphere.

    .. math::
        \ell = \log \frac{1}{B (B - 1)} \sum_{i \neq j} \exp\bigl(-t \lVert \hat x_i -
        \hat x_j \rVert^2\bigr), \qquad \hat x = x / \lVert x \rVert

    Source: Wang & Isola, *Understanding Contrastive Representation Learning through Alignment
    and Uniformity on the Hypersphere*, ICML 2020, Eq. (4).

    Args:
        x: ``(..., B, D)``, no present row zero.
        present: ``(..., B)`` bool; ``None`` means all.
        t: Sharpness of the kernel, positive.

    Returns:
        ``(...)``, between :math:`-4t` and 0.

    Raises:
        ValueError: If ``present`` does not fit ``x`` or ``t`` is not positive.
    """
    if not t > 0:
        raise ValueError(f"t must be positive, got {t}")
    present = _present_rows(x, present)
    x = x.masked_fill(~present[..., None], 0.0)
    exponent = 2 * t * (cosine_similarity(x, x) - 1)  # |a - b|^2 = 2 - 2 cos(a, b)
    itself = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
    ignored = ~(present[..., :, None] & present[..., None, :]) | itself
    exponent = exponent.masked_fill(ignored, torch.finfo(exponent.dtype).min).flatten(-2)
    n_pairs = (~ignored).flatten(-2).sum(-1).clamp(min=1)
    return _if_two(exponent.logsumexp(-1) - n_pairs.log(), present)


def _present_rows(x: Tensor, present: Tensor | None) -> Tensor:
    """The mask at the full shape (..., B)."""
    if present is None:
        return x.new_ones(x.shape[:-1], dtype=torch.bool)
    try:
        return present.expand(x.shape[:-1])
    except RuntimeError as error:
        raise ValueError(
            f"present {tuple(present.shape)} does not fit the rows {tuple(x.shape[:-1])}"
        ) from error


def _moments(x: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of the present rows, (..., D) each; 0 where undefined."""
    if x.dtype in (torch.float16, torch.bfloat16):  # autocast leaves such sums to the caller
        x = x.float()
    rows = present[..., None]
    mean = masked_mean(x, rows, dim=-2)
    deviation = (x - mean[..., None, :]).masked_fill(~rows, 0.0)
    count = rows.sum(-2)
    return mean, deviation.square().sum(-2) / (count - 1).clamp(min=1)


def _log_softmax(scores: Tensor, ignored: Tensor) -> Tensor:
    """Log-softmax over the pairs that count; at the others finite, its exponential exactly 0."""
    return scores.masked_fill(ignored, torch.finfo(scores.dtype).min).log_softmax(-1)


def _if_two(loss: Tensor, present: Tensor) -> Tensor:
    return loss.masked_fill(present.sum(-1) < 2, 0.0)
