"""Ducho's layout of extracted features: no interactions, they are the user's own.

``<visual|textual|audio>_embeddings*/<backend>/<model>/<layer>/<item>.npy``, one vector a file;
fused ones in ``visual_embeddings_textual_embeddings_<fusion>``, a modality ``image_text_<fusion>``.

Source of the facts: github.com/sisinflab/Ducho (``config/README.md``, ``demos/``).
"""

from __future__ import annotations

import re
from pathlib import Path

from recbole_mm.data.feature_files import read_features
from recbole_mm.data.layouts.common import Matrix, Source
from recbole_mm.errors import InputError

_KINDS = {"visual": "image", "textual": "text", "audio": "audio"}


def read(folder: Path) -> Source:
    """Vectors of every model; with several for one modality, its name has that of the model.

    Raises:
        InputError: If there are none, or a file is damaged.
    """
    found: dict[str, list[Path]] = {}
    for place in sorted(folder.glob("*_embeddings*")):
        parts = place.name.split("_embeddings")
        kinds = [_KINDS.get(part.strip("_")) for part in parts[:-1]]
        if None not in kinds:
            # of one: textual_embeddings_1 is no name but a number
            fusion = [_plain(parts[-1])] if len(kinds) > 1 else []
            kind = "_".join(filter(None, [*kinds, *fusion]))
            folders = {file.parent for file in place.rglob("*.npy")}
            found.setdefault(kind, []).extend(sorted(folders))
    features: dict[str, Matrix] = {}
    for kind, places in found.items():
        for place in places:
            # .../<backend>/<model>/<layer>; a model of a hub has a slash in its name
            name = kind if len(places) == 1 else f"{kind}_{_plain(place.parent.name)}"
            if name in features:
                name = f"{name}_{_plain(place.name)}"
            if name in features:
                raise InputError(
                    f"{place} and {features[name].source} would both be called {name}; move one "
                    "of them away"
                )
            file = read_features(place)
            features[name] = Matrix(file.values, file.tokens or [], place)
    if not features:
        raise InputError(
            f"{folder}: no <item>.npy below visual_embeddings*, textual_embeddings* or "
            "audio_embeddings*; give Ducho's dataset_path"
        )
    return Source(folder.resolve().name, {}, features=features)


def _plain(name: str) -> str:
    """A name of a folder as part of the name of a modality."""
    return re.sub(r"\W+", "_", name).strip("_").lower()
