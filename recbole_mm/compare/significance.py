"""Are two rows of a table different? Paired over users, and over seeds.

Over users: the values of a user are averaged over the seeds of a row, and the differences of all
users are tested by Wilcoxon's signed-rank test and by the paired t test, both two-sided. This says
whether *these trained models* differ for more users like these.

Over seeds: the means of the seeds are compared by Welch's t test: another seed is another model,
and nothing pairs seed 1 of one with seed 1 of the other. This says whether *training again* would
show the difference. With one seed a row there is no such test.

p values of each test are corrected by Holm over all comparisons of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

ALPHA = 0.05
_SAME = 1e-12  # means of the same numbers, summed in another order


@dataclass(frozen=True)
class Comparison:
    """One row against its reference, in one metric.

    Attributes:
        metric: Such as ``ndcg@10``.
        row: Label of the row.
        reference: Label of what it is measured against.
        users: Number of paired users.
        difference: Mean over users of row minus reference.
        low: Lower end of the 95 % confidence interval of the difference (t, over users).
        high: Upper end.
        effect: Cohen's d of paired differences: their mean over their standard deviation.
        rank_biserial: Matched-pairs rank-biserial correlation, in [-1, 1], the effect size that
            goes with Wilcoxon's test: share of rank sums in favour minus share against.
        wilcoxon: p of Wilcoxon's signed-rank test; users without a difference are left out.
        wilcoxon_holm: The same, corrected.
        t: p of the paired t test.
        t_holm: The same, corrected.
        seeds: p of Welch's t test between the means of the seeds; NaN with fewer than two.
        seeds_holm: The same, corrected.
    """

    metric: str
    row: str
    reference: str
    users: int
    difference: float
    low: float
    high: float
    effect: float
    rank_biserial: float
    wilcoxon: float
    wilcoxon_holm: float
    t: float
    t_holm: float
    seeds: float
    seeds_holm: float

    @property
    def differs(self) -> bool:
        """Whether both tests over users, corrected, say so, and in the same direction.

        A few users who gain much can raise a mean where most lose a little.
        """
        agree = self.difference * self.rank_biserial > 0
        return agree and max(self.wilcoxon_holm, self.t_holm) < ALPHA

    @property
    def differs_over_seeds(self) -> bool:
        """Whether Welch's test over seeds, corrected, says so."""
        return self.seeds_holm < ALPHA


COLUMNS = tuple(field.name for field in fields(Comparison))


def compare(
    metric: str,
    row: str,
    reference: str,
    values: NDArray[np.float64],
    of_reference: NDArray[np.float64],
) -> Comparison:
    """Test one row against another; p values are not corrected yet.

    Args:
        metric: Name, for the result.
        row: Label, for the result.
        reference: Label, for the result.
        values: ``(S, U)``, a value for each seed and user of the row.
        of_reference: ``(S', U)``, the same for the reference, over the same users.

    Raises:
        ValueError: If the two are not over the same number of users.
    """
    if values.ndim != 2 or of_reference.ndim != 2 or values.shape[1] != of_reference.shape[1]:
        raise ValueError(f"not over the same users: {values.shape} and {of_reference.shape}")
    # equal differences of means over seeds differ in the last digit, and would not share a rank
    difference = np.round(values.mean(axis=0) - of_reference.mean(axis=0), 12)
    n = len(difference)
    mean = float(difference.mean())
    sd = float(difference.std(ddof=1)) if n > 1 else 0.0
    half = float(stats.t.ppf(0.975, n - 1)) * sd / np.sqrt(n) if n > 1 else np.nan
    wilcoxon, rank_biserial = _signed_ranks(difference)
    t = _p_of(mean, sd / np.sqrt(n), n - 1) if n > 1 else np.nan
    seeds = _welch(values.mean(axis=1), of_reference.mean(axis=1))
    return Comparison(
        metric,
        row,
        reference,
        users=n,
        difference=mean,
        low=float(mean - half),
        high=float(mean + half),
        effect=mean / sd if sd else (0.0 if mean == 0 else float(np.copysign(np.inf, mean))),
        rank_biserial=rank_biserial,
        wilcoxon=wilcoxon,
        wilcoxon_holm=wilcoxon,
        t=t,
        t_holm=t,
        seeds=seeds,
        seeds_holm=seeds,
    )


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with their p values corrected by Holm, each test for itself."""
    wilcoxon = holm(np.array([c.wilcoxon for c in comparisons]))
    t = holm(np.array([c.t for c in comparisons]))
    seeds = holm(np.array([c.seeds for c in comparisons]))
    return [
        replace(c, wilcoxon_holm=float(p), t_holm=float(q), seeds_holm=float(r))
        for c, p, q, r in zip(comparisons, wilcoxon, t, seeds, strict=True)
    ]


def holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's step-down correction: the family-wise error stays below the level.

    The smallest of m p values is multiplied by m, the next by m - 1, and so on; none becomes
    smaller than one before it or larger than 1. NaN is no test and does not count.
    """
    adjusted = p.astype(np.float64).copy()
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    return adjusted


def _signed_ranks(difference: NDArray[np.float64]) -> tuple[float, float]:
    """Wilcoxon's p, and the rank-biserial correlation."""
    other = difference[difference != 0]
    if not len(other):
        return 1.0, 0.0
    ranks = stats.rankdata(np.abs(other))
    favour = float(ranks[other > 0].sum() / ranks.sum())
    return float(stats.wilcoxon(other).pvalue), 2 * favour - 1


def _p_of(mean: float, error: float, df: float) -> float:
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, df))


def _welch(one: NDArray[np.float64], two: NDArray[np.float64]) -> float:
    if min(len(one), len(two)) < 2:
        return float("nan")
    if max(np.ptp(one), np.ptp(two)) < _SAME:  # no seed decides anything
        return 1.0 if abs(one[0] - two[0]) < _SAME else 0.0
    parts = [v for means in (one, two) for v in (means.mean(), means.std(ddof=1), len(means))]
    return float(stats.ttest_ind_from_stats(*parts, equal_var=False).pvalue)
