"""Attention of each query to one vector for each finished block, and the choice of best blocks.

Block ``c`` is visible to query ``j`` iff ``(c + 1) b - 1 <= j``. The query ``b - 1`` is the first
to see a block, and from there on each run of ``b`` queries, a *stretch*, sees the same blocks:
stretch ``s`` sees the blocks ``0 .. s``. Tiles are made of whole stretches.

Shapes: B batch, H heads, G = B H rows, L sequence length, d width of a head, b tokens in a
block, C = L // b finished blocks, m blocks to choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_mm.ops.attention_tools import (
    LN_2,
    Dropout,
    best_blocks,
    hidden,
    mix,
    n_fitting,
    score_dtype,
    scores_of,
    softmax_,
    tile_gradients,
    tiles,
)
from recbole_mm.ops.masking import masked_softmax


@dataclass(frozen=True)
class _Tile:
    """Queries of some rows and a run of stretches, and the blocks that the last of them sees."""

    rows: slice  # of G
    queries: slice
    blocks: slice
    first_stretch: int
    n_stretches: int

    @property
    def here(self) -> tuple[slice, slice]:
        """Index of the queries in (G, L, ...)."""
        return self.rows, self.queries

    @property
    def there(self) -> tuple[slice, slice]:
        """Index of the blocks in (G, C, ...)."""
        return self.rows, self.blocks


def _tiles(
    n_rows: int, n_heads: int, size: int, block_size: int, device: torch.device
) -> Iterator[_Tile]:
    n_blocks = size // block_size
    if n_blocks == 0:
        return
    n_stretches = -(-(size - block_size + 1) // block_size)
    # A tile computes the triangle above its last stretches in vain: many tiles waste little, few
    # tiles have little overhead. Measured: the best number grows with the root of the length.
    step = math.isqrt(2 * n_stretches) + 1
    n_scores = n_heads * block_size * n_blocks  # of a stretch, at most
    step = min(step, n_fitting(n_scores, device))
    n_rows_each = n_heads * n_fitting(step * n_scores, device)
    for row in range(0, n_rows, n_rows_each):
        for first in range(0, n_stretches, step):
            count = min(step, n_stretches - first)
            start = block_size - 1 + first * block_size
            yield _Tile(
                rows=slice(row, min(n_rows, row + n_rows_each)),
                queries=slice(start, min(size, start + count * block_size)),
                blocks=slice(0, first + count),
                first_stretch=first,
                n_stretches=count,
            )


def _visible_scores(query: Tensor, block_key: Tensor, tile: _Tile, block_size: int) -> Tensor:
    """Scores (g, T, K) of a tile; -inf where the block is not finished yet."""
    scores = scores_of(query[tile.here], block_key[tile.there])
    stretch = torch.arange(scores.shape[1], device=scores.device)[:, None] // block_size
    block = torch.arange(tile.n_stretches, device=scores.device)
    scores[..., tile.first_stretch :] += hidden(block <= stretch, query.dtype)
    return scores


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        block_key: Tensor,
        block_value: Tensor,
        gate: Tensor,
        n_heads: int,
        block_size: int,
        n_best: int,
        dropout: Dropout,
    ) -> tuple[Tensor, Tensor]:
        G, L, _ = query.shape
        mixed = torch.empty_like(query)
        mixed[:, : block_size - 1] = 0.0  # these queries see no block, and no tile holds them
        log_sum = query.new_zeros((G, L, 1), dtype=score_dtype(query.dtype))
        n_best = min(n_best, block_key.shape[1])
        best = torch.full((G // n_heads, L, n_best), -1, device=query.device)
        for tile in _tiles(G, n_heads, L, block_size, query.device):
            scores = _visible_scores(query, block_key, tile, block_size)
            weights, total, highest = softmax_(scores)
            log_sum[tile.here] = total.log2().add_(highest)
            kept = weights
            keep = dropout.draw(weights)
            if keep is not None:
                kept = weights * keep
            mixed[tile.here] = mix(kept, block_value[tile.there]).mul_(dropout.scale / total)
            if n_best > 0:
                heads = weights.div_(total).view(-1, n_heads, *weights.shape[1:]).unbind(1)
                merit = reduce(torch.add, heads)  # (rows, T, K); faster than a sum over H
                rows = slice(tile.rows.start // n_heads, tile.rows.stop // n_heads)
                best[rows, tile.queries] = _best_others(merit, tile, block_size, n_best)
        ctx.save_for_backward(query, block_key, block_value, gate, mixed, log_sum)
        ctx.sizes, ctx.dropout = (n_heads, block_size), dropout
        ctx.mark_non_differentiable(best)
        return gate * mixed, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, block_key, block_value, gate, mixed, log_sum = ctx.saved_tensors
        (n_heads, block_size), dropout = ctx.sizes, ctx.dropout
        G, L, _ = query.shape
        grad_gate = (grad_output * mixed).sum(-1, keepdim=True, dtype=log_sum.dtype)
        delta = grad_gate * LN_2
        log_sum = log_sum - gate.to(log_sum.dtype).log2()
        grad = grad_output * (LN_2 * dropout.scale)
        grad_query = torch.empty_like(query)
        grad_query[:, : block_size - 1] = 0.0
        grad_key, grad_value = torch.zeros_like(block_key), torch.zeros_like(block_value)
        cuts = _tiles(G, n_heads, L, block_size, query.device)
        for tile, keep in zip(cuts, dropout.replay(), strict=False):
            grad_query[tile.here], from_key, from_value = tile_gradients(
                _visible_scores(query, block_key, tile, block_size),
                query[tile.here],
                block_key[tile.there],
                block_value[tile.there],
                grad[tile.here],
                log_sum[tile.here],
                delta[tile.here],
                keep,
            )
            grad_key[tile.there] += from_key
            grad_value[tile.there] += from_value
        grad_value.div_(LN_2)
        return grad_query, grad_key, grad_value, grad_gate, None, None, None, None


def _best_others(merit: Tensor, tile: _Tile, block_size: int, n_best: int) -> Tensor:
    """Best blocks but a query's own, (rows, T, m); -1 where fewer are visible."""
    # the first query of a stretch is the last of its block, which is finished and so visible
    own = merit[:, ::block_size, tile.first_stretch :].diagonal(dim1=1, dim2=2)
    own.zero_()
    position = torch.arange(tile.queries.start, tile.queries.stop, device=merit.device)
    return _ranked(merit, position // block_size, n_best)


def _ranked(merit: Tensor, n_others: Tensor, n_best: int) -> Tensor:
    """Best of the first ``n_others`` (..., T) blocks, the only ones with any merit (..., T, C)."""
    n_ranks = min(n_best, merit.shape[-1])
    best = best_blocks(merit, n_ranks)  # among those without merit, the first come first
    rank = torch.arange(n_ranks, device=merit.device)
    best = best.masked_fill_(rank >= n_others[..., None], -1)
    return F.pad(best, (0, n_best - n_ranks), value=-1)


@torch.no_grad()
def choose_blocks(
    query: Tensor, position: Tensor, block_key: Tensor, block_size: int, n_best: int
) -> Tensor:
    """Name the best blocks for some queries, without attending to them.

    Args:
        query: ``(B, H, T, d)``, multiplied by ``log2(e) / sqrt(d)``.
        position: ``(T,)`` or ``(B, T)`` integer, where the queries stand.
        block_key: ``(B, H, C, d)``.
        block_size: Tokens ``b`` in a block.
        n_best: As in :func:`block_attention`.

    Returns:
        As the chosen blocks of :func:`block_attention`, ``(B, T, m)``.
    """
    B, H, T, _ = query.shape
    C = block_key.shape[2]
    n_best = min(n_best, C)
    if n_best == 0 or T == 0:
        return position.new_empty(B, T, n_best)
    position = position.expand(B, T)
    block = torch.arange(C, device=query.device)
    chosen = []
    for part in tiles(T, B * H * C, query.device):
        at = position[:, part, None]  # (B, T, 1)
        scores = query[:, :, part] @ block_key.transpose(-1, -2)  # (B, H, T, C)
        visible = block < (at + 1) // block_size  # (B, T, C)
        weights = masked_softmax(scores.to(score_dtype(scores.dtype)) * LN_2, visible[:, None])
        merit = weights.sum(1).masked_fill_(block >= at // block_size, 0.0)  # (B, T, C)
        chosen.append(_ranked(merit, position[:, part] // block_size, n_best))
    return torch.cat(chosen, dim=1)


def block_attention(
    query: Tensor,
    block_key: Tensor,
    block_value: Tensor,
    gate: Tensor,
    *,
    n_heads: int,
    block_size: int,
    n_best: int,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the blocks that are finished, and name the best ones.

    Args:
        query: ``(G, L, d)``, multiplied by ``log2(e) / sqrt(d)``.
        block_key: ``(G, C, d)``.
        block_value: ``(G, C, d)``.
        gate: ``(G, L, 1)``, not negative; weight of the result.
        n_heads: ``H``; the heads of a row of the batch follow each other in ``G``.
        block_size: Tokens ``b`` in a block.
        n_best: Blocks to choose for each query besides its own: those with the largest weight
            before dropout, summed over heads, ties to the lower block.
        dropout: Probability of dropping an attention weight.
        generator: Source of the dropout; ``None`` for torch's own.

    Returns:
        ``(G, L, d)``, exactly 0 for a query that sees no block; and the chosen blocks,
        ``(B, L, m)`` int64, best first, -1 where fewer are visible, with ``m`` the smaller of
        ``n_best`` and ``C``.
    """
    attend: Callable[..., tuple[Tensor, Tensor]] = _BlockAttention.apply
    drop = Dropout(dropout, generator)
    return attend(query, block_key, block_value, gate, n_heads, block_size, n_best, drop)
