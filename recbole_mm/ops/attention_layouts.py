"""Which keys a tile of queries meets, and which of them each branch sees.

:class:`Band` leaves out what no branch sees: a block of queries meets the blocks of keys that its
window reaches, its own, and those chosen for all of it, side by side. Blocks that a single query
has chosen are not in it; see :mod:`.pair_attention`.

:class:`Prefix` leaves nothing out but the future: a run of queries meets all keys before its end,
and masks do the rest. Below a few hundred positions that is faster.

A branch sees a run of the *columns* of a tile's scores. The window comes first and may overlap
with selection.

Shapes: B batch, H heads, G = B H rows, L sequence length, d width of a head, b tokens in a
block, N = ceil(L / b) blocks of a row, m chosen blocks, g entries of a tile (blocks of queries, or
rows), T queries of an entry, K keys of an entry.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_mm.ops.attention_tools import ChosenBlocks, gather_blocks, hidden, n_fitting, tiles

_RUN = 64  # queries of a tile of a prefix; measured


@dataclass(frozen=True)
class Tile:
    """Some of the queries, and the columns of their scores (g, T, K) that each branch sees."""

    entries: slice  # of the first dimension of what a layout has split
    positions: slice  # of the second
    window_columns: slice
    selected_columns: slice
    first_key: int = 0

    @property
    def queries(self) -> tuple[slice, slice]:
        """Index of the queries."""
        return self.entries, self.positions


class Band:
    """Blocks of queries against the blocks of keys that they see.

    Args:
        query: ``(G, L, d)``, of which shape, dtype and device are read.
        block_size: Tokens ``b`` in a block.
        window: Keys in the window, or ``None``.
        selection: Chosen blocks, or ``None``.
    """

    def __init__(
        self,
        query: Tensor,
        block_size: int,
        window: int | None,
        selection: ChosenBlocks | None,
    ) -> None:
        self.shape = query.shape
        self.device = query.device
        self.block_size = b = block_size
        self.n_blocks = -(-query.shape[1] // b)  # N
        self.n_before = 0 if window is None else -(-(window - 1) // b)  # the window reaches
        chosen = None if selection is None or not selection.is_shared else selection.chosen
        self.n_chosen = 0 if chosen is None else chosen.shape[-1]  # m

        place = torch.arange(self.n_blocks, device=self.device)[:, None]
        reach = torch.arange(-self.n_before, 1, device=self.device)
        index = (place + reach).clamp_(min=0).expand(len(query), -1, -1)
        if chosen is not None:
            every_head = chosen.clamp(min=0).repeat_interleave(len(query) // len(chosen), dim=0)
            index = torch.cat((index, every_head), dim=-1)
        first = torch.arange(len(query), device=self.device)[:, None, None] * self.n_blocks
        self.index = (index + first).flatten(0, 1)  # (G N, K / b) among all G N

        token = torch.arange(b, device=self.device)[:, None]
        self.causal = hidden(token >= token.T, query.dtype)  # (b, b)
        if window is not None:
            key = torch.arange(-self.n_before * b, b, device=self.device)
            self.latest = hidden((key <= token) & (key > token - window), query.dtype)

    def tiles(self) -> Iterator[Tile]:
        """Cut all blocks of queries into tiles."""
        b = self.block_size
        window_columns = slice(0, (self.n_before + 1) * b)
        selected_columns = slice(self.n_before * b, None)
        for part in tiles(len(self.index), b * b * self.index.shape[1], self.device):
            yield Tile(part, slice(None), window_columns, selected_columns)

    def split(self, x: Tensor) -> Tensor:
        """Cut (G, L, ...) into blocks (G N, b, ...), the last of a row filled up with zeros."""
        missing = -self.shape[1] % self.block_size
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        return x.reshape(-1, self.block_size, x.shape[-1])

    def join(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        return x.view(self.shape[0], -1, x.shape[-1])[:, : self.shape[1]]

    def bands(self, blocks: Tensor) -> Tensor:
        """Make ready for :meth:`keys`; with no chosen blocks, a view of all bands."""
        if self.n_chosen > 0:
            return blocks
        N, b, d = blocks.shape
        tokens = F.pad(blocks.flatten(0, 1), (0, 0, self.n_before * b, 0))
        return tokens.as_strided((N, (self.n_before + 1) * b, d), (b * d, d, 1))

    def keys(self, bands: Tensor, tile: Tile) -> Tensor:
        """Keys (g, K, d) of a tile."""
        if self.n_chosen == 0:
            return bands[tile.entries]
        return gather_blocks(bands, self.index[tile.entries])

    def add_to_keys_(self, blocks: Tensor, tile: Tile, x: Tensor) -> None:
        """Add x (g, K, d) to the keys that it belongs to."""
        blocks.index_add_(0, self.index[tile.entries].flatten(), x.view(-1, *blocks.shape[1:]))

    def in_window(self, scores: Tensor, tile: Tile) -> Tensor:
        """Scores of the window, -inf where not seen; a copy."""
        scores = scores[..., tile.window_columns] + self.latest
        # the first blocks of a row have fewer before them
        for i in range(min(self.n_before, self.n_blocks)):
            missing = (self.n_before - i) * self.block_size
            self._of_row(scores, i, tile)[..., :missing].fill_(-math.inf)
        return scores

    def in_selection_(self, scores: Tensor, tile: Tile) -> Tensor:
        """Scores of own and chosen blocks, -inf where not seen; in place."""
        scores = scores[..., tile.selected_columns]
        scores[..., : self.block_size] += self.causal
        # block i of a row finds i others
        for i in range(min(self.n_chosen, self.n_blocks)):
            found = (1 + i) * self.block_size
            self._of_row(scores, i, tile)[..., found:].fill_(-math.inf)
        return scores

    def _of_row(self, scores: Tensor, i: int, tile: Tile) -> Tensor:
        """Scores of block ``i`` of every row."""
        return scores[(i - tile.entries.start) % self.n_blocks :: self.n_blocks]


class Prefix:
    """Runs of queries against all keys before their end.

    Args:
        query: ``(G, L, d)``, of which shape, dtype and device are read.
        n_heads: ``H``; the heads of a row of the batch follow each other in ``G``.
        window: Keys in the window, or ``None``.
        selection: Chosen blocks, or ``None``.
    """

    def __init__(
        self, query: Tensor, n_heads: int, window: int | None, selection: ChosenBlocks | None
    ) -> None:
        self.shape = query.shape
        self.dtype = query.dtype
        self.device = query.device
        self.n_heads = n_heads
        self.window = window
        self.selection = selection

    def tiles(self) -> Iterator[Tile]:
        """Cut all rows into tiles."""
        n_rows, size, _ = self.shape
        step = -(-size // -(-size // _RUN))  # runs of the same length
        for start in range(0, size, step):
            stop = min(size, start + step)
            reach = 0 if self.window is None else max(0, start + 1 - self.window)
            first_key = 0 if self.selection is not None else reach
            n_scores = self.n_heads * (stop - start) * (stop - first_key)
            each = self.n_heads * n_fitting(n_scores, self.device)
            for row in range(0, n_rows, each):
                yield Tile(
                    entries=slice(row, min(n_rows, row + each)),
                    positions=slice(start, stop),
                    window_columns=slice(reach - first_key, None),
                    selected_columns=slice(0, None),
                    first_key=first_key,
                )

    def split(self, x: Tensor) -> Tensor:
        """Leave (G, L, ...) as it is."""
        return x

    def join(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        return x

    def bands(self, x: Tensor) -> Tensor:
        """Make ready for :meth:`keys`."""
        return x

    def keys(self, x: Tensor, tile: Tile) -> Tensor:
        """Keys (g, K, d) of a tile."""
        return x[tile.entries, tile.first_key : tile.positions.stop]

    def add_to_keys_(self, total: Tensor, tile: Tile, x: Tensor) -> None:
        """Add x (g, K, d) to the keys that it belongs to."""
        total[tile.entries, tile.first_key : tile.positions.stop] += x

    def in_window(self, scores: Tensor, tile: Tile) -> Tensor:
        """Scores of the window, -inf where not seen; a copy if selection needs them, too."""
        scores = scores[..., tile.window_columns]
        if self.selection is not None:
            scores = scores.clone()
        start, stop = tile.positions.start, tile.positions.stop
        if self.window is None or self.window >= stop:
            self._hide_future_(scores)
        else:
            query = torch.arange(start, stop, device=self.device)[:, None]
            key = torch.arange(stop - scores.shape[-1], stop, device=self.device)
            scores += hidden((key <= query) & (key > query - self.window), self.dtype)
        return scores

    def in_selection_(self, scores: Tensor, tile: Tile) -> Tensor:
        """Scores of own and chosen blocks, -inf where not seen; in place."""
        self._hide_future_(scores)
        start, stop = tile.positions.start, tile.positions.stop
        if self.selection is None or self.selection.block_size >= stop:
            return scores
        block_size = self.selection.block_size
        query = torch.arange(start, stop, device=self.device)
        own = query // block_size
        rows = slice(tile.entries.start // self.n_heads, tile.entries.stop // self.n_heads)
        index = own if self.selection.is_shared else query
        chosen = self.selection.chosen[rows].index_select(1, index)  # (B, T, m)
        own = own[:, None].expand(len(chosen), -1, 1)
        # -1 stands where every earlier block is chosen, block 0 among them, or at padding
        seen = torch.cat((own, chosen.clamp(min=0)), dim=-1)
        n_blocks = -(-stop // block_size)
        is_seen = torch.zeros(*own.shape[:2], n_blocks, dtype=torch.bool, device=self.device)
        mask = hidden(is_seen.scatter_(2, seen, True), self.dtype)  # (B, T, blocks)
        mask = mask.repeat_interleave(block_size, dim=-1)[:, None, :, :stop]
        scores.view(-1, self.n_heads, *scores.shape[1:]).add_(mask)
        return scores

    def _hide_future_(self, scores: Tensor) -> None:
        n_queries = scores.shape[1]
        query = torch.arange(n_queries, device=self.device)[:, None]
        scores[..., -n_queries:] += hidden(query >= query.T, self.dtype)
