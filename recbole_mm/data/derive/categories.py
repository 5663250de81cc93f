"""Vectors of items from a column of categories."""

from __future__ import annotations

import json

import numpy as np
import scipy.sparse as sp
from recbole.utils.enum_type import FeatureType

from recbole_mm.data.atomic import read_header
from recbole_mm.data.decomposition import decompose, unit_rows
from recbole_mm.data.derive.common import Announce, Derived, Job, placed, svd_encoder, weighted
from recbole_mm.errors import InputError


def derive_categories(job: Job, announce: Announce) -> Derived:
    r"""Describe each item by its categories, the column ``field`` of ``.item``.

    With at most ``dim`` categories these are the multi-hot rows, in the order of the names, at
    length 1; with more, weights :math:`1 + \ln\frac{1 + n}{1 + df}`, rows of length 1, and
    truncated SVD. Items without a category are absent. [ours]
    """
    field, dim, path = job.options["field"], job.options["dim"], job.files["item"]
    announce("read")
    ids, items = job.read_items(field)

    announce("count categories")
    # a token is one category, be there a space in it or not
    is_list = read_header(path, job.source.atomic)[field] is FeatureType.TOKEN_SEQ
    separator = job.source.atomic.seq_separator
    entries = [entry.split(separator) if is_list else [entry] for entry in items[field]]
    lists = [[name for name in entry if name not in ("", "_")] for entry in entries]
    names = sorted({name for entry in lists for name in entry})
    if not names:
        raise InputError(f"{path}: {field} is empty in every row; name another field")
    place = {name: column for column, name in enumerate(names)}
    columns = [place[name] for entry in lists for name in entry]
    bounds = np.cumsum([0, *map(len, lists)])
    counts = sp.csr_matrix((np.ones(len(columns)), columns, bounds), (len(ids), len(names)))

    announce("decompose")
    if len(names) <= dim:
        values, explained = unit_rows(np.sign(counts.toarray())), 1.0
        metadata = {"encoder": "category multi-hot"}
    else:
        values, explained = decompose(weighted(counts, min_items=1), dim, job.modality)
        metadata = svd_encoder("category-svd")
    return placed(ids, values, explained, {**metadata, "fields": json.dumps([field])})
