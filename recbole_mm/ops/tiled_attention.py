"""Windowed and selective attention over masked scores of all earlier keys: the dense form.

Both branches read the same scores ``q k`` and, weighted by their gates, mix the same values, so
they share all matrix products. Tiles of queries meet the keys up to their last one, hence neither
an (L, L) tensor nor the work above the diagonal. Below a few hundred positions this is faster
than leaving keys out.

Shapes: B batch, H heads, G = B H rows, L sequence length, d width of a head, T queries of a
tile, K keys that a branch may see from it, g rows of a tile, m chosen blocks, n branches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_mm.ops.attention_tools import (
    LN_2,
    Branch,
    ChosenBlocks,
    Dropout,
    LatestKeys,
    hidden,
    score_dtype,
    scores_of,
    softmax_,
    tile_scores,
)

_TILE = 64  # queries; measured


@dataclass(frozen=True)
class _Tile:
    """Queries of some rows; their keys are those before ``stop``."""

    rows: slice  # of G
    start: int
    stop: int

    @property
    def here(self) -> tuple[slice, slice]:
        """Index of the queries in (G, L, ...)."""
        return self.rows, slice(self.start, self.stop)


def _tiles(n_rows: int, n_heads: int, size: int, device: torch.device) -> Iterator[_Tile]:
    step = -(-size // -(-size // _TILE))  # tiles of the same size
    for start in range(0, size, step):
        stop = min(size, start + step)
        each = n_heads * max(1, tile_scores(device) // (n_heads * (stop - start) * stop))
        for row in range(0, n_rows, each):
            yield _Tile(slice(row, min(n_rows, row + each)), start, stop)


def _first_key(keys: LatestKeys | ChosenBlocks, tile: _Tile) -> int:
    """No query of the tile sees a key before this one."""
    return max(0, tile.start + 1 - keys.window) if isinstance(keys, LatestKeys) else 0


def _hide_(keys: LatestKeys | ChosenBlocks, scores: Tensor, tile: _Tile, n_heads: int) -> None:
    """Set scores (g, T, K) of the keys from the first one on to -inf where not seen."""
    query = torch.arange(tile.start, tile.stop, device=scores.device)
    if isinstance(keys, LatestKeys):
        first = _first_key(keys, tile)
        if keys.window >= tile.stop:  # nothing to hide but the future
            first = tile.start
        key = torch.arange(first, tile.stop, device=scores.device)
        seen = (key <= query[:, None]) & (key > query[:, None] - keys.window)
        scores[..., first - tile.stop :] += hidden(seen, scores.dtype)
        return
    rows = slice(tile.rows.start // n_heads, tile.rows.stop // n_heads)
    own = query // keys.block_size
    chosen = keys.chosen[rows].index_select(1, own if keys.is_shared else query)  # (B, T, m)
    own = own[:, None].expand(len(chosen), -1, 1)
    blocks = torch.cat((own, torch.where(chosen < 0, own, chosen)), dim=-1)
    n_blocks = -(-tile.stop // keys.block_size)
    opened = torch.zeros(*chosen.shape[:2], n_blocks, dtype=torch.bool, device=scores.device)
    mask = hidden(opened.scatter_(2, blocks, True), scores.dtype)  # (B, T, blocks)
    mask = mask.repeat_interleave(keys.block_size, dim=-1)[..., : tile.stop]
    mask[..., tile.start :] += hidden(query <= query[:, None], scores.dtype)
    scores.view(-1, n_heads, *scores.shape[1:]).add_(mask[:, None])


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor,
        n_heads: int,
        branches: list[tuple[LatestKeys | ChosenBlocks, Dropout]],
    ) -> Tensor:
        G, L, _ = query.shape
        output = torch.empty_like(query)
        log_sum = query.new_empty((len(branches), G, L, 1), dtype=score_dtype(query.dtype))
        for tile in _tiles(G, n_heads, L, query.device):
            first = min(_first_key(branch, tile) for branch, _ in branches)
            keys = tile.rows, slice(first, tile.stop)
            scores = scores_of(query[tile.here], key[keys])  # (g, T, K)
            mixed = torch.zeros_like(scores)  # weights of all branches together
            for number, (branch, dropout) in enumerate(branches):
                skip = _first_key(branch, tile) - first
                own = scores[..., skip:].clone()
                _hide_(branch, own, tile, n_heads)
                weights, total, highest = softmax_(own)
                log_sum[number][tile.here] = total.log2().add_(highest)
                keep = dropout.draw(weights)
                if keep is not None:
                    weights.mul_(keep)
                factor = gate[tile.here][..., number, None] * (dropout.scale / total)
                mixed[..., skip:].addcmul_(weights, factor)
            output[tile.here] = torch.bmm(mixed.to(value.dtype), value[keys])
        ctx.save_for_backward(query, key, value, gate, log_sum)
        ctx.n_heads, ctx.branches = n_heads, branches
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, gate, log_sum = ctx.saved_tensors
        n_heads, branches = ctx.n_heads, ctx.branches
        G, L, _ = query.shape
        grad_query, grad_gate = torch.empty_like(query), torch.empty_like(gate)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        replays = [dropout.replay() for _, dropout in branches]
        for tile in _tiles(G, n_heads, L, query.device):
            first = min(_first_key(branch, tile) for branch, _ in branches)
            keys = tile.rows, slice(first, tile.stop)
            q, k, grad = query[tile.here], key[keys], grad_output[tile.here]
            scores = scores_of(q, k)  # (g, T, K)
            grad_mixed = scores_of(grad, value[keys])
            mixed, grad_scores = torch.zeros_like(scores), torch.zeros_like(scores)
            for number, (branch, dropout) in enumerate(branches):
                skip = _first_key(branch, tile) - first
                own = scores[..., skip:].clone()
                _hide_(branch, own, tile, n_heads)
                weights = own.sub_(log_sum[number][tile.here]).exp2_()
                keep = next(replays[number])
                kept = weights
                if keep is not None:
                    kept = (weights * keep).mul_(dropout.scale)
                part = kept * grad_mixed[..., skip:]
                total = part.sum(-1, keepdim=True)  # product of the branch and the gradient
                grad_gate[tile.here][..., number, None] = total
                factor = gate[tile.here][..., number, None]
                mixed[..., skip:].addcmul_(kept, factor)
                grad_scores[..., skip:].addcmul_(part.addcmul_(weights, total, value=-1), factor)
            grad_scores = grad_scores.mul_(LN_2).to(query.dtype)  # derivative of powers of 2
            mixed = mixed.to(query.dtype)
            grad_query[tile.here] = torch.bmm(grad_scores, k)
            grad_key[keys] += torch.bmm(grad_scores.transpose(1, 2), q)
            grad_value[keys] += torch.bmm(mixed.transpose(1, 2), grad)
        return grad_query, grad_key, grad_value, grad_gate, None, None


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    branches: Sequence[Branch],
    *,
    n_heads: int,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Gated sum of attention to several sets of keys.

    Args:
        query: ``(G, L, d)``, multiplied by ``log2(e) / sqrt(d)``.
        key: ``(G, L, d)``.
        value: ``(G, L, d)``.
        branches: Which keys each branch sees, and its gate.
        n_heads: ``H``; the heads of a row of the batch follow each other in ``G``.
        dropout: Probability of dropping an attention weight.
        generator: Source of the dropout; ``None`` for torch's own.

    Returns:
        ``(G, L, d)``.
    """
    gate = torch.cat([gate for _, gate in branches], dim=-1)
    with_dropout = [(keys, Dropout(dropout, generator)) for keys, _ in branches]
    attend: Callable[..., Tensor] = _TiledAttention.apply
    return attend(query, key, value, gate, n_heads, with_dropout)
