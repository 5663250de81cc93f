r"""Rotary position embedding: scores depend on how far apart two positions are.

Source: Su et al., *RoFormer*, 2021 (arXiv 2104.09864), Eq. 34, with the two halves of a vector as
the pairs. Nothing is trained and no length is fixed: a position beyond those seen in training is
one more distance.

Shapes: H heads, T positions, d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BASE = 10_000.0  # of the wave lengths, as in the source


def rotate(x: Tensor, position: Tensor) -> Tensor:
    r"""Turn each pair of entries by an angle that grows with the position.

    .. math::
        (a_i, b_i) \mapsto (a_i \cos t\theta_i - b_i \sin t\theta_i,
        b_i \cos t\theta_i + a_i \sin t\theta_i), \qquad \theta_i = 10000^{-2i/d}

    with :math:`a` the first half of a vector, :math:`b` the second and :math:`t` its position: the
    product of two turned vectors depends on the difference of their positions alone.

    Args:
        x: ``(..., T, d)``, ``d`` even.
        position: ``(T,)``, or ``(..., T)`` if it broadcasts to ``x`` without its last dimension;
            integers, or fractions such as the middle of a block.

    Returns:
        The shape and type of ``x``.
    """
    d = x.shape[-1]
    # float64 angles: in float32 positions in the thousands would be off by their rounding
    theta = _BASE ** (-torch.arange(0, d, 2, dtype=torch.float64, device=x.device) / d)
    angle = position.to(torch.float64)[..., None] * theta
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
