"""Several processes that train one model: who does what, and how they are started and ended.

RecBole's own way needs NCCL and as many GPUs as processes, shuffles batches otherwise than one
process does, and counts the users that its sampler repeats twice. Here every process draws the
batches that one process would draw and takes its share of each: a part of the rows in training, a
run of whole batches in evaluation. Gradients are averaged by torch's DistributedDataParallel;
metrics are computed from what all processes ranked, once gathered. RecBole therefore believes that
it runs in one process (``single_spec``).

A process group is open exactly while :func:`launch` runs; without one there is one process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import pickle  # nosec B403  (its exception)
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing import connection
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock, Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from recbole_mm import compat, errors
from recbole_mm.errors import EnvironmentFault, InputError, RecboleMMError

T = TypeVar("T")

# A process that has failed is seen by the one that started it, which ends the others: waiting for
# one another needs no limit of its own, and reading data may take long.
_TIMEOUT = timedelta(days=7)
_SECONDS_TO_END = 10.0


def n_processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0; the first one writes and prints."""
    return dist.get_rank() if n_processes() > 1 else 0


# ------------------------------------------------------------------------- who does what


def rows_of(index: Sequence[int]) -> Sequence[int]:
    """The rows of a training batch that are this process's.

    A batch of fewer rows than processes is everybody's: no process may be without one, and the
    mean of equal gradients is that of one process.
    """
    n = n_processes()
    return index if len(index) < n else index[rank() :: n]


def batches_of(loader: Any) -> Callable[[Sequence[int]], Sequence[int]]:
    """What gives this process its batches of an evaluation whole, and no row of the others.

    The batches of a process follow each other: rows gathered by process are in the order of the
    loader, which does not shuffle. Sampled candidates are those of one process.
    """
    return partial(_if_mine, loader.batch_size, len(loader), rank(), n_processes())


def _if_mine(
    batch_size: int, n_batches: int, me: int, n: int, index: Sequence[int]
) -> Sequence[int]:
    return index if index[0] // batch_size * n // n_batches == me else ()


def weight_of(count: Tensor | int, device: torch.device) -> float:
    """Weight of this process's mean loss, for the mean over processes to be that over the batch.

    Args:
        count: How many terms its mean has.
        device: Where the process group may compute.
    """
    total = torch.as_tensor(count, dtype=torch.float64, device=device).clone()
    mine = total.item()
    dist.all_reduce(total)
    return n_processes() * mine / max(total.item(), 1.0)


# ------------------------------------------------------------------------- what they exchange


def gathered(value: T) -> list[T]:
    """The value of each process, in their order; tensors on the CPU."""
    if n_processes() == 1:
        return [value]
    values: list[Any] = [None] * n_processes()
    dist.all_gather_object(values, value)
    return values


def mean(values: Sequence[float], device: torch.device) -> list[float]:
    """Mean over the processes of each value."""
    if n_processes() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    means: list[float] = (total / n_processes()).tolist()
    return means


class _Loss(nn.Module):
    """A model whose forward is a loss, which is what DistributedDataParallel watches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss_of: Callable[[Any], Any], batch: Any) -> Any:
        """The loss of a batch."""
        return loss_of(batch)


def replicated(model: nn.Module, seed: int) -> nn.Module:
    """The model whose gradients are averaged: call it with a loss function and a batch.

    The weights become those of the first process everywhere; from here on each process draws its
    own dropout. Batch norm looks at the whole batch on GPUs, as in RecBole, and at the rows of its
    process on a CPU.
    """
    if next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    if rank():
        torch.manual_seed(seed + rank())
    return compat.distributed_data_parallel(_Loss(model))


def share_statistics(model: nn.Module) -> None:
    """Give batch norm the running statistics of the first process."""
    if n_processes() > 1:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                for buffer in module.buffers():
                    dist.broadcast(buffer, 0)


# ------------------------------------------------------------------------- start and end


def launch(n: int, device_type: str, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``call`` returns in the first of ``n`` processes; it runs in each of them.

    If one fails, or this one is interrupted, all are ended.

    Args:
        n: Number of processes, all on this machine.
        device_type: ``cpu`` (gloo) or ``cuda`` (NCCL; process r takes GPU number r).
        call: Something that pickle can send; returns what JSON can hold.

    Raises:
        RecboleMMError: The one that a process raised.
        EnvironmentFault: If a process was killed.
        RuntimeError: For another error of a process, with its traceback.
    """
    # not fork: a CUDA context and the threads of torch do not survive it
    start = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as scratch:
        processes = [
            start.Process(target=_process, args=(number, n, device_type, scratch, call))
            for number in range(n)
        ]
        try:
            with compat.quiet_torch_of_children():
                for process in processes:
                    _start(process)
            failed = _first_failure(processes)
        finally:
            _end([process for process in processes if process.pid is not None])
        if failed is not None:
            raise _error(failed, processes[failed].exitcode or 0, Path(scratch), n)
        result: dict[str, Any] = json.loads(Path(scratch, "result.json").read_text("utf-8"))
    return result


def _start(process: Any) -> None:
    try:
        process.start()
    except (AttributeError, pickle.PicklingError) as error:
        raise InputError(
            f"the other processes cannot be sent what they are to do ({error}): define the model's "
            "class at the top level of a module"
        ) from error


def _first_failure(processes: Sequence[Any]) -> int | None:
    """Wait until all have ended well, or one has not; its number."""
    running = {process.sentinel: number for number, process in enumerate(processes)}
    while running:
        for sentinel in connection.wait(list(running)):
            number = running.pop(sentinel)
            processes[number].join()
            if processes[number].exitcode != 0:
                return number
    return None


def _end(processes: Sequence[Any]) -> None:
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join(_SECONDS_TO_END)
        if process.is_alive():
            process.kill()
            process.join()


def _error(number: int, exit_code: int, scratch: Path, n: int) -> BaseException:
    """What to raise for a process that has failed."""
    if exit_code == -signal.SIGINT:
        return KeyboardInterrupt()
    if exit_code < 0:
        return EnvironmentFault(
            f"process {number} of {n} was ended by {signal.Signals(-exit_code).name}; if the "
            "memory is used up, take fewer processes or smaller batches"
        )
    # one that lost its peer fails too, without a reason of its own
    notes = [json.loads(path.read_text("utf-8")) for path in sorted(scratch.glob("error_*.json"))]
    for note in notes:
        if note["kind"]:
            kind: type[RecboleMMError] = getattr(errors, note["kind"])
            return kind(note["message"])
    if not notes:
        return InputError(
            f"process {number} of {n} could not start (exit code {exit_code}): put the call below "
            '`if __name__ == "__main__":` in a file of its own'
        )
    first = min(notes, key=lambda note: note["time"], default={"message": f"exit code {exit_code}"})
    return RuntimeError(f"process {first.get('rank', number)} of {n} failed:\n{first['message']}")


def _process(
    number: int, n: int, device_type: str, scratch: str, call: Callable[[], dict[str, Any]]
) -> None:
    """Body of each process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it, even where it waits for a peer
    end_with_parent()
    tqdm.set_lock(RLock())  # its own is one of all processes, and left behind where one is ended
    try:
        _prepare(number, n, device_type, scratch)
        result = call()
        if number == 0:
            Path(scratch, "result.json").write_text(json.dumps(result), encoding="utf-8")
        dist.destroy_process_group()
        code = 0
    except BaseException as error:  # told to the process that started this one
        code = _tell(error, number, Path(scratch))
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's end: what runs there may wait for a peer, and a thread of gloo
    # that lets a tensor go after it aborts a process that had done its work.
    os._exit(code)


def end_with_parent() -> None:
    """End this process when the one that started it is killed: nothing may go on without it."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        with contextlib.suppress(OSError):
            connection.wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _prepare(number: int, n: int, device_type: str, scratch: str) -> None:
    if number:
        logging.disable(logging.CRITICAL)  # what it would say, the first one says
    if device_type == "cuda":
        torch.cuda.set_device(number)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // n))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
        # a file in a folder of this run's own: no port that another run may take
        init_method=Path(scratch, "meeting").as_uri(),
        rank=number,
        world_size=n,
        timeout=_TIMEOUT,
    )


def _tell(error: BaseException, number: int, scratch: Path) -> int:
    """Leave a note on an error; its exit code."""
    ours = isinstance(error, RecboleMMError)
    note: Mapping[str, Any] = {
        "kind": type(error).__name__ if ours else "",
        "message": str(error) if ours else "".join(traceback.format_exception(error)),
        "rank": number,
        "time": time.time(),
    }
    with contextlib.suppress(OSError):
        path = scratch / f"error_{number}.json"
        path.write_text(json.dumps(note), encoding="utf-8")
    return error.exit_code if isinstance(error, RecboleMMError) else 1
