from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from moekit.errors import BadConfig, BadData, NumericFault
from moekit.evaluation.documents import PerplexityResult
from moekit.evaluation.pairs import mcnemar, paired, sign_flip


def result(nll, tokens, domains=None):
    return PerplexityResult(domains=domains or ("x",) * len(nll), tokens=tuple(tokens), nll=tuple(nll))


def test_difference_and_error_by_hand():
    difference = paired([1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 5.0, 5.0])
    assert difference.mean == 1.0
    # Differences 1, 0, 2, 1: variance 2/3 over n = 4.
    assert difference.standard_error == pytest.approx(math.sqrt(2 / 3 / 4))
    assert difference.n == 4
    assert difference.low < 1 < difference.high
    assert difference.ratio is None
    assert paired([2.0, 2.0, 5.0, 5.0], [1.0, 2.0, 3.0, 4.0]).mean == -1.0, "b - a"


def test_perplexity_is_weighted_by_tokens_and_given_as_a_ratio():
    a, b = result([10.0, 30.0], [10, 30]), result([11.0, 36.0], [10, 30])
    difference = paired(a, b)
    assert difference.mean == pytest.approx(7 / 40)
    assert difference.ratio == pytest.approx(b.overall.perplexity / a.overall.perplexity)
    assert difference.ratio_low == pytest.approx(math.exp(difference.low))
    assert difference.ratio_low <= difference.ratio <= difference.ratio_high


def test_one_token_documents_contribute_nothing():
    long, longer = result([10.0, 30.0], [10, 30]), result([11.0, 36.0], [10, 30])
    padded, padded_too = result([10.0, 0.0, 30.0], [10, 0, 30]), result([11.0, 0.0, 36.0], [10, 0, 30])
    assert paired(padded, padded_too) == paired(long, longer)


def test_weights_give_the_weighted_mean():
    assert paired([0.0, 0.0], [1.0, 4.0], weights=[3, 1]).mean == pytest.approx(7 / 4)


def test_equal_models_differ_by_nothing_at_all():
    same = paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.mean, same.low, same.high, same.p_value, same.standard_error) == (0, 0, 0, 1, 0)
    assert not same.excludes_zero


def test_a_constant_shift_is_certain():
    shift = paired([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    assert (shift.mean, shift.low, shift.high) == (0.5, 0.5, 0.5)
    assert shift.excludes_zero


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    runs, covered, alone = 300, 0, 0
    for run in range(runs):
        size = rng.integers(50, 400, 40).astype(float)
        a = rng.normal(3.0, 0.5, 40)
        b = a + 0.02 + rng.normal(0, 0.05, 40)
        interval = paired(a, b, run, weights=size, resamples=499)
        covered += interval.low <= 0.02 <= interval.high
        alone += interval.p_value < 0.05
    assert 0.90 <= covered / runs <= 0.985
    assert alone / runs > 0.5, "an effect of 0.4 spreads is found more often than not with 40 pairs"


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_few_units_are_covered_as_often_as_is_said(n):
    rng = np.random.default_rng(n)
    runs, covered = 250, 0
    for run in range(runs):
        size = rng.integers(200, 400, n).astype(float)
        a = rng.normal(3.0, 0.5, n)
        interval = paired(a, a + 0.02 + rng.normal(0, 0.05, n), run, weights=size, resamples=199)
        covered += interval.low <= 0.02 <= interval.high
    # Three standard errors of 250 draws below 0.95.
    assert covered / runs >= 0.908


def test_three_units_have_the_interval_of_student_by_hand():
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t with 2 degrees of freedom 4.302653.
    difference = paired([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])
    margin = 4.302653 / math.sqrt(3)
    assert (difference.low, difference.high) == pytest.approx((2 - margin, 2 + margin), abs=1e-5)
    assert not difference.excludes_zero
    narrower = paired([0.0, 0.0, 0.0], [1.0, 2.0, 3.0], level=0.9)
    assert narrower.high == pytest.approx(2 + 2.919986 / math.sqrt(3), abs=1e-5)


def test_few_weighted_units_have_the_error_of_a_ratio():
    a, b, size = [0.0, 0.0, 0.0], [1.0, 2.0, 4.0], [1, 1, 2]
    difference = paired(a, b, weights=size)
    # Mean (1 + 2 + 8) / 4 = 2.75; residuals -1.75, -0.75, 2.5 of variance sum 9.875, times 3 / 2, over 4.
    margin = 4.302653 * math.sqrt(1.5 * 9.875) / 4
    assert (difference.low, difference.high) == pytest.approx((2.75 - margin, 2.75 + margin), abs=1e-5)


def test_an_interval_of_student_that_holds_zero_has_no_small_p_value():
    rng = np.random.default_rng(5)
    for n in (6, 7, 10, 19):
        for run in range(40):
            found = paired(np.zeros(n), 0.5 + rng.standard_t(3, n), run, resamples=199)
            if abs(found.mean) < stats.t.ppf(0.975, n - 1) * found.standard_error:
                assert not found.excludes_zero
                assert found.p_value >= 0.05, n


def test_many_units_keep_the_bootstrap_alone():
    rng = np.random.default_rng(6)
    skewed = rng.exponential(1.0, 30)
    found = paired(np.zeros(30), skewed)
    margin = stats.t.ppf(0.975, 29) * found.standard_error
    assert found.low > found.mean - margin, "skewed to the right: less room below"


def test_losses_beyond_what_exp_can_hold_give_a_finite_ratio():
    low, high = result([10.0, 20.0], [10, 10]), result([9000.0, 9500.0], [10, 10])
    up, down = paired(low, high), paired(high, low)
    assert up.ratio == math.exp(690)
    assert down.ratio == math.exp(-690)
    for found in (up, down):
        assert all(math.isfinite(r) for r in (found.ratio, found.ratio_low, found.ratio_high))


def test_p_values_are_uniform_without_an_effect():
    rng = np.random.default_rng(2)
    p = [sign_flip(rng.normal(0, 1, 12), resamples=999, seed=i) for i in range(300)]
    assert stats.kstest(p, "uniform").pvalue > 0.001
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.09


def test_few_units_are_tested_exactly():
    totals = np.array([0.5, -0.1, 0.7, 0.9, 0.2, 0.4])
    sums = [abs(np.dot(signs, totals)) for signs in itertools.product((1, -1), repeat=6)]
    exact = np.mean([s >= abs(totals.sum()) - 1e-12 for s in sums])
    assert sign_flip(totals) == pytest.approx(exact)


def test_seeds_repeat():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=50), rng.normal(size=50)
    assert paired(a, b, 1) == paired(a, b, 1)
    assert paired(a, b, 1) != paired(a, b, 2)


@pytest.mark.parametrize("values", [([0.0, 1.0], [1.0, 0.5]), ([0.0, 0.0, 0.0], [0.0, 0.0, 1.0])])
def test_very_few_units_still_give_a_finite_interval_around_the_mean(values):
    difference = paired(*values)
    assert math.isfinite(difference.low)
    assert math.isfinite(difference.high)
    assert difference.low <= difference.mean <= difference.high


def test_bad_pairs_are_refused():
    with pytest.raises(BadData, match="no pairs"):
        paired([1.0, 2.0], [1.0])
    with pytest.raises(BadData, match="no interval"):
        paired([1.0], [1.0])
    with pytest.raises(BadData, match="weight above zero"):
        paired([1.0, 2.0], [1.0, 2.0], weights=[1, 0])
    with pytest.raises(NumericFault):
        paired([1.0, 2.0], [1.0, float("nan")])
    with pytest.raises(BadConfig):
        paired([1.0, 2.0], [1.0, 2.0], level=95)
    with pytest.raises(BadConfig, match="different text"):
        paired(result([1.0, 1.0], [2, 2]), result([1.0, 1.0], [2, 3]))
    with pytest.raises(BadData, match="another one"):
        paired(result([1.0, 1.0], [2, 2]), [1.0, 2.0])


def test_other_text_of_the_same_domains_and_sizes_is_refused():
    one = result([1.0, 1.0], [2, 2]).model_copy(update={"digests": ("a", "b")})
    assert paired(one, one).mean == 0
    with pytest.raises(BadConfig, match="different text"):
        paired(one, one.model_copy(update={"digests": ("a", "c")}))
    with pytest.raises(BadConfig, match="which text"):
        paired(one, one.model_copy(update={"digests": ()}))


def test_mcnemar_by_hand():
    # 1 against 6 discordant: 2 * (C(7,0) + C(7,1)) / 2^7.
    a = [1] * 10 + [1] + [0] * 6 + [0] * 3
    b = [1] * 10 + [0] + [1] * 6 + [0] * 3
    test = mcnemar(a, b)
    assert (test.only_a, test.only_b) == (1, 6)
    assert test.p_value == pytest.approx(2 * (1 + 7) / 2**7)
    assert mcnemar([1, 0], [1, 0]).p_value == 1
    with pytest.raises(BadData, match="right"):
        mcnemar([0.5, 1], [1, 1])
    with pytest.raises(BadData, match="no pairs"):
        mcnemar([1, 1], [1])
