"""MicroLens' layout, of the folders ``MicroLens-50k-Dataset`` and ``MicroLens-100k-Dataset``.

================================ ==========================================================
``*_pairs.csv``                  ``user,item,timestamp``, items numbered from 1
``*_titles.csv``                 ``item,title``; or ``*_title_en.csv``, without a header
``tags_to_summary.csv``          item and category, without a header. May be missing
``*_image_features_*.npy``       row ``r`` is that of item r + 1; so are ``_text_features_``,
                                 ``_video_features_`` and ``_audio_features_``; here or in
                                 ``extracted_modality_features/``
================================ ==========================================================

Source of the facts: github.com/westlake-repl/MicroLens (README) and the files of that name.
"""

from __future__ import annotations

from pathlib import Path

from recbole_mm.data.layouts.common import (
    Source,
    columns,
    files,
    numbered,
    pairs,
    the_file,
    whole_number,
)
from recbole_mm.errors import InputError

_MODALITIES = ("text", "image", "video", "audio")


def read(folder: Path) -> Source:
    """Interactions by time, titles, categories, and the vectors of every modality.

    Raises:
        InputError: If a file is missing or damaged, or a modality has two matrices.
    """
    path = the_file(folder, "*_pairs.csv", "the interactions")
    held = columns(path, ["user", "item", "timestamp"])
    numbers = [whole_number(item, path, "item") for item in set(held["item"])]
    largest = max(numbers)
    if min(numbers) < 1:
        raise InputError(f"{path}: has an item {min(numbers)}; items are numbered from 1")
    interactions = dict(zip(("user_id", "item_id", "timestamp"), held.values(), strict=True))

    items = {}
    titles = [*files(folder, "*_titles.csv"), *files(folder, "*_title_en.csv")]
    if titles:
        held = pairs(titles[-1], ("item", "title"))  # English, if there are both
        items["title"] = {item: " ".join(texts) for item, texts in held.items()}
    if (folder / "tags_to_summary.csv").is_file():
        tags = pairs(folder / "tags_to_summary.csv", ("item", "tag"))
        items["categories"] = {
            item: " ".join("_".join(tag.replace(",", " ").split()) for tag in of_item)
            for item, of_item in tags.items()
        }

    features = {}
    for modality in _MODALITIES:
        pattern = f"*_{modality}_features_*.npy"
        found = [*files(folder, pattern), *files(folder / "extracted_modality_features", pattern)]
        if len(found) > 1:
            raise InputError(
                f"{folder}: {len(found)} matrices for {modality}, "
                f"{', '.join(each.name for each in found)}; leave one there"
            )
        for each in found:
            matrix = numbered(each, first=1)
            if largest > len(matrix.values):
                raise InputError(
                    f"{each}: {len(matrix.values)} rows, but {path.name} has an item {largest}; "
                    "the two files belong to different states of the data set"
                )
            features[modality] = matrix
    return Source(path.name.removesuffix("_pairs.csv"), interactions, items, features)
