"""Attention of each query to the ``w`` latest keys, in time and memory linear in ``L``.

Queries are cut into tiles. The keys of a tile are one run of tokens, the band, which overlaps
with that of the next tile; the bands are a strided view, not a copy.

Shapes: G rows (batch times heads), L sequence length, d width of a head, t queries of a tile,
N tiles of all rows together, K keys of a band.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_mm.ops.attention_tools import (
    LN_2,
    Dropout,
    hidden,
    mix,
    scores_of,
    softmax_,
    tile_gradients,
    tiles,
)


class _Bands:
    """How rows of ``size`` tokens fall into tiles, and each tile's band of keys."""

    def __init__(self, size: int, window: int) -> None:
        self.tile = min(64, max(16, 1 << (max(1, window // 2) - 1).bit_length()))  # t
        self.before = -(-(window - 1) // self.tile)  # tiles of the band before the query's own
        self.in_row = -(-size // self.tile)
        self.size = size
        self.window = window

    @property
    def keys(self) -> int:
        return (self.before + 1) * self.tile  # K

    def tiled(self, x: Tensor) -> Tensor:
        """Cut (G, L, d) into (N, t, d), the last tile of a row filled up with zeros."""
        missing = -self.size % self.tile
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        return x.reshape(-1, self.tile, x.shape[-1])

    def untiled(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`tiled`."""
        rows = x.reshape(-1, self.in_row * self.tile, x.shape[-1])
        return rows[:, : self.size]

    def banded(self, x: Tensor) -> Tensor:
        """Band of each tile, (N, K, d): a view that reaches back into earlier tiles."""
        x = F.pad(self.tiled(x).flatten(0, 1), (0, 0, self.before * self.tile, 0))
        n_tiles, width = len(x) // self.tile - self.before, x.shape[-1]
        return x.as_strided((n_tiles, self.keys, width), (self.tile * width, width, 1))

    def mask(self, like: Tensor) -> Tensor:
        """Additive mask (t, K) of a tile with all of its band in its own row."""
        query = torch.arange(self.tile, device=like.device)[:, None]
        key = torch.arange(-self.before * self.tile, self.tile, device=like.device)
        return hidden((key <= query) & (key > query - self.window), like.dtype)

    def hide_earlier_rows_(self, scores: Tensor, first: int) -> None:
        """The first tiles of a row have bands that begin in the row before: hide that part."""
        for index in range(min(self.before, self.in_row)):
            foreign = (self.before - index) * self.tile
            scores[(index - first) % self.in_row :: self.in_row, :, :foreign].fill_(-math.inf)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, window: int, dropout: Dropout
    ) -> Tensor:
        bands = _Bands(query.shape[1], window)
        q, k, v = bands.tiled(query), bands.banded(key), bands.banded(value)
        mask = bands.mask(query)
        output = torch.empty_like(q)
        log_sum = mask.new_empty(*q.shape[:2], 1)
        for part in tiles(len(q), mask.numel(), q.device):
            scores = scores_of(q[part], k[part]).add_(mask)  # (n, t, K)
            bands.hide_earlier_rows_(scores, part.start)
            weights, total, highest = softmax_(scores)
            log_sum[part] = total.log2().add_(highest)
            keep = dropout.draw(weights)
            if keep is not None:
                weights.mul_(keep)
            output[part] = mix(weights, v[part]).mul_(dropout.scale / total)
        output = bands.untiled(output)
        ctx.save_for_backward(query, key, value, output, log_sum)
        ctx.bands, ctx.dropout = bands, dropout
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum = ctx.saved_tensors
        bands, dropout = ctx.bands, ctx.dropout
        mask = bands.mask(query)
        q, k, v = bands.tiled(query), bands.banded(key), bands.banded(value)
        delta = bands.tiled((grad_output * output).sum(-1, keepdim=True) * LN_2)
        grad = bands.tiled(grad_output * (LN_2 * dropout.scale))
        grad_query = torch.empty_like(q)
        grad_key = q.new_zeros(len(q) + bands.before, *q.shape[1:])
        grad_value = torch.zeros_like(grad_key)
        cuts = tiles(len(q), mask.numel(), q.device)
        for part, keep in zip(cuts, dropout.replay(), strict=False):
            scores = scores_of(q[part], k[part]).add_(mask)
            bands.hide_earlier_rows_(scores, part.start)
            grad_query[part], band_key, band_value = tile_gradients(
                scores, q[part], k[part], v[part], grad[part], log_sum[part], delta[part], keep
            )
            for back in range(bands.before + 1):
                place = slice(part.start + back, part.stop + back)
                piece = slice(back * bands.tile, (back + 1) * bands.tile)
                grad_key[place] += band_key[:, piece]
                grad_value[place] += band_value[:, piece]
        grad_key, grad_value = grad_key[bands.before :], grad_value[bands.before :].div_(LN_2)
        return (*(bands.untiled(x) for x in (grad_query, grad_key, grad_value)), None, None)


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, window: int, dropout: Dropout
) -> Tensor:
    """Attend to the keys ``j - w + 1 .. j``.

    Args:
        query: ``(G, L, d)``, multiplied by ``log2(e) / sqrt(d)``.
        key: ``(G, L, d)``.
        value: ``(G, L, d)``.
        window: Keys ``w`` in the window, the query's own included, at least 1.
        dropout: Falls on the attention weights.

    Returns:
        ``(G, L, d)``.
    """
    attend: Callable[..., Tensor] = _WindowAttention.apply
    return attend(query, key, value, window, dropout)
