"""Tests of significance: values computed by hand, a planted difference, and no difference."""

import math

import numpy as np
import pytest
from scipy import stats

from recbole_mm.compare.significance import compare, corrected, holm


def of(values, reference=None):
    values = np.atleast_2d(np.asarray(values, float))
    reference = np.zeros((1, values.shape[1])) if reference is None else np.asarray(reference)
    return compare("ndcg@10", "row", "reference", values, reference)


def test_wilcoxon_equals_the_enumeration_of_all_signs():
    """Ranks 1 to 5 with one against: W- = 2, and 3 of 32 sign patterns have W- <= 2."""
    result = of([1.0, -2.0, 3.0, 4.0, 5.0])
    assert result.wilcoxon == pytest.approx(2 * 3 / 32)
    assert result.rank_biserial == pytest.approx((13 - 2) / 15)


def test_the_paired_t_test_is_the_textbook_one():
    """Differences 1, 2, 3: mean 2, sd 1, t = 2 sqrt(3) with 2 degrees of freedom."""
    result = of([1.0, 2.0, 3.0])
    t = 2 * math.sqrt(3)
    # the distribution of t with 2 degrees of freedom has a closed form
    assert result.t == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert result.effect == pytest.approx(2.0)
    half = 4.302653 / math.sqrt(3)  # t(.975, 2) = 4.302653
    assert (result.low, result.high) == pytest.approx((2 - half, 2 + half), rel=1e-6)


def test_a_mean_that_a_few_users_raise_while_most_lose_is_no_gain():
    """MRR: 250 users fall from rank 9 to 10, 40 rise from nothing to the first rank."""
    of_reference = np.repeat([1 / 9, 0.0], [250, 750])
    values = np.repeat([1 / 10, 1.0, 0.0], [250, 40, 710])
    (found,) = corrected([compare("mrr@10", "A", "B", values[None], of_reference[None])])
    assert max(found.t_holm, found.wilcoxon_holm) < 1e-6
    assert found.difference > 0 > found.rank_biserial
    assert not found.differs


def test_users_are_averaged_over_seeds_first():
    twice = of([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]], [[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    once = of([[2.0, 3.0, 4.0]], [[0.0, 1.0, 0.0]])
    assert twice.t == pytest.approx(once.t)
    assert twice.users == 3


def test_equal_differences_of_means_over_seeds_share_a_rank():
    """1 - 2/3 and 1/3 - 0 differ in the last digit; hits of three seeds are thirds."""
    generator = np.random.default_rng(0)
    hits, of_reference = generator.integers(2, size=(2, 3, 400))
    result = of(hits, of_reference)
    thirds = hits.sum(0) - of_reference.sum(0)  # exact
    assert result.wilcoxon == pytest.approx(stats.wilcoxon(thirds[thirds != 0]).pvalue, rel=1e-9)
    ranks = stats.rankdata(abs(thirds[thirds != 0]))
    favour = ranks[thirds[thirds != 0] > 0].sum() / ranks.sum()
    assert result.rank_biserial == pytest.approx(2 * favour - 1)


def test_welch_over_seeds_is_computed_by_hand():
    """Means 1, 2, 3 against 5, 7, 9: difference 5, variances 1 and 4, error sqrt(5/3)."""
    result = of([[1.0], [2.0], [3.0]], [[5.0], [7.0], [9.0]])
    # df = (1/3 + 4/3)^2 / ((1/3)^2 / 2 + (4/3)^2 / 2) = 50/17; two-sided p of |t| = 3.873
    assert result.seeds == pytest.approx(0.0315, abs=2e-4)
    assert math.isnan(of([[1.0]], [[2.0]]).seeds)


def test_models_without_any_spread_over_seeds_have_an_answer():
    same = of([[1.0, 2.0]] * 3, np.array([[1.0, 2.0]] * 3))
    assert (same.seeds, same.wilcoxon, same.t, same.effect) == (1.0, 1.0, 1.0, 0.0)
    assert of([[2.0, 2.0]] * 3, np.array([[1.0, 1.0]] * 3)).seeds == 0.0


def test_holm_multiplies_and_never_falls():
    """By hand: .01 x 4, .02 x 3, .03 x 2, and .04 x 1 < .06 before it."""
    given = np.array([0.04, 0.01, 0.03, 0.02])
    assert holm(given) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm(np.array([0.5, 0.9])) == pytest.approx([1.0, 1.0])


def test_what_has_no_test_does_not_count_in_the_correction():
    adjusted = holm(np.array([math.nan, 0.02, math.nan, 0.01]))
    assert adjusted[[1, 3]] == pytest.approx([0.02, 0.02])
    assert np.isnan(adjusted[[0, 2]]).all()


def table(generator, shifts, users=500, seeds=3):
    """Hits of a reference and of rows whose users hit more often by a shift."""
    strength = generator.uniform(0.05, 0.4, users)
    reference = generator.binomial(1, strength, (seeds, users)).astype(float)
    return corrected(
        [
            of(generator.binomial(1, strength + s, (seeds, users)).astype(float), reference)
            for s in shifts
        ]
    )


def test_a_planted_difference_is_found_and_only_that():
    nothing, much = table(np.random.default_rng(0), (0.0, 0.15))
    assert much.differs
    assert much.difference == pytest.approx(0.15, abs=0.05)
    assert much.low > 0
    assert not nothing.differs


def test_no_difference_is_called_significant_in_at_most_5_of_100_tables():
    generator = np.random.default_rng(1)
    called = [any(c.differs for c in table(generator, (0.0,) * 4)) for _ in range(100)]
    assert sum(called) <= 5


def test_no_difference_over_seeds_is_called_significant_in_at_most_5_of_100_tables():
    """Each seed is a model of its own: its quality varies more than the users say."""
    generator = np.random.default_rng(2)

    def seeds():
        return generator.normal(0.1, 0.01, (3, 1)) + generator.normal(0, 0.2, (3, 300))

    called = []
    for _ in range(100):
        reference = seeds()
        rows = corrected([of(seeds(), reference) for _ in range(4)])
        called.append(any(c.differs_over_seeds for c in rows))
    assert sum(called) <= 5


def test_rows_over_other_users_are_refused():
    with pytest.raises(ValueError, match="not over the same users"):
        of([[1.0, 2.0]], np.zeros((1, 3)))
