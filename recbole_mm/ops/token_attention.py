"""Windowed and selective attention, with no work for keys that neither sees: the sparse form.

A block of queries meets a *band* of key blocks side by side: those that its window reaches, its
own, and those chosen for it. Both branches take their part of the same scores, and their gates
are folded into the weights, so that the gradients of both come from the same products. Where each
query has chosen for itself, the chosen blocks are left to :mod:`.pair_attention`.

Shapes: B batch, H heads, G = B H rows, L sequence length, d width of a head, b tokens in a
block, N = ceil(L / b) blocks of a row, p blocks before the own one that a window reaches, m chosen
blocks, n = p + 1 + m blocks of a band, g blocks of queries in a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_mm.ops.attention_tools import (
    LN_2,
    Branch,
    ChosenBlocks,
    Dropout,
    LatestKeys,
    gather_blocks,
    hidden,
    mix,
    score_dtype,
    scores_of,
    softmax_,
    tiles,
    weigh_,
)
from recbole_mm.ops.pair_attention import Chunks, add_pair_gradients_, sum_over_pairs


class _Band:
    """Key blocks of each block of queries, and the masks on them."""

    def __init__(
        self,
        query: Tensor,
        block_size: int,
        window: int | None,
        selection: ChosenBlocks | None,
    ) -> None:
        self.shape = query.shape  # (G, L, d)
        self.block_size = b = block_size
        self.n_blocks = -(-query.shape[1] // b)  # N
        self.n_before = 0 if window is None else -(-(window - 1) // b)  # p
        chosen = None if selection is None or not selection.is_shared else selection.chosen
        self.n_chosen = 0 if chosen is None else chosen.shape[-1]  # m
        self.window_keys = slice(0, (self.n_before + 1) * b)
        self.selected_keys = slice(self.n_before * b, None)
        self.n_scores = b * b * (self.n_before + 1 + self.n_chosen)
        device = query.device

        place = torch.arange(self.n_blocks, device=device)[:, None]
        reach = torch.arange(-self.n_before, 1, device=device)
        index = (place + reach).clamp_(min=0).expand(len(query), -1, -1)  # (G, N, p + 1)
        if chosen is not None:
            every_head = chosen.clamp(min=0).repeat_interleave(len(query) // len(chosen), dim=0)
            index = torch.cat((index, every_head), dim=-1)  # (G, N, n)
        first = torch.arange(len(query), device=device)[:, None, None] * self.n_blocks
        self.index = (index + first).flatten(0, 1)  # (G N, n), among all G N

        token = torch.arange(b, device=device)[:, None]
        self.causal = hidden(token >= token.T, query.dtype)  # (b, b)
        if window is not None:
            key = torch.arange(-self.n_before * b, b, device=device)
            self.latest = hidden((key <= token) & (key > token - window), query.dtype)

    def blocked(self, x: Tensor) -> Tensor:
        """Cut (G, L, ...) into blocks (G N, b, ...), the last of a row filled up with zeros."""
        missing = -self.shape[1] % self.block_size
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        return x.reshape(-1, self.block_size, x.shape[-1])

    def unblocked(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`blocked`."""
        return x.view(self.shape[0], -1, x.shape[-1])[:, : self.shape[1]]

    def in_window(self, scores: Tensor, first: int) -> Tensor:
        """Scores (g, b, (p + 1) b) of the window, -inf where not seen; a copy."""
        scores = scores[..., self.window_keys] + self.latest
        # the first blocks of a row have fewer before them
        for i in range(min(self.n_before, self.n_blocks)):
            missing = (self.n_before - i) * self.block_size
            self._of_row(scores, i, first)[..., :missing].fill_(-math.inf)
        return scores

    def in_selection_(self, scores: Tensor, first: int) -> Tensor:
        """Scores (g, b, (1 + m) b) of own and chosen blocks, -inf where not seen; in place."""
        scores = scores[..., self.selected_keys]
        scores[..., : self.block_size] += self.causal
        # block i of a row finds i others
        for i in range(min(self.n_chosen, self.n_blocks)):
            found = (1 + i) * self.block_size
            self._of_row(scores, i, first)[..., found:].fill_(-math.inf)
        return scores

    def add_window_(self, whole: Tensor, in_window: Tensor) -> None:
        """Put a tile (g, b, (p + 1) b) of the window to one (g, b, n b) with selection in it."""
        before = self.n_before * self.block_size
        whole[..., :before] = in_window[..., :before]
        whole[..., before : before + self.block_size] += in_window[..., before:]

    def _of_row(self, tile: Tensor, i: int, first: int) -> Tensor:
        """Block ``i`` of every row in a tile that begins at block ``first`` of all."""
        return tile[(i - first) % self.n_blocks :: self.n_blocks]


class _TokenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window_gate: Tensor | None,
        selected_gate: Tensor | None,
        band: _Band,
        chunks: Chunks | None,
        dropouts: tuple[Dropout, Dropout, Dropout],
    ) -> Tensor:
        on_window, on_selected, on_pairs = dropouts
        q, k, v = band.blocked(query), band.blocked(key), band.blocked(value)
        windowed, selected = torch.empty_like(q), torch.empty_like(q)
        log_sums = q.new_empty((2, *q.shape[:2], 1), dtype=score_dtype(q.dtype))
        if chunks is not None:
            sums = sum_over_pairs(q.flatten(0, 1), k, v, chunks, on_pairs)
            pair_sum, pair_total, pair_highest = (x.view(*q.shape[:2], -1) for x in sums)
        for part in tiles(len(q), band.n_scores, q.device):
            keys, values = (gather_blocks(x, band.index[part]) for x in (k, v))  # (g, n b, d)
            scores = scores_of(q[part], keys)  # (g, b, n b)
            if window_gate is not None:
                weights, total, highest = softmax_(band.in_window(scores, part.start))
                log_sums[0, part] = total.log2().add_(highest)
                keep = on_window.draw(weights)
                if keep is not None:
                    weights.mul_(keep)
                mixed = mix(weights, values[:, band.window_keys])
                windowed[part] = mixed.mul_(on_window.scale / total)
            if selected_gate is not None:
                weights, total, highest = softmax_(band.in_selection_(scores, part.start))
                keep = on_selected.draw(weights)
                if keep is not None:
                    weights.mul_(keep)
                mixed = mix(weights, values[:, band.selected_keys])
                if chunks is not None:
                    both = torch.maximum(highest, pair_highest[part])
                    share = highest.sub_(both).exp2_()
                    pair_share = (pair_highest[part] - both).exp2_()
                    total = total.mul_(share).addcmul_(pair_total[part], pair_share)
                    mixed = mixed.mul_(share).addcmul_(pair_sum[part], pair_share)
                    highest = both
                log_sums[1, part] = total.log2().add_(highest)
                selected[part] = mixed.mul_(on_selected.scale / total)
        parts = [
            (gate, band.unblocked(mixed))
            for gate, mixed in ((window_gate, windowed), (selected_gate, selected))
            if gate is not None
        ]
        output = parts[0][0] * parts[0][1]
        for gate, mixed in parts[1:]:
            output.addcmul_(gate, mixed)
        ctx.save_for_backward(
            query, key, value, window_gate, selected_gate, windowed, selected, log_sums
        )
        ctx.band, ctx.chunks, ctx.dropouts = band, chunks, dropouts
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, window_gate, selected_gate, *saved = ctx.saved_tensors
        windowed, selected, log_sums = saved
        band, chunks, (on_window, on_selected, on_pairs) = ctx.band, ctx.chunks, ctx.dropouts
        q, k, v, grad = (band.blocked(x) for x in (query, key, value, grad_output))
        window = _Branch.of(band, window_gate, windowed, grad, log_sums[0])
        selection = _Branch.of(band, selected_gate, selected, grad, log_sums[1])
        grad = grad * (LN_2 * on_window.scale)
        grad_query = torch.empty_like(q)
        grad_key, grad_value = torch.zeros_like(k), torch.zeros_like(v)
        cuts = tiles(len(q), band.n_scores, q.device)
        keeps = zip(on_window.replay(), on_selected.replay(), strict=False)
        for part, (window_keep, selected_keep) in zip(cuts, keeps, strict=False):
            keys, values = (gather_blocks(x, band.index[part]) for x in (k, v))
            weights = scores_of(q[part], keys)  # (g, b, n b), scores so far
            grads = scores_of(grad[part], values)  # of the weights so far
            if window is not None:
                in_window = band.in_window(weights, part.start)
                grads_in_window = grads[..., band.window_keys].clone()
                window.weigh_(in_window, grads_in_window, part, window_keep)
            if selection is not None:
                in_selection = band.in_selection_(weights, part.start)
                grads_in_selection = grads[..., band.selected_keys]
                selection.weigh_(in_selection, grads_in_selection, part, selected_keep)
                if window is not None:
                    band.add_window_(weights, in_window)
                    band.add_window_(grads, grads_in_window)
            else:
                weights, grads = in_window, grads_in_window
            weights, grads = weights.to(q.dtype), grads.to(q.dtype)
            grad_query[part] = torch.bmm(grads, keys)
            index = band.index[part].flatten()
            from_keys = torch.bmm(grads.transpose(1, 2), q[part])  # (g, n b, d)
            grad_key.index_add_(0, index, from_keys.view(-1, *k.shape[1:]))
            from_values = torch.bmm(weights.transpose(1, 2), grad[part])
            grad_value.index_add_(0, index, from_values.view(-1, *v.shape[1:]))
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
            *(band.unblocked(x) for x in grads_of_vectors),
            None if window is None else band.unblocked(window.grad_gate),
            None if selection is None else band.unblocked(selection.grad_gate),
            None,
            None,
            None,
        )


@dataclass(frozen=True)
class _Branch:
    """What the backward pass of one branch needs, all (G N, b, 1)."""

    grad_gate: Tensor
    delta: Tensor  # as in tile_gradients
    log_sum: Tensor  # likewise; less the log2 of the gate, so that weights come out times it

    @classmethod
    def of(
        cls, band: _Band, gate: Tensor | None, mixed: Tensor, grad: Tensor, log_sum: Tensor
    ) -> _Branch | None:
        """From the branch's gate and output before it, or ``None`` if it is not in use."""
        if gate is None:
            return None
        grad_gate = (grad * mixed).sum(-1, keepdim=True, dtype=log_sum.dtype)
        log_gate = band.blocked(gate).to(log_sum.dtype).log2()
        return cls(grad_gate, grad_gate * LN_2, log_sum - log_gate)

    def weigh_(self, scores: Tensor, grads: Tensor, part: slice, keep: Tensor | None) -> None:
        """Turn scores into weights, and gradients of the weights into those of the scores."""
        weigh_(scores, grads, self.log_sum[part], self.delta[part], keep)


def token_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    branches: Sequence[Branch],
    *,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Gated sum of windowed and selective attention, or one of them.

    Args:
        query: ``(G, L, d)``, multiplied by ``log2(e) / sqrt(d)``.
        key: ``(G, L, d)``.
        value: ``(G, L, d)``.
        branches: A window, a selection, or one of each; with their gates.
        dropout: Probability of dropping an attention weight.
        generator: Source of the dropout; ``None`` for torch's own.

    Returns:
        ``(G, L, d)``.
    """
    window: tuple[int, Tensor] | None = None
    selection: tuple[ChosenBlocks, Tensor] | None = None
    for keys, gate in branches:
        if isinstance(keys, LatestKeys):
            window = keys.window, gate
        else:
            selection = keys, gate
    vectors = (query, key, value)
    drops = partial(Dropout, dropout, generator)
    outputs = []
    if window is not None and (selection is None or not _fits(window[0], selection[0].block_size)):
        outputs.append(_attend(vectors, _tile_of(window[0]), window, None, drops))
        window = None
    if selection is not None:
        outputs.append(_attend(vectors, selection[0].block_size, window, selection, drops))
    return reduce(torch.add, outputs)


def _attend(
    vectors: tuple[Tensor, Tensor, Tensor],
    block_size: int,
    window: tuple[int, Tensor] | None,
    selection: tuple[ChosenBlocks, Tensor] | None,
    drops: Callable[[], Dropout],
) -> Tensor:
    query = vectors[0]
    size, window_gate = window or (None, None)
    blocks, selected_gate = selection or (None, None)
    band = _Band(query, block_size, size, blocks)
    chunks = None
    if blocks is not None and not blocks.is_shared and blocks.chosen.shape[-1] > 0:
        missing = -query.shape[1] % block_size
        chosen = F.pad(blocks.chosen, (0, 0, 0, missing), value=-1)
        chunks = Chunks.of(chosen, len(query), band.n_blocks)
    function: Callable[..., Tensor] = _TokenAttention.apply
    dropouts = (drops(), drops(), drops())
    return function(*vectors, window_gate, selected_gate, band, chunks, dropouts)


def _tile_of(window: int) -> int:
    """Block size for a window on its own: about half of it, a power of 2."""
    return min(64, max(16, 1 << (max(1, window // 2) - 1).bit_length()))


def _fits(window: int, block_size: int) -> bool:
    """Whether a window costs less in the blocks of selection than in its own."""
    tile = _tile_of(window)
    together = -(-(window - 1) // block_size) * block_size  # keys beyond the own block
    apart = (-(-(window - 1) // tile) + 1) * tile
    return block_size >= 16 and together <= apart
