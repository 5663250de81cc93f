"""Attention of single queries to blocks of keys of their own choice.

A gather for each query would read all tokens of its blocks for that one query. Instead the pairs
(query, block) are sorted by block and cut into *chunks* of one block and up to ``_CHUNK`` of its
queries, each a small matrix product. A softmax over several blocks is put together from sums over
one block each.

Shapes: B batch, H heads, G = B H rows, L sequence length, d width of a head, b tokens in a
block, N blocks of a row, m blocks of a query, Q chunks, q queries of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_mm.ops.attention_tools import (
    Dropout,
    gather_blocks,
    mix,
    score_dtype,
    scores_of,
    softmax_,
    tile_gradients,
    tiles,
)

_CHUNK = 32  # measured: 64 makes faster products, but leaves a quarter of the slots empty


@dataclass(frozen=True)
class Chunks:
    """Pairs (query, block), sorted by block and cut into chunks of one block each."""

    block: Tensor  # (Q,) of each chunk, among all G N
    query: Tensor  # (Q q,) of each slot, among all G L; anything where the slot is empty
    is_empty: Tensor  # (Q q,) bool
    slot: Tensor  # (m, G L) of each pair; Q q where the query has no such block

    @classmethod
    # sizes hang on the data, and torch 2.13 gets strides of `where` wrong in it
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def of(cls, chosen: Tensor, n_rows: int, n_blocks: int) -> Chunks:
        """Plan for blocks (B, L, m), -1 for none; the heads of a row share them."""
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

    def parts(self, block_size: int) -> list[tuple[slice, slice]]:
        """Tiles: their chunks, and the slots of these."""
        cuts = tiles(len(self.block), _CHUNK * block_size, self.block.device)
        return [(cut, slice(cut.start * _CHUNK, cut.stop * _CHUNK)) for cut in cuts]


def sum_over_pairs(
    query: Tensor, key: Tensor, value: Tensor, chunks: Chunks, dropout: Dropout
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of the values of all tokens of a query's blocks, not yet divided.

    Args:
        query: ``(G L, d)``, multiplied by ``log2(e) / sqrt(d)``.
        key: ``(G N, b, d)``.
        value: ``(G N, b, d)``.
        chunks: Which queries see which blocks.
        dropout: Falls on the weights.

    Returns:
        Sum ``(G L, d)``, sum of the weights ``(G L, 1)`` and highest score ``(G L, 1)``, relative
        to which both are; 0, 0 and the lowest number for a query without a block.
    """
    d, dtype = query.shape[-1], score_dtype(query.dtype)
    lowest = torch.finfo(dtype).min  # not -inf: -inf - -inf is NaN
    n_slots = len(chunks.query)
    mixed = torch.empty(n_slots + 1, d, dtype=dtype, device=query.device)
    total, highest = mixed.new_empty(n_slots + 1, 1), mixed.new_empty(n_slots + 1, 1)
    mixed[-1], total[-1], highest[-1] = 0.0, 0.0, lowest  # for pairs without a block
    for part, slots in chunks.parts(key.shape[1]):
        q = query.index_select(0, chunks.query[slots]).view(-1, _CHUNK, d)
        block = chunks.block[part, None]
        weights, its_total, its_highest = softmax_(scores_of(q, gather_blocks(key, block)))
        total[slots], highest[slots] = its_total.view(-1, 1), its_highest.view(-1, 1)
        keep = dropout.draw(weights)
        if keep is not None:
            weights.mul_(keep)
        mixed[slots] = mix(weights, gather_blocks(value, block)).view(-1, d)

    slot = chunks.slot.flatten()
    its_highest = highest.index_select(0, slot).view(len(chunks.slot), -1, 1)  # (m, G L, 1)
    highest = its_highest.amax(0)
    share = its_highest.sub_(highest).exp2_()
    total = total.index_select(0, slot).view_as(share).mul_(share).sum(0)
    summed = torch.zeros(len(query), d, dtype=dtype, device=query.device)
    for its_slot, its_share in zip(chunks.slot, share, strict=True):
        summed.addcmul_(mixed.index_select(0, its_slot), its_share)
    return summed, total, highest


def add_pair_gradients_(
    grads: tuple[Tensor, Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    log_sum: Tensor,
    delta: Tensor,
    chunks: Chunks,
    dropout: Dropout,
) -> None:
    """Add what the pairs give to the gradients of query, key and value.

    Args:
        grads: The three gradients, shaped like query, key and value.
        query: ``(G L, d)``.
        key: ``(G N, b, d)``.
        value: ``(G N, b, d)``.
        grad: ``(G L, d)``, as :func:`.tile_gradients` wants it.
        log_sum: ``(G L, 1)``, likewise.
        delta: ``(G L, 1)``, likewise.
        chunks: Which queries see which blocks.
        dropout: The one of the forward pass.
    """
    grad_query, grad_key, grad_value = grads
    d = query.shape[-1]
    delta = delta.index_select(0, chunks.query).view(-1, _CHUNK, 1)
    log_sum = log_sum.index_select(0, chunks.query)
    log_sum = log_sum.masked_fill_(chunks.is_empty[:, None], math.inf).view(-1, _CHUNK, 1)
    for (part, slots), keep in zip(chunks.parts(key.shape[1]), dropout.replay(), strict=False):
        block, source = chunks.block[part], chunks.query[slots]
        q = query.index_select(0, source).view(-1, _CHUNK, d)
        keys = gather_blocks(key, block[:, None])
        from_query, from_key, from_value = tile_gradients(
            scores_of(q, keys),
            q,
            keys,
            gather_blocks(value, block[:, None]),
            grad.index_select(0, source).view(-1, _CHUNK, d),
            log_sum[part],
            delta[part],
            keep,
        )
        grad_query.index_add_(0, source, from_query.view(-1, d))
        grad_key.index_add_(0, block, from_key)
        grad_value.index_add_(0, block, from_value)
