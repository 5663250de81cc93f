"""Tensors of the CPU that say they are on a GPU, for machines without one.

Whatever Python asks torch to do passes through :class:`PretendGPU`: a tensor made on ``cuda``,
moved there or computed from one that is there answers ``device`` with ``cuda``, and an operation on
tensors of both devices is refused as CUDA refuses it. So code for a GPU takes the way that it takes
there, and a tensor that was made without ``device=`` is found. The numbers are the CPU's; speed,
memory, kernels, streams and what torch computes below Python are not pretended.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_GETTERS = {
    Tensor.device.__get__: lambda gpu: CUDA if gpu else CPU,
    Tensor.is_cuda.__get__: bool,
}
_INDEXING = ("__getitem__", "__setitem__", "index_put_", "index_put")  # may take indices of the CPU


class PretendGPU(TorchFunctionMode):
    """As in the module. Of a tensor that it never saw, such as a gradient, it says ``cuda``."""

    def __init__(self) -> None:
        super().__init__()
        self.on_gpu = WeakTensorKeyDictionary()  # Tensor -> bool

    def move(self, model: nn.Module) -> None:
        """Put parameters and buffers on the pretended GPU."""
        for parameter in model.parameters():
            self.on_gpu[parameter] = True
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:  # another tensor, as it would be: the old one may be shared
                    module._buffers[name] = buffer.view_as(buffer)
                    self.on_gpu[module._buffers[name]] = True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _GETTERS:
            return _GETTERS[func](self.on_gpu.get(args[0]) is not False)
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        place = None
        if kwargs.get("device") is not None:
            place, kwargs["device"] = _is_gpu(kwargs["device"]), CPU
        if name in ("to", "cpu"):
            return self._move(func, args, kwargs, False if name == "cpu" else place)
        tensors = list(_tensors((args, kwargs)))
        there = [x for x in tensors if self.on_gpu.get(x) is True]
        here = [x for x in tensors if self.on_gpu.get(x) is False]
        self._refuse_mix(name, args, there, here)
        out = func(*args, **kwargs)
        if place is None and (there or here or not tensors):
            place = bool(there)
        if place is not None:
            for x in _tensors(out):
                if self.on_gpu.get(x) is None:
                    self.on_gpu[x] = place
        return out

    @staticmethod
    def _refuse_mix(name: str, args: Any, there: list[Tensor], here: list[Tensor]) -> None:
        if name in ("numpy", "__array__") and there:
            raise TypeError("can't convert a pretended CUDA tensor to numpy")
        strangers = [x for x in here if x.dim() > 0]  # a number of the CPU may stand anywhere
        if name in _INDEXING:
            strangers = [x for x in strangers if x is args[0]]
        if there and strangers and name != "copy_":
            raise RuntimeError(
                f"{name}: tensors on cuda {[tuple(x.shape) for x in there]} and on cpu "
                f"{[tuple(x.shape) for x in strangers]}"
            )

    def _move(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], place: bool | None
    ) -> Tensor:
        tensor, *rest = args
        for i, x in enumerate(rest):
            if isinstance(x, (torch.device, str)):
                place, rest[i] = _is_gpu(x), CPU
            elif isinstance(x, Tensor):
                place = self.on_gpu.get(x) is not False
        before: bool | None = self.on_gpu.get(tensor)
        place = before if place is None else place
        out: Tensor = func(tensor, *rest, **kwargs)
        if out is tensor and place is not before:
            out = tensor.clone()  # of its own, as on a device of its own
        if place is not None:
            self.on_gpu[out] = place
        return out


def _is_gpu(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from _tensors(y)
    elif isinstance(x, dict):
        yield from _tensors(list(x.values()))
