"""Windowed and selective attention to the single tokens of a sequence.

Both branches take their part of the same scores, and their gates are folded into the weights, so
that the gradients of both come from the same products.

Shapes: G = B H rows (batch times heads), L sequence length, d width of a head, g entries of a
tile, T queries of an entry, K keys of an entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_mm.ops.attention_layouts import Band, Prefix, Tile
from recbole_mm.ops.attention_tools import (
    LN_2,
    ChosenBlocks,
    Dropout,
    mix,
    score_dtype,
    scores_of,
    softmax_,
    weigh_,
)
from recbole_mm.ops.pair_attention import Chunks, add_pair_gradients_, sum_over_pairs


class _TokenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window_gate: Tensor | None,
        selected_gate: Tensor | None,
        layout: Band | Prefix,
        chunks: Chunks | None,
        dropouts: tuple[Dropout, Dropout, Dropout],
    ) -> Tensor:
        on_window, on_selected, on_pairs = dropouts
        q, k, v = layout.split(query), layout.split(key), layout.split(value)
        all_keys, all_values = layout.bands(k), layout.bands(v)
        windowed, selected = torch.empty_like(q), torch.empty_like(q)
        log_sums = q.new_empty((2, *q.shape[:2], 1), dtype=score_dtype(q.dtype))
        if chunks is not None:
            sums = sum_over_pairs(q.flatten(0, 1), k, v, chunks, on_pairs)
            pair_sum, pair_total, pair_highest = (x.view(*q.shape[:2], -1) for x in sums)
        for tile in layout.tiles():
            at = tile.queries
            values = layout.keys(all_values, tile)  # (g, K, d)
            scores = scores_of(q[at], layout.keys(all_keys, tile))  # (g, T, K)
            if window_gate is not None:
                weights, total, highest = softmax_(layout.in_window(scores, tile))
                log_sums[0][at] = total.log2().add_(highest)
                keep = on_window.draw(weights)
                if keep is not None:
                    weights.mul_(keep)
                mixed = mix(weights, values[:, tile.window_columns])
                windowed[at] = mixed.mul_(on_window.scale / total)
            if selected_gate is not None:
                weights, total, highest = softmax_(layout.in_selection_(scores, tile))
                keep = on_selected.draw(weights)
                if keep is not None:
                    weights.mul_(keep)
                mixed = mix(weights, values[:, tile.selected_columns])
                if chunks is not None:
                    both = torch.maximum(highest, pair_highest[at])
                    share = highest.sub_(both).exp2_()
                    pair_share = (pair_highest[at] - both).exp2_()
                    total = total.mul_(share).addcmul_(pair_total[at], pair_share)
                    mixed = mixed.mul_(share).addcmul_(pair_sum[at], pair_share)
                    highest = both
                log_sums[1][at] = total.log2().add_(highest)
                selected[at] = mixed.mul_(on_selected.scale / total)
        parts = [
            (gate, layout.join(mixed))
            for gate, mixed in ((window_gate, windowed), (selected_gate, selected))
            if gate is not None
        ]
        output = parts[0][0] * parts[0][1]
        for gate, mixed in parts[1:]:
            output.addcmul_(gate, mixed)
        ctx.save_for_backward(
            query, key, value, window_gate, selected_gate, windowed, selected, log_sums
        )
        ctx.layout, ctx.chunks, ctx.dropouts = layout, chunks, dropouts
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, window_gate, selected_gate, *saved = ctx.saved_tensors
        windowed, selected, log_sums = saved
        layout, chunks, (on_window, on_selected, on_pairs) = ctx.layout, ctx.chunks, ctx.dropouts
        q, k, v, grad = (layout.split(x) for x in (query, key, value, grad_output))
        window = _Gradients.of(layout, window_gate, windowed, grad, log_sums[0])
        selection = _Gradients.of(layout, selected_gate, selected, grad, log_sums[1])
        grad = grad * (LN_2 * on_window.scale)
        all_keys, all_values = layout.bands(k), layout.bands(v)
        grad_query = torch.empty_like(q)
        grad_key, grad_value = torch.zeros_like(k), torch.zeros_like(v)
        keeps = zip(on_window.replay(), on_selected.replay(), strict=False)
        for tile, (window_keep, selected_keep) in zip(layout.tiles(), keeps, strict=False):
            at = tile.queries
            keys = layout.keys(all_keys, tile)
            weights = scores_of(q[at], keys)  # (g, T, K), scores so far
            grads = scores_of(grad[at], layout.keys(all_values, tile))  # of the weights so far
            if window is not None:
                in_window = layout.in_window(weights, tile)
                grads_in_window = grads[..., tile.window_columns]
                if selection is not None:
                    grads_in_window = grads_in_window.clone()
                window.weigh_(in_window, grads_in_window, tile, window_keep)
            if selection is not None:
                in_selection = layout.in_selection_(weights, tile)
                grads_in_selection = grads[..., tile.selected_columns]
                selection.weigh_(in_selection, grads_in_selection, tile, selected_keep)
                if window is not None:
                    _add_window_(weights, in_window, tile)
                    _add_window_(grads, grads_in_window, tile)
            else:
                weights, grads = in_window, grads_in_window
            weights, grads = weights.to(q.dtype), grads.to(q.dtype)
            grad_query[at] = torch.bmm(grads, keys)
            layout.add_to_keys_(grad_key, tile, torch.bmm(grads.transpose(1, 2), q[at]))
            layout.add_to_keys_(grad_value, tile, torch.bmm(weights.transpose(1, 2), grad[at]))
        if chunks is not None and selection is not None:
            add_pair_gradients_(
                (grad_query.view(-1, q.shape[-1]), grad_key, grad_value),
                q.flatten(0, 1),
                k,
                v,
                grad.flatten(0, 1),
                selection.log_sum.flatten(0, 1),
                selection.delta.flatten(0, 1),
                chunks,
                on_pairs,
            )
        grads_of_vectors = (grad_query, grad_key, grad_value.div_(LN_2))
        return (
            *(layout.join(x) for x in grads_of_vectors),
            None if window is None else layout.join(window.grad_gate),
            None if selection is None else layout.join(selection.grad_gate),
            None,
            None,
            None,
        )


def _add_window_(whole: Tensor, in_window: Tensor, tile: Tile) -> None:
    """Put the columns of the window to those of selection, which already stand in ``whole``."""
    first, last = tile.window_columns.start, tile.window_columns.stop
    alone = max(0, tile.selected_columns.start - first)  # columns that only the window sees
    whole[..., first : first + alone] = in_window[..., :alone]
    whole[..., first + alone : last] += in_window[..., alone:]


@dataclass(frozen=True)
class _Gradients:
    """What the backward pass of one branch needs, each shaped like a split query with d = 1."""

    grad_gate: Tensor
    delta: Tensor  # as in tile_gradients
    log_sum: Tensor  # likewise; less the log2 of the gate, so that weights come out times it

    @classmethod
    def of(
        cls,
        layout: Band | Prefix,
        gate: Tensor | None,
        mixed: Tensor,
        grad: Tensor,
        log_sum: Tensor,
    ) -> _Gradients | None:
        """From a branch's gate and its output before the gate; ``None`` if it is not in use."""
        if gate is None:
            return None
        grad_gate = (grad * mixed).sum(-1, keepdim=True, dtype=log_sum.dtype)
        log_gate = layout.split(gate).to(log_sum.dtype).log2()
        return cls(grad_gate, grad_gate * LN_2, log_sum - log_gate)

    def weigh_(self, scores: Tensor, grads: Tensor, tile: Tile, keep: Tensor | None) -> None:
        """Turn scores into weights, and gradients of the weights into those of the scores."""
        weigh_(scores, grads, self.log_sum[tile.queries], self.delta[tile.queries], keep)


def token_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: tuple[int, Tensor] | None,
    selection: tuple[ChosenBlocks, Tensor] | None,
    n_heads: int,
    is_dense: bool,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Gated sum of windowed and selective attention, or one of them.

    Args:
        query: ``(G, L, d)``, multiplied by ``log2(e) / sqrt(d)``.
        key: ``(G, L, d)``.
        value: ``(G, L, d)``.
        window: Keys in the window, the query's own included, and gate ``(G, L, 1)``, not negative.
        selection: Chosen blocks, and gate.
        n_heads: ``H``; the heads of a row of the batch follow each other in ``G``.
        is_dense: Whether to go through all earlier keys, under masks.
        dropout: Probability of dropping an attention weight.
        generator: Source of the dropout; ``None`` for torch's own.

    Returns:
        ``(G, L, d)``.
    """
    size, window_gate = window or (None, None)
    blocks, selected_gate = selection or (None, None)
    layout: Band | Prefix
    chunks = None
    if is_dense:
        layout = Prefix(query, n_heads, size, blocks)
    elif size is not None and blocks is not None and not _fits(size, blocks.block_size):
        attend = partial(
            token_attention,
            query,
            key,
            value,
            n_heads=n_heads,
            is_dense=False,
            dropout=dropout,
            generator=generator,
        )
        return attend(window=window, selection=None) + attend(window=None, selection=selection)
    else:
        block_size = _tile_of(size or 1) if blocks is None else blocks.block_size
        layout = Band(query, block_size, size, blocks)
        if blocks is not None and not blocks.is_shared and blocks.chosen.shape[-1] > 0:
            missing = -query.shape[1] % block_size
            chosen = F.pad(blocks.chosen, (0, 0, 0, missing), value=-1)
            chunks = Chunks.of(chosen, len(query), layout.n_blocks)
    dropouts = tuple(Dropout(dropout, generator) for _ in range(3))
    function: Callable[..., Tensor] = _TokenAttention.apply
    return function(query, key, value, window_gate, selected_gate, layout, chunks, dropouts)


def _tile_of(window: int) -> int:
    """Block size for a window on its own: about half of it, a power of 2."""
    return min(64, max(16, 1 << (max(1, window // 2) - 1).bit_length()))


def _fits(window: int, block_size: int) -> bool:
    """Whether a window costs less in the blocks of selection than in its own."""
    tile = _tile_of(window)
    together = -(-(window - 1) // block_size) * block_size  # keys beyond the own block
    apart = (-(-(window - 1) // tile) + 1) * tile
    return block_size >= 16 and together <= apart
