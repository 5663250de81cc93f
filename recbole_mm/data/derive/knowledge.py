"""Vectors of items from a knowledge graph, RecBole's ``.kg`` and ``.link``."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import scipy.sparse as sp

from recbole_mm.data.decomposition import decompose
from recbole_mm.data.derive.common import Announce, Derived, Job, placed, svd_encoder, weighted
from recbole_mm.data.movielens import is_misnumbered_link, translated_link
from recbole_mm.errors import InputError

_LOG = logging.getLogger(__name__)


def derive_knowledge(job: Job, announce: Announce) -> Derived:
    r"""Describe each item by the facts of the knowledge graph in which it takes part.

    A triple ``(head, relation, tail)`` gives the item of ``head`` the fact (relation, out, tail)
    and the item of ``tail`` the fact (relation, in, head). A fact counts once for an item, and
    facts of one item alone are left out. Weight :math:`1 + \ln\frac{1 + n}{1 + df}`, rows of
    length 1, truncated SVD. Items without a link, a triple or a shared fact are absent. [ours]

    One file is repaired on the way, that of ml-100k: see :mod:`recbole_mm.data.movielens`.
    """
    announce("read")
    item_id, link_file, kg_file = job.source.item_id_field, job.files["link"], job.files["kg"]
    entity, head, relation, tail = job.source.knowledge_fields
    link = job.source.read(link_file, item_id, entity)
    triples = job.source.read(kg_file, head, relation, tail)
    link = link[(link[item_id] != "") & (link[entity] != "")]
    if is_misnumbered_link(link):
        n_rows, link = len(link), translated_link(link)
        _LOG.warning(
            "%s names its items by the numbers of ml-20m, not of ml-100k (RecSysDatasets issue "
            "130): translated, its %d rows serve %d items",
            link_file,
            n_rows,
            len(link),
        )
    job.check_ids(link[item_id], link_file)

    announce("count facts")
    row, ids = pd.factorize(link[item_id])
    linked = pd.DataFrame({"row": row, "entity": link[entity]})
    found = []
    for direction, near, far in (("out", head, tail), ("in", tail, head)):
        part = linked.merge(triples, left_on="entity", right_on=near)
        part["fact"] = part[relation] + f"\t{direction}\t" + part[far]
        found.append(part[["row", "fact"]])
    facts = pd.concat(found, ignore_index=True)
    # sorted, so that the result does not depend on the order of the triples
    column, names = pd.factorize(facts["fact"], sort=True)
    counts = sp.csr_matrix(
        (np.ones(len(facts)), (facts["row"].to_numpy(), column)), shape=(len(ids), len(names))
    )
    weights = weighted(counts, min_items=2)
    if weights.nnz == 0:
        raise InputError(
            f"{kg_file}: no two items of {link_file.name} share a fact; check that both files "
            "write entities the same way, or remove the modality"
        )
    announce("decompose")
    values, explained = decompose(weights, job.options["dim"], job.modality)
    return placed(list(ids), values, explained, svd_encoder("fact-svd"))
