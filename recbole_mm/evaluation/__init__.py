"""Ranking metrics at a bounded memory, under RecBole's evaluator; results of single users.

RecBole's trainer asks for the scores of a batch of users, its collector ranks them, its evaluator
computes the metrics. Here the batch comes back ranked already (:class:`Ranked`), made in pieces
whose scores stay within ``eval_memory_mb``; :class:`Collector` hands RecBole's evaluator what it
expects. Every metric is RecBole's own, and equal to what RecBole gives wherever scores have no
ties; ties are drawn without bias (:mod:`recbole_mm.ops.ranking`).

- Full ranking of our models: vectors of users times chunks of the item table.
- Full ranking of RecBole's models: ``full_sort_predict`` for as many users as the memory allows;
  what a model allocates besides its scores is its own.
- Sampled candidates (``uni100``, ``pop100``): RecBole's path, which holds users x items; ties are
  drawn here too.
- Value metrics of context-aware models: RecBole's path, untouched.

Shapes: B users of a batch, N items, k length of the lists, P pairs of a row and a target.
"""

from recbole_mm.evaluation.collector import Collector, Evaluator
from recbole_mm.evaluation.per_user import PerUser, per_user
from recbole_mm.evaluation.ranker import Ranked, Ranker, rank

__all__ = ["Collector", "Evaluator", "PerUser", "Ranked", "Ranker", "per_user", "rank"]
