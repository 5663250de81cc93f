"""Attention of each query to the single tokens of its own block and of a few chosen ones.

A block of queries shares its choice (:func:`query_block_attention`): the keys of the chosen
blocks are gathered once for all of them. Or each query has its own choice
(:func:`query_attention`): a gather for each query would read ``n b`` keys for one, so the pairs
(query, chosen block) are sorted by block instead and cut into *chunks* of one block and up to
``_CHUNK`` of its queries, each a small matrix product.

Shapes: B batch, H heads, G = B H rows, L sequence length, d width of a head, b tokens in a
block, N = ceil(L / b) blocks of a row, n blocks attended to, m = n - 1 chosen ones, Q chunks,
q queries of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
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
    score_dtype,
    scores_of,
    softmax_,
    tile_gradients,
    tiles,
)

_CHUNK = 32  # measured: 64 makes faster products, but fills a quarter of the chunks with nothing


def _blocked(x: Tensor, block_size: int) -> Tensor:
    """Cut (G, L, d) into blocks (G N, b, d), the last block of a row filled up with zeros."""
    missing = -x.shape[1] % block_size
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.reshape(-1, block_size, x.shape[-1])


def _unblocked(x: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`_blocked`, for (G, L, d) or (G, L, 1) with the G and L of ``shape``."""
    return x.view(shape[0], -1, x.shape[-1])[:, : shape[1]]


def _causal(block_size: int, like: Tensor) -> Tensor:
    """Additive mask (b, b) of a block against itself."""
    seen = torch.ones(block_size, block_size, dtype=torch.bool, device=like.device).tril()
    return hidden(seen, like.dtype)


class _QueryBlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        chosen: Tensor,
        block_size: int,
        dropout: Dropout,
    ) -> Tensor:
        G = len(query)
        q, k, v = (_blocked(x, block_size) for x in (query, key, value))
        index = _own_and_chosen(chosen, G)  # (G N, n)
        mask = _causal(block_size, query)
        output = torch.empty_like(q)
        log_sum = mask.new_empty(len(q), block_size, 1)
        for part in tiles(len(q), block_size**2 * index.shape[1], q.device):
            keys, values = _gather(k, index[part]), _gather(v, index[part])  # (g, n b, d)
            scores = scores_of(q[part], keys)  # (g, b, n b)
            _hide_(scores, mask, part.start, len(q) // G)
            weights, total, highest = softmax_(scores)
            log_sum[part] = total.log2().add_(highest)
            keep = dropout.draw(weights)
            if keep is not None:
                weights.mul_(keep)
            output[part] = mix(weights, values).mul_(dropout.scale / total)
        ctx.save_for_backward(query, key, value, output, log_sum, index)
        ctx.dropout = dropout
        return _unblocked(output, query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum, index = ctx.saved_tensors
        dropout = ctx.dropout
        G, _, d = query.shape
        block_size = output.shape[1]
        q, k, v, grad = (_blocked(x, block_size) for x in (query, key, value, grad_output))
        mask = _causal(block_size, query)
        delta = (grad * output).sum(-1, keepdim=True) * LN_2
        grad = grad * (LN_2 * dropout.scale)
        grad_query = torch.empty_like(q)
        grad_key, grad_value = torch.zeros_like(k), torch.zeros_like(v)
        cuts = tiles(len(q), block_size**2 * index.shape[1], q.device)
        for part, keep in zip(cuts, dropout.replay(), strict=False):
            keys, values = _gather(k, index[part]), _gather(v, index[part])
            scores = scores_of(q[part], keys)
            _hide_(scores, mask, part.start, len(q) // G)
            grad_query[part], from_keys, from_values = tile_gradients(
                scores, q[part], keys, values, grad[part], log_sum[part], delta[part], keep
            )
            blocks = index[part].flatten()
            grad_key.index_add_(0, blocks, from_keys.view(-1, block_size, d))
            grad_value.index_add_(0, blocks, from_values.view(-1, block_size, d))
        grads = (grad_query, grad_key, grad_value.div_(LN_2))
        return (*(_unblocked(x, query.shape) for x in grads), None, None, None)


def _own_and_chosen(chosen: Tensor, n_rows: int) -> Tensor:
    """Blocks of each query block, (B, N, m) to (G N, n) among all G N blocks, the own one first."""
    B, N, _ = chosen.shape
    own = torch.arange(N, device=chosen.device)[:, None].expand(B, -1, 1)
    index = torch.cat((own, chosen.clamp(min=0)), dim=-1)  # none: any block, hidden afterwards
    index = index.repeat_interleave(n_rows // B, dim=0)  # (G, N, n)
    offset = torch.arange(n_rows, device=chosen.device)[:, None, None] * N
    return (index + offset).flatten(0, 1)


def _gather(blocks: Tensor, index: Tensor) -> Tensor:
    """Blocks (G N, b, d) at index (g, n), side by side: (g, n b, d)."""
    picked = blocks.flatten(1).index_select(0, index.flatten())
    return picked.view(len(index), -1, blocks.shape[-1])


def _hide_(scores: Tensor, causal: Tensor, first: int, n_blocks: int) -> None:
    """Hide what a query may not see: later tokens of its block, and blocks that are not there.

    Query block ``i`` of a row finds ``i`` others, so only the first ones have fewer than ``m``.
    """
    block_size = len(causal)
    scores[..., :block_size] += causal
    n_chosen = scores.shape[-1] // block_size - 1
    for i in range(min(n_chosen, n_blocks)):
        scores[(i - first) % n_blocks :: n_blocks, :, (1 + i) * block_size :].fill_(-math.inf)


def query_block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    block_size: int,
    dropout: Dropout,
) -> Tensor:
    """Attend to the tokens, up to ``j``, of the own block and of those chosen for the block.

    Args:
        query: ``(G, L, d)``, multiplied by ``log2(e) / sqrt(d)``.
        key: ``(G, L, d)``.
        value: ``(G, L, d)``.
        chosen: ``(B, N, m)`` int64, other blocks for each block of queries: for block ``i`` the
            first ``min(i, m)`` are earlier blocks, the rest is not read.
        block_size: Tokens ``b`` in a block.
        dropout: Falls on the attention weights.

    Returns:
        ``(G, L, d)``.
    """
    attend: Callable[..., Tensor] = _QueryBlockAttention.apply
    return attend(query, key, value, chosen, block_size, dropout)


@dataclass(frozen=True)
class _Chunks:
    """Pairs (query, chosen block), sorted by block and cut into chunks of one block each."""

    block: Tensor  # (Q,) of each chunk, among all G N
    query: Tensor  # (Q q,) of each slot, among all G L; anything where the slot is empty
    is_empty: Tensor  # (Q q,) bool
    slot: Tensor  # (m, G L) of each pair; Q q where the query has no such block

    @classmethod
    def of(cls, chosen: Tensor, n_rows: int, n_blocks: int) -> _Chunks:
        """Plan for a choice (B, L, m); the heads of a row share it, so only B rows are sorted."""
        B, L, m = chosen.shape
        device = chosen.device
        row = torch.arange(B, device=device)[:, None, None]
        block = torch.where(chosen < 0, B * n_blocks, chosen + row * n_blocks).flatten()
        block, pair = block.to(torch.int32).sort(stable=True)  # those without a block come last
        count = torch.bincount(block, minlength=B * n_blocks + 1)[:-1]
        n_pairs = int(count.sum())
        block, pair = block[:n_pairs].long(), pair[:n_pairs]
        n_chunks = -(-count // _CHUNK)
        first_chunk, first_pair = n_chunks.cumsum(0) - n_chunks, count.cumsum(0) - count
        rank = torch.arange(n_pairs, device=device) - first_pair[block]
        target = first_chunk[block] * _CHUNK + rank  # slot of each pair
        n_slots = int(n_chunks.sum()) * _CHUNK
        query = torch.zeros(n_slots, dtype=torch.int64, device=device)
        query[target] = pair // m  # among B L
        is_empty = torch.ones(n_slots, dtype=torch.bool, device=device)
        is_empty[target] = False
        slot = torch.full((B * L * m,), -1, dtype=torch.int64, device=device)
        slot[pair] = target
        of_chunk = torch.arange(B * n_blocks, device=device).repeat_interleave(n_chunks)

        # now for every head: row r of the batch stands at r H + h in G
        H = n_rows // B
        head = torch.arange(H, device=device)[:, None]
        slot = slot.view(B, L, m).permute(2, 0, 1)[:, :, None]  # (m, B, 1, L)
        slot = torch.where(slot < 0, H * n_slots, slot + head * n_slots)  # (m, B, H, L)
        return cls(
            block=(of_chunk + (of_chunk // n_blocks * (H - 1) + head) * n_blocks).flatten(),
            query=(query + (query // L * (H - 1) + head) * L).flatten(),
            is_empty=is_empty.repeat(H),
            slot=slot.flatten(1),
        )


class _QueryAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        chosen: Tensor,
        block_size: int,
        dropout: Dropout,
    ) -> Tensor:
        G, L, d = query.shape
        k, v = _blocked(key, block_size), _blocked(value, block_size)
        rows = query.reshape(-1, d)  # (G L, d)
        chunks = _Chunks.of(chosen, G, len(k) // G)
        n_chunks, n_slots = len(chunks.block), len(chunks.query)
        dtype = score_dtype(query.dtype)
        # sums over one block each, not divided; the row after the last is for pairs without block
        part_output = torch.empty(n_slots + 1, d, dtype=dtype, device=query.device)
        part_total = torch.empty(n_slots + 1, 1, dtype=dtype, device=query.device)
        part_highest = torch.empty_like(part_total)
        part_output[-1], part_total[-1], part_highest[-1] = 0.0, 0.0, -math.inf
        for part in tiles(n_chunks, _CHUNK * block_size, query.device):
            place = slice(part.start * _CHUNK, part.stop * _CHUNK)
            q = rows.index_select(0, chunks.query[place]).view(-1, _CHUNK, d)
            blocks = chunks.block[part, None]
            weights, total, highest = softmax_(scores_of(q, _gather(k, blocks)))
            part_total[place], part_highest[place] = total.view(-1, 1), highest.view(-1, 1)
            keep = dropout.draw(weights)
            if keep is not None:
                weights.mul_(keep)
            part_output[place] = mix(weights, _gather(v, blocks)).view(-1, d)

        own_output = torch.empty(*k.shape, dtype=dtype, device=query.device)  # (G N, b, d)
        own_total = own_output.new_empty(*k.shape[:2], 1)
        own_highest = torch.empty_like(own_total)
        q, mask = _blocked(query, block_size), _causal(block_size, query)
        for part in tiles(len(q), block_size**2, query.device):
            weights, own_total[part], own_highest[part] = softmax_(
                scores_of(q[part], k[part]).add_(mask)
            )
            keep = dropout.draw(weights)
            if keep is not None:
                weights.mul_(keep)
            own_output[part] = mix(weights, v[part])

        # put the sums together, relative to the highest score of all
        output, own_total, own_highest = (
            _unblocked(x, query.shape).reshape(G * L, -1)
            for x in (own_output, own_total, own_highest)
        )
        slots = chunks.slot.flatten()
        shape = (len(chunks.slot), G * L, 1)  # (m, G L, 1)
        part_highest = part_highest.index_select(0, slots).view(shape)
        highest = torch.cat((own_highest[None], part_highest)).amax(0)
        own_share = own_highest.sub(highest).exp2_()
        part_share = part_highest.sub_(highest).exp2_()
        part_total = part_total.index_select(0, slots).view(shape).mul_(part_share).sum(0)
        total = torch.addcmul(part_total, own_share, own_total)
        output = output * own_share
        for slot, share in zip(chunks.slot, part_share, strict=True):
            output.addcmul_(part_output.index_select(0, slot), share)
        output = output.mul_(dropout.scale / total).to(query.dtype).view(G, L, d)
        log_sum = total.log2().add_(highest)  # (G L, 1)
        ctx.save_for_backward(query, key, value, output, log_sum)
        ctx.chunks, ctx.block_size, ctx.dropout = chunks, block_size, dropout
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum = ctx.saved_tensors
        chunks, block_size, dropout = ctx.chunks, ctx.block_size, ctx.dropout
        G, L, d = query.shape
        k, v = _blocked(key, block_size), _blocked(value, block_size)
        delta = (grad_output * output).sum(-1, keepdim=True) * LN_2
        grad = grad_output * (LN_2 * dropout.scale)
        rows, grad_rows = query.reshape(-1, d), grad.reshape(-1, d)  # (G L, d)
        grad_query = torch.zeros_like(rows)
        grad_key, grad_value = torch.zeros_like(k), torch.zeros_like(v)
        delta_of_slot = delta.reshape(-1, 1).index_select(0, chunks.query)
        log_sum_of_slot = log_sum.index_select(0, chunks.query)
        log_sum_of_slot.masked_fill_(chunks.is_empty[:, None], math.inf)  # weight 0
        keeps = dropout.replay()
        for part in tiles(len(chunks.block), _CHUNK * block_size, query.device):
            place = slice(part.start * _CHUNK, part.stop * _CHUNK)
            blocks, sources = chunks.block[part], chunks.query[place]
            q = rows.index_select(0, sources).view(-1, _CHUNK, d)
            keys, values = _gather(k, blocks[:, None]), _gather(v, blocks[:, None])
            from_query, from_key, from_value = tile_gradients(
                scores_of(q, keys),
                q,
                keys,
                values,
                grad_rows.index_select(0, sources).view(-1, _CHUNK, d),
                log_sum_of_slot[place].view(-1, _CHUNK, 1),
                delta_of_slot[place].view(-1, _CHUNK, 1),
                next(keeps),
            )
            grad_query.index_add_(0, sources, from_query.view(-1, d))
            grad_key.index_add_(0, blocks, from_key)
            grad_value.index_add_(0, blocks, from_value)

        grad_query = _blocked(grad_query.view(G, L, d), block_size)
        q, grad, delta, log_sum = (
            _blocked(x, block_size) for x in (query, grad, delta, log_sum.view(G, L, 1))
        )
        mask = _causal(block_size, query)
        for part in tiles(len(q), block_size**2, query.device):
            from_query, from_key, from_value = tile_gradients(
                scores_of(q[part], k[part]).add_(mask),
                q[part],
                k[part],
                v[part],
                grad[part],
                log_sum[part],
                delta[part],
                next(keeps),
            )
            grad_query[part] += from_query
            grad_key[part] += from_key
            grad_value[part] += from_value
        grads = (grad_query, grad_key, grad_value.div_(LN_2))
        return (*(_unblocked(x, query.shape) for x in grads), None, None, None)


def query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    block_size: int,
    dropout: Dropout,
) -> Tensor:
    """Attend to the tokens, up to ``j``, of the own block and of those chosen for each query.

    Args:
        query: ``(G, L, d)``, multiplied by ``log2(e) / sqrt(d)``.
        key: ``(G, L, d)``.
        value: ``(G, L, d)``.
        chosen: ``(B, L, m)`` int64, earlier blocks for each query, all different; -1 for none.
        block_size: Tokens ``b`` in a block.
        dropout: Falls on the attention weights.

    Returns:
        ``(G, L, d)``.
    """
    attend: Callable[..., Tensor] = _QueryAttention.apply
    return attend(query, key, value, chosen, block_size, dropout)
