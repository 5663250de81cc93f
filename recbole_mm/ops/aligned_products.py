"""Scores of a whole catalogue by products whose rows begin at a cache line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LINE = 64  # numbers: four cache lines of float32
_TILE = 1 << 18  # numbers of a piece of the product: 1 MiB of float32 stays in a core's cache
_FEW_ROWS = 16  # from here on pieces pay for their copies
_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


def aligned_rows(
    like: Tensor, n_rows: int, n_columns: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Uninitialized ``(n_rows, n_columns)`` where ``like`` is, of its type if none is given.

    Each row begins at a cache line: MKL's products take up to twice as long where they do not.
    """
    width = -(-n_columns // _LINE) * _LINE
    return like.new_empty(n_rows, width, dtype=dtype)[:, :n_columns]


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, ``(B, D) x (D, N)``, contiguous whatever N is.

    Pieces of columns are made in aligned rows and copied while they are in the cache.
    """
    n_rows, n_columns = left.size(0), right.size(1)
    width = max(_TILE // n_rows // _LINE, 1) * _LINE
    piece = aligned_rows(left, n_rows, min(width, n_columns))
    result = left.new_empty(n_rows, n_columns)
    for start in range(0, n_columns, width):
        some = right[:, start : start + width]
        result[:, start : start + width] = torch.mm(left, some, out=piece[:, : some.size(1)])
    return result


class AlignedProducts(TorchFunctionMode):
    """A context in which products with the vectors of all items are made by :func:`product`.

    RecBole's models score the catalogue by one product inside ``full_sort_predict``. N counts the
    padding item and fits no cache line but by chance.

    Args:
        n_items: N. Products with other numbers of columns or few rows, those that already fit,
            sparse ones, other devices, autocast and gradients are left alone.
    """

    def __init__(self, n_items: int) -> None:
        super().__init__()
        self.n_items = n_items

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func``, one of torch's; see torch.overrides."""
        if func in _PRODUCTS and not kwargs and self._scores(*args):
            return product(*args)
        return func(*args, **(kwargs or {}))

    def _scores(self, left: Tensor, right: Tensor) -> bool:
        return (
            left.layout == right.layout == torch.strided
            and left.dim() == right.dim() == 2
            and right.size(1) == self.n_items
            and self.n_items % _LINE != 0
            and left.size(0) >= _FEW_ROWS
            and left.device.type == "cpu"
            and left.dtype == right.dtype
            and not torch.is_autocast_enabled("cpu")
            and not torch.is_grad_enabled()
        )
