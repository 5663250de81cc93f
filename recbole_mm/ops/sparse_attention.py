r"""Causal attention in three branches: windowed, block-level and selective.

For query ``j`` of a head, with ``b`` tokens in a block (block ``c`` holds the tokens ``c b`` to
``(c + 1) b - 1``), scores scaled by ``1 / sqrt(d)``:

- *window*: softmax attention over the keys ``j - w + 1 .. j``;
- *block-level*: softmax attention over one key and one value for each **visible** block. A block
  is visible once it is finished, ``(c + 1) b - 1 <= j``, so that no future token leaks. A query
  with no visible block gets exactly 0;
- *selective*: softmax attention over the single tokens, up to ``j``, of ``n`` blocks: the query's
  own one, always, and the ``n - 1`` other visible blocks with the largest block-level
  probability, summed over all heads of the layer (one group), ties to the lower block.

The output is the sum of the branches, each weighted by its gate.

The choice of blocks is discrete and passes no gradient. The block-level branch, which shares
its queries and block keys with the choice, is what trains the scores.

Source: the three branches [paper: MUFASA, arXiv 2508.09664, abstract]; their form follows Native
Sparse Attention (arXiv 2502.11089) [ours].

Shapes: B batch, H heads, L sequence length, d width of a head, C = L // b finished blocks, n
selected blocks, G branches in use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recbole_mm.ops.masking import causal_mask, masked_softmax, padding_mask, window_mask

SELECTIONS = ("query", "query_block")


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    length: Tensor,
    *,
    block_size: int,
    window_size: int | None = None,
    block_key: Tensor | None = None,
    block_value: Tensor | None = None,
    n_selected_blocks: int | None = None,
    selection: str = "query",
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Gated sum of windowed, block-level and selective causal attention.

    A branch is used when its argument is given: the window with ``window_size``, the block level
    with ``block_value``, selection with ``n_selected_blocks``.

    Args:
        query: ``(B, H, L, d)``.
        key: ``(B, H, L, d)``.
        value: ``(B, H, L, d)``.
        gate: ``(B, H, L, G)``, weight of each branch in use, in the order window, block level,
            selection.
        length: ``(B,)`` integer, real positions of each row; padding is on the right.
        block_size: Tokens ``b`` in a block.
        window_size: Keys ``w`` in the window, the query's own included.
        block_key: ``(B, H, C, d)``, key of each finished block; needed by the block level, and
            by selection of more than the query's own block.
        block_value: ``(B, H, C, d)``, value of each finished block.
        n_selected_blocks: Blocks ``n`` that a query attends to token by token, its own included.
        selection: ``query``: each query has its own blocks. ``query_block``: the first query of
            a block selects for all of that block, which stays causal.
        dropout: Probability of dropping an attention weight, in each branch on its own.
        generator: Source of the dropout; ``None`` for torch's own.

    Returns:
        ``(B, H, L, d)``, zero at padding.

    Raises:
        ValueError: If no branch is in use, an option is out of range or shapes do not fit.
    """
    _check(key, value, length, block_size, window_size, block_key, block_value)
    _check_options(n_selected_blocks, selection, dropout, block_key)
    _check_gate(query, gate, window_size, block_value, n_selected_blocks)
    real = padding_mask(length, query.shape[2])[:, None, :, None]  # (B, 1, L, 1)
    query, key, value, gate = (x.masked_fill(~real, 0.0) for x in (query, key, value, gate))
    block_key, block_value = _finished(length, block_size, block_key, block_value)
    selected = None
    if n_selected_blocks is not None:
        selected = select_blocks(
            query,
            block_key,
            block_size=block_size,
            n_selected_blocks=n_selected_blocks,
            selection=selection,
        )
    return _dense(
        query,
        key,
        value,
        gate,
        block_size,
        window_size,
        block_key,
        block_value,
        selected,
        dropout,
        generator,
    )


@torch.no_grad()
def select_blocks(
    query: Tensor,
    block_key: Tensor | None,
    *,
    block_size: int,
    n_selected_blocks: int,
    selection: str = "query",
) -> Tensor:
    """Other blocks that each query, or block of queries, attends to token by token.

    Args:
        query: ``(B, H, L, d)``.
        block_key: ``(B, H, C, d)``, key of each finished block; ``None`` if ``n`` is 1.
        block_size: Tokens ``b`` in a block.
        n_selected_blocks: Blocks ``n`` to attend to, the own one included.
        selection: ``query`` or ``query_block``.

    Returns:
        ``(B, Q, m)`` int64, best block first, -1 where fewer are visible. ``Q`` is ``L``, or the
        number ``ceil(L / b)`` of query blocks; ``m`` is the smaller of ``n - 1`` and ``C``.
    """
    B, _, L, _ = query.shape
    step = 1 if selection == "query" else block_size
    position = torch.arange(0, L, step, device=query.device)  # of the queries that choose, (Q,)
    if block_key is None:
        return position.new_empty(B, len(position), 0)
    return _best_blocks(query[:, :, ::step], block_key, position, block_size, n_selected_blocks)


def sparse_attention_last(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    length: Tensor,
    *,
    block_size: int,
    window_size: int | None = None,
    block_key: Tensor | None = None,
    block_value: Tensor | None = None,
    n_selected_blocks: int | None = None,
    block_query: Tensor | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Row ``length - 1`` of :func:`sparse_attention`, in time and memory linear in ``L``.

    Args:
        query: ``(B, H, d)``, query of the last real position.
        key: ``(B, H, L, d)``.
        value: ``(B, H, L, d)``.
        gate: ``(B, H, G)``, gates of the last real position.
        length: ``(B,)`` integer, real positions of each row.
        block_size: Tokens ``b`` in a block.
        window_size: Keys ``w`` in the window.
        block_key: ``(B, H, C, d)``.
        block_value: ``(B, H, C, d)``.
        n_selected_blocks: Blocks attended to token by token.
        block_query: ``(B, H, d)``, query of the first position of the last block: it chooses the
            blocks. To be given for selection ``query_block``, and only then.
        dropout: Probability of dropping an attention weight.
        generator: Source of the dropout; ``None`` for torch's own.

    Returns:
        ``(B, H, d)``, zero for a row of length 0.

    Raises:
        ValueError: If no branch is in use, an option is out of range or shapes do not fit.
    """
    _check(key, value, length, block_size, window_size, block_key, block_value)
    _check_options(n_selected_blocks, "query", dropout, block_key)
    query, gate = query.unsqueeze(2), gate.unsqueeze(2)  # (B, H, 1, d) and (B, H, 1, G)
    _check_gate(query, gate, window_size, block_value, n_selected_blocks)
    H, L, d = key.shape[1:]
    last = length - 1  # (B,)
    gates = iter(gate.unsqueeze(-1).unbind(-2))  # each (B, H, 1, 1)
    output = torch.zeros_like(query)

    def attend(keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        seen = seen[:, None, None]  # (B, 1, 1, K)
        keys, values = (x.masked_fill(~seen.transpose(-1, -2), 0.0) for x in (keys, values))
        weights = masked_softmax(query @ keys.transpose(-1, -2) * d**-0.5, seen)
        return _dropout(weights, dropout, generator) @ values  # (B, H, 1, d)

    def attend_at(index: Tensor, seen: Tensor) -> Tensor:
        at = index.clamp(0, L - 1)[:, None, :, None].expand(-1, H, -1, d)
        return attend(key.gather(2, at), value.gather(2, at), seen)

    if window_size is not None:
        index = last[:, None] - torch.arange(min(window_size, L), device=key.device)  # (B, w)
        output = output + next(gates) * attend_at(index, index >= 0)
    block_key, block_value = _finished(length, block_size, block_key, block_value)
    if block_key is not None and block_value is not None:
        finished = padding_mask(length // block_size, block_key.shape[2])  # (B, C)
        output = output + next(gates) * attend(block_key, block_value, finished)
    if n_selected_blocks is not None:
        own = last.clamp(min=0) // block_size  # (B,)
        chosen = own[:, None]  # (B, n)
        if block_key is not None:
            chooser, position = query, last.clamp(min=0)
            if block_query is not None:
                chooser, position = block_query.unsqueeze(2), own * block_size
            others = _best_blocks(
                chooser, block_key, position[:, None], block_size, n_selected_blocks
            )
            chosen = torch.cat((chosen, others.squeeze(1)), dim=-1)
        token = torch.arange(block_size, device=key.device)
        index = (chosen[..., None] * block_size + token).flatten(1)  # (B, n b)
        exists = (chosen >= 0).repeat_interleave(block_size, dim=1)
        output = output + next(gates) * attend_at(index, exists & (index <= last[:, None]))
    return output.squeeze(2)


@torch.no_grad()
def _best_blocks(
    query: Tensor, block_key: Tensor, position: Tensor, block_size: int, n_selected_blocks: int
) -> Tensor:
    """Choose for queries (B, H, Q, d) at ``position`` (Q,) or (B, Q): (B, Q, m), -1 for none."""
    block = torch.arange(block_key.shape[2], device=query.device)  # (C,)
    visible = block < (position + 1)[..., None] // block_size  # (Q, C) or (B, Q, C)
    other = block < position[..., None] // block_size  # visible and not the own block
    scores = query @ block_key.transpose(-1, -2) * query.shape[-1] ** -0.5  # (B, H, Q, C)
    merit = masked_softmax(scores, visible if visible.ndim == 2 else visible[:, None]).sum(1)
    merit = merit.masked_fill(~other, -1.0)  # below any probability
    # a stable sort, since topk leaves the order of equal values open
    best, index = merit.sort(dim=-1, descending=True, stable=True)
    n_others = min(n_selected_blocks - 1, len(block))
    return index[..., :n_others].masked_fill(best[..., :n_others] < 0, -1)


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    block_size: int,
    window_size: int | None,
    block_key: Tensor | None,
    block_value: Tensor | None,
    selected: Tensor | None,
    dropout: float,
    generator: torch.Generator | None,
) -> Tensor:
    """All branches over masked (L, L) scores."""
    L, d = query.shape[2:]
    scale = d**-0.5
    scores = query @ key.transpose(-1, -2) * scale  # (B, H, L, L)
    weights = torch.zeros_like(scores)  # of window and selection together
    output = torch.zeros_like(query)
    gates = iter(gate.unsqueeze(-1).unbind(-2))  # each (B, H, L, 1)
    if window_size is not None:
        probability = masked_softmax(scores, window_mask(L, window_size, query.device))
        weights = weights + next(gates) * _dropout(probability, dropout, generator)
    if block_key is not None and block_value is not None:
        position = torch.arange(L, device=query.device)
        visible = padding_mask((position + 1) // block_size, block_key.shape[2])  # (L, C)
        probability = masked_softmax(query @ block_key.transpose(-1, -2) * scale, visible)
        output = output + next(gates) * (_dropout(probability, dropout, generator) @ block_value)
    if selected is not None:
        seen = _selected_tokens(selected, L, block_size)[:, None]  # (B, 1, L, L)
        weights = weights + next(gates) * _dropout(masked_softmax(scores, seen), dropout, generator)
    return output + weights @ value


def _selected_tokens(selected: Tensor, size: int, block_size: int) -> Tensor:
    """Tokens that a choice (B, L, m) or (B, ceil(L / b), m) opens to each query: (B, L, L) bool."""
    if selected.shape[1] != size:
        selected = selected.repeat_interleave(block_size, dim=1)[:, :size]
    own = torch.arange(size, device=selected.device) // block_size  # (L,)
    n_blocks = -(-size // block_size)
    chosen = selected.new_zeros(len(selected), size, n_blocks + 1, dtype=torch.bool)
    chosen.scatter_(2, selected.masked_fill(selected < 0, n_blocks), True)  # last column: none
    chosen.scatter_(2, own[:, None].expand(len(selected), -1, 1), True)
    return chosen[..., own] & causal_mask(size, selected.device)


def _finished(
    length: Tensor, block_size: int, block_key: Tensor | None, block_value: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Zero the vectors of blocks that hold padding, lest anything of theirs leak."""
    if block_key is None:
        return None, None
    has_padding = ~padding_mask(length // block_size, block_key.shape[2])[:, None, :, None]
    block_key = block_key.masked_fill(has_padding, 0.0)
    if block_value is not None:
        block_value = block_value.masked_fill(has_padding, 0.0)
    return block_key, block_value


def _dropout(weights: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    if rate == 0.0:
        return weights
    keep = torch.empty_like(weights).bernoulli_(1.0 - rate, generator=generator)
    return weights * keep.div_(1.0 - rate)


def _check(
    key: Tensor,
    value: Tensor,
    length: Tensor,
    block_size: int,
    window_size: int | None,
    block_key: Tensor | None,
    block_value: Tensor | None,
) -> None:
    if key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} must both be (B, H, L, d)"
        )
    if length.shape != key.shape[:1] or length.is_floating_point():
        raise ValueError(
            f"length must be {tuple(key.shape[:1])} integers, one for each row; got "
            f"{tuple(length.shape)} {length.dtype}"
        )
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size must be at least 1, got {window_size}; None for no window")
    B, H, L, d = key.shape
    for name, x in (("block_key", block_key), ("block_value", block_value)):
        if x is not None and x.shape != (B, H, L // block_size, d):
            raise ValueError(
                f"{name} {tuple(x.shape)} must be {(B, H, L // block_size, d)}: one vector for "
                f"each finished block of {block_size} among {L} positions"
            )
    if block_value is not None and block_key is None:
        raise ValueError("block_value without block_key; give both, or neither")


def _check_options(
    n_selected_blocks: int | None, selection: str, dropout: float, block_key: Tensor | None
) -> None:
    if selection not in SELECTIONS:
        raise ValueError(f"selection: {selection!r} is unknown; use one of {', '.join(SELECTIONS)}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if n_selected_blocks is None:
        return
    if n_selected_blocks < 1:
        raise ValueError(
            f"n_selected_blocks must be at least 1, got {n_selected_blocks}; None for no selection"
        )
    if n_selected_blocks > 1 and block_key is None:
        raise ValueError(
            f"n_selected_blocks {n_selected_blocks} needs block_key to choose by; give it, or "
            "set n_selected_blocks to 1"
        )


def _check_gate(
    query: Tensor,
    gate: Tensor,
    window_size: int | None,
    block_value: Tensor | None,
    n_selected_blocks: int | None,
) -> None:
    n_branches = sum(x is not None for x in (window_size, block_value, n_selected_blocks))
    if n_branches == 0:
        raise ValueError("no branch: give window_size, block_value or n_selected_blocks")
    if gate.shape != (*query.shape[:3], n_branches):
        raise ValueError(
            f"gate {tuple(gate.shape)} must be {(*query.shape[:3], n_branches)}: one weight for "
            f"each of the {n_branches} branches in use"
        )
