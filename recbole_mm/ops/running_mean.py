"""Weighted means of every prefix of a sequence.

Shapes: B batch, L sequence length, K means at each position, D width, C blocks of b positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recbole_mm.ops.attention_tools import score_dtype
from recbole_mm.ops.masking import causal_mask

BLOCK = 32  # positions; what is held grows with L * (BLOCK + L / BLOCK)


def running_softmax_mean(scores: Tensor, values: Tensor) -> Tensor:
    r"""Softmax means of what has been seen so far, at every position.

    .. math::
        y_{jk} = \frac{\sum_{l \le j} e^{s_{lk}} v_l}{\sum_{l \le j} e^{s_{lk}}}

    A position adds up its own block and one sum of each earlier block, all of them relative to the
    largest score so far: nothing overflows, and no prefix is lost because a larger score comes
    later, as in a running sum relative to the largest of the row. Rows are padded on the right; a
    position does not see what comes after it, so that padding needs no mask.

    Args:
        scores: ``(B, L, K)``, finite.
        values: ``(B, L, D)``.

    Returns:
        ``(B, L, K, D)`` in the type of ``values``; sums are taken in float32 at least. No tensor of
        L * L is formed.
    """
    with torch.autocast(scores.device.type, enabled=False):  # it would round what is summed
        return _running_softmax_mean(scores, values)


def _running_softmax_mean(scores: Tensor, values: Tensor) -> Tensor:
    B, L, K = scores.shape
    dtype = values.dtype
    scores, values = (x.to(score_dtype(x.dtype)) for x in (scores, values))
    b = min(BLOCK, max(1, L))
    left, lowest = -L % b, torch.finfo(scores.dtype).min
    # not by F.pad, whose gradient has other strides than torch.compile (2.13) believes
    scores = torch.cat([scores, torch.full_like(scores[:, :left], lowest)], dim=1)
    values = torch.cat([values, torch.zeros_like(values[:, :left])], dim=1)
    peak = scores.detach().cummax(1).values  # any number would do, the largest keeps exp in range
    scores, peak = (x.view(B, -1, b, K).transpose(2, 3) for x in (scores, peak))  # (B, C, K, b)
    values = values.view(B, -1, b, values.size(-1))  # (B, C, b, D)
    C = values.size(1)

    seen = causal_mask(b, scores.device)
    own = (scores.unsqueeze(3) - peak.unsqueeze(4)).masked_fill(~seen, float("-inf")).exp()
    total = (own.flatten(2, 3) @ values).view(B, C, K, b, -1)
    weight = own.sum(-1)  # (B, C, K, b)
    if C > 1:
        top = scores.detach().amax(-1)  # (B, C, K)
        part = (scores - top.unsqueeze(-1)).exp()  # (B, C, K, b)
        # from every position to the earlier blocks: (B, K, C * b, C)
        far = top.permute(0, 2, 1)[:, :, None, None] - peak.permute(0, 2, 1, 3).unsqueeze(-1)
        earlier = causal_mask(C, scores.device).tril(-1)[:, None]
        far = far.masked_fill(~earlier, float("-inf")).exp().flatten(2, 3)
        before = far @ (part @ values).transpose(1, 2)  # (B, K, C * b, D)
        total = total + before.view(B, K, C, b, -1).transpose(1, 2)
        mass = far @ part.sum(-1).permute(0, 2, 1).unsqueeze(-1)  # (B, K, C * b, 1)
        weight = weight + mass.view(B, K, C, b).transpose(1, 2)
    mean = total / weight.unsqueeze(-1)  # (B, C, K, b, D)
    return mean.transpose(2, 3).flatten(1, 2)[:, :L].to(dtype)
