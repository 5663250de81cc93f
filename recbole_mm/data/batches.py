"""Batches whose random parts depend on the seed, the epoch and the rows, and on nothing else.

RecBole draws negatives and masks from numpy's and Python's global state while it makes a batch: in
the main process, or in as many other states as there are workers. Here every batch is made from a
state of its own, so that the number of workers changes nothing, the model's own random numbers are
not disturbed, and a batch is the same when an interrupted epoch is entered again.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

Share = Callable[[Sequence[int]], Sequence[int]]


class SeededBatches:
    """A loader's ``collate_fn`` under a random state of the batch's own. [ours].

    Args:
        collate: What makes a batch of row numbers.
        seed: Seed of the run.

    Attributes:
        epoch: Number of the pass.
        share: What leaves of the rows of a batch those of this process; ``None`` for all.
    """

    def __init__(self, collate: Callable[[Sequence[int]], Any], seed: int) -> None:
        self._collate = collate
        self._seed = seed
        self.epoch = 0
        self.share: Share | None = None

    def __call__(self, index: Sequence[int]) -> Any:
        """The batch of these rows, or an empty tuple if it is another process's."""
        if self.share is not None:
            index = self.share(index)
            if not len(index):
                return ()
        rows = np.asarray([self._seed, self.epoch, *index], np.int64)
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        seed = zlib.crc32(rows.tobytes())
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  (what RecBole draws from)
        # not torch.manual_seed, which seeds the GPUs too
        torch.default_generator.manual_seed(seed)
        try:
            return self._collate(index)
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
            torch.set_rng_state(before[2])


def loaders_of(data: Any) -> list[Any]:
    """The torch loaders of a RecBole loader; a knowledge-based one has two."""
    parts = [getattr(data, name, None) for name in ("general_dataloader", "kg_dataloader")]
    return [part for part in parts if part is not None] or [data]


def count_targets(data: Any, batch_size: int) -> None:
    """Let ``batch_size`` mean targets, where the rows of a training loader are windows. [ours].

    A row of RecBole's has one target, a window up to L. As many windows make a batch as hold
    ``batch_size`` targets on average, but one at least, so that a batch teaches as much with
    ``train_objective: all`` as with ``last``, and takes no more memory where histories are long.

    Args:
        data: The loader.
        batch_size: ``train_batch_size``.
    """
    rows = data._dataset.inter_feat
    if not getattr(rows, "is_windows", False):
        return  # RecBole has counted them, and the items that it draws for each
    data.step = max(1, round(batch_size * len(rows) / len(rows.targets())))
    data.batch_sampler.batch_size = data.step
    data.set_batch_size(data.step)


def seed_batches(data: Any, seed: int, epoch: int = 0, share: Share | None = None) -> None:
    """Make a RecBole loader, from its next pass on, draw what it draws for this seed and epoch.

    Args:
        data: The loader.
        seed: Seed of the run.
        epoch: Number of the pass.
        share: As :attr:`SeededBatches.share`.
    """
    for loader in loaders_of(data):
        if not isinstance(loader.collate_fn, SeededBatches):
            loader.collate_fn = SeededBatches(loader.collate_fn, seed)
        loader.collate_fn.epoch = epoch
        loader.collate_fn.share = share
