"""The data set of a model: RecBole's choice of class, on the floor that all models share."""

from __future__ import annotations

import functools
from typing import Any

import recbole.data.dataset
from recbole.data.dataset import Dataset, KnowledgeBasedDataset, SequentialDataset
from recbole.utils import ModelType

from recbole_mm import compat
from recbole_mm.data.dataset import MultimodalDataset
from recbole_mm.data.sequential_dataset import MultimodalSequentialDataset


def create_dataset(config: Any) -> Dataset:
    """The data set of ``config["model"]``: RecBole's choice of class, on our floor.

    Nothing is read from or written to a pickled cache, which would ignore the contents of files.

    Raises:
        InputError: If a file or a key of the configuration is at fault.
    """
    classes = recbole.data.dataset
    by_type = {
        ModelType.SEQUENTIAL: SequentialDataset,
        ModelType.KNOWLEDGE: KnowledgeBasedDataset,
    }
    # a class of the user's own has the data set of the model that it derives from
    lineage = filter(compat.is_recboles, config.model_class.__mro__)
    named = (getattr(classes, f"{cls.__name__}Dataset", None) for cls in lineage)
    base = next(filter(None, named), by_type.get(config["MODEL_TYPE"], Dataset))
    return on_our_floor(base)(config)


@functools.cache
def on_our_floor(base: type[Dataset]) -> type[MultimodalDataset]:
    """RecBole's data set class ``base`` over :class:`MultimodalDataset`.

    Sequences are gathered in each batch unless ``base`` augments them in its own way (DIEN).
    """
    lazy = getattr(base, "data_augmentation", None) is SequentialDataset.data_augmentation
    floor = MultimodalSequentialDataset if lazy else MultimodalDataset
    if issubclass(floor, base):
        return floor
    return type(f"Multimodal{base.__name__}", (floor, base), {"__doc__": base.__doc__})
