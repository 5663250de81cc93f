"""Ranks and top-k lists of scores that come in chunks of items, with an unbiased rule for ties.

The order of a row's items is total: by score, and among equal scores by a pseudo-random number of
the pair (user, item). Every item of a tie is therefore equally likely at each of its places, a
constant scorer gets the metrics of a random one in expectation, and a result depends on neither
batch size nor chunks, threads or device. The pair is one of internal ids: files in another order
draw other ties, favouring no item. (``torch.topk`` alone favours low ids.) [ours]

Scores of ``-inf`` mean that the item is no candidate: it is in no list. Column 0 of the catalogue
is padding and must be ``-inf``.

Shapes: B rows, C items of a chunk, N items, k length of the lists, P pairs of a row and a target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Chunks = Callable[[], Iterable[tuple[int, Tensor]]]
"""Gives, each time anew and with equal scores, the first item of a chunk and ``(B, C)`` scores."""

# Items of a block whose maximum stands for it in the search for the top k: blocks of one cache
# line or more make reading the best of them cheap, and few blocks make the search among maxima so.
_BLOCK = 64
_NEVER = torch.iinfo(torch.int64).max


class Places(NamedTuple):
    """Where targets stand among all candidates of their row.

    Attributes:
        ranks: ``(P,)`` int64, 1 for the best; ties by the pair's pseudo-random number.
        mean_ranks: ``(P,)`` float64, the mean over all orders of the ties.
        n_candidates: ``(B,)`` int64.
    """

    ranks: Tensor
    mean_ranks: Tensor
    n_candidates: Tensor


def tie_keys(users: Tensor, items: Tensor) -> Tensor:
    """Pseudo-random int64 of each pair (user, item), in the broadcast shape of the two.

    The finaliser of splitmix64 over both ids. Shifts keep the sign here, which mixes as well.
    """
    x = users * -7046029254386353131 + items * -4417276706812531889
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)


def top_k(chunks: Chunks, users: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best candidates of each row, best first.

    Args:
        chunks: The scores.
        users: ``(B,)`` int64, what ties are drawn by.
        k: Length of the lists, >= 1.

    Returns:
        Scores ``(B, k)`` and item ids ``(B, k)``; a row with fewer candidates ends with ``-inf``
        and id 0.
    """
    best: tuple[Tensor, Tensor] | None = None
    for start, scores in chunks():
        found = _top_k_of_chunk(scores, start, users, k)
        if best is not None:
            values, items = (torch.cat(pair, 1) for pair in zip(best, found, strict=True))
            found = _in_order(values, items, users, k)
        best = found
    if best is None:
        raise ValueError("there are no scores")
    values, items = best
    items = items.masked_fill(values == -torch.inf, 0)
    missing = k - values.size(1)
    if missing > 0:
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
        items = torch.nn.functional.pad(items, (0, missing))
    return values, items


def places(chunks: Chunks, users: Tensor, rows: Tensor, items: Tensor) -> Places:
    """Ranks of targets among all candidates of their rows.

    The scores are read twice: a target is compared with its own score as computed there, since
    the same product in another shape may differ in the last bit.

    Args:
        chunks: The scores.
        users: ``(B,)`` int64, what ties are drawn by.
        rows: ``(P,)`` row of each target, ascending.
        items: ``(P,)`` item id of each target.
    """
    goals: Tensor | None = None
    for start, scores in chunks():
        if goals is None:
            goals = scores.new_full((len(rows), 1), -torch.inf)
        inside = ((items >= start) & (items < start + scores.size(1))).nonzero().squeeze(1)
        goals[inside, 0] = scores[rows[inside], items[inside] - start]
    if goals is None:
        raise ValueError("there are no scores")
    keys = tie_keys(users[rows], items)
    above = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    equal, earlier = above.clone(), above.clone()
    n_candidates = torch.zeros_like(users)
    one_a_row = len(rows) == len(users) and torch.equal(rows, torch.arange(len(rows)).to(rows))
    for start, scores in chunks():
        n_items = scores.size(1)
        ids = torch.arange(start, start + n_items, device=rows.device)
        n_candidates += (scores > -torch.inf).sum(1)
        itself = (items >= start) & (items < start + n_items)
        # where rows have several targets, copies of them; never more than there are scores
        for part in torch.split(torch.arange(len(rows), device=rows.device), len(users)):
            row = scores if one_a_row else scores[rows[part]]
            work = torch.empty_like(row, dtype=torch.float32)
            above[part] += _count(torch.gt(row, goals[part], out=work))
            same = _count(torch.eq(row, goals[part], out=work))
            equal[part] += same
            tied = (same > itself[part]) & (goals[part, 0] > -torch.inf)
            for pair in _few(part[tied], len(users)):
                first = tie_keys(users[rows[pair], None], ids) < keys[pair, None]
                first &= scores[rows[pair]] == goals[pair]
                earlier[pair] += first.sum(1)
    return Places((above + earlier + 1).long(), above + (equal + 1) / 2, n_candidates)


def _few(rows: Tensor, n_rows: int) -> Iterator[Tensor]:
    """Rows in portions: the random numbers of ties take eight times the memory of the scores."""
    step = max(1, n_rows // 8)
    for start in range(0, rows.size(0), step):
        yield rows[start : start + step]


def _count(flags: Tensor) -> Tensor:
    # several times faster than a sum of booleans, and exact: a chunk has less than 2 ** 24 items
    return (flags @ flags.new_ones(flags.size(1))).double()


def _top_k_of_chunk(scores: Tensor, start: int, users: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # one more than asked for: it tells whether the last place is shared
    values, items = _largest(scores, min(k + 1, scores.size(1)))
    items += start
    tied = ((values[:, 1:] == values[:, :-1]) & (values[:, 1:] > -torch.inf)).any(1)
    values, items = values[:, :k].clone(), items[:, :k].clone()
    for rows in _few(tied.nonzero().squeeze(1), users.size(0)):
        values[rows], items[rows] = _tied_top_k(
            scores[rows], start, users[rows], values[rows], items[rows]
        )
    return values, items


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``torch.topk``, by the maxima of blocks where there are many items.

    The k best items lie in the k blocks with the largest maxima.
    """
    n_rows, n_items = scores.shape
    n_blocks = n_items // _BLOCK
    if n_blocks < 4 * k:
        found = scores.topk(k)
        return found.values, found.indices
    blocked = torch.unflatten(scores[:, : n_blocks * _BLOCK], 1, (n_blocks, _BLOCK))
    block = blocked.amax(2).topk(k, sorted=False).indices  # (B, k)
    row = torch.arange(n_rows, device=scores.device)[:, None]
    rest = scores[:, n_blocks * _BLOCK :]
    found = torch.cat((blocked[row, block].flatten(1), rest), 1).topk(k)
    # places within the chosen blocks, or behind them
    behind = found.indices >= k * _BLOCK
    chosen = block.gather(1, (found.indices // _BLOCK).clamp(max=k - 1))
    items = chosen * _BLOCK + found.indices % _BLOCK
    items = torch.where(behind, found.indices + (n_blocks - k) * _BLOCK, items)
    return found.values, items


def _tied_top_k(
    scores: Tensor, start: int, users: Tensor, values: Tensor, items: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of the top k anew: what exceeds the last value stays, its equals are drawn."""
    k = values.size(1)
    last = values[:, -1:]
    ids = torch.arange(start, start + scores.size(1), device=scores.device)
    keys = tie_keys(users[:, None], ids).masked_fill_(scores != last, _NEVER)
    drawn = keys.topk(k, largest=False).indices
    drawn_values = scores.gather(1, drawn).masked_fill_(keys.gather(1, drawn) == _NEVER, -torch.inf)
    values = values.masked_fill(values == last, -torch.inf)
    return _in_order(
        torch.cat((values, drawn_values), 1), torch.cat((items, drawn + start), 1), users, k
    )


def _in_order(values: Tensor, items: Tensor, users: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, by value and then by the key of the pair."""
    by_key = tie_keys(users[:, None], items).argsort(1)
    by_value = values.gather(1, by_key).sort(dim=1, descending=True, stable=True).indices[:, :k]
    order = by_key.gather(1, by_value)
    return values.gather(1, order), items.gather(1, order)
