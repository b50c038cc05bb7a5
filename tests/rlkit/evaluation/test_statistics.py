from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.evaluation.statistics import (
    accuracy_interval,
    avg_at_k,
    holm_correction,
    mean_interval,
    paired_permutation_test,
    pass_at_k,
)

UNIT = st.floats(0, 1, allow_nan=False)


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(nck):
    n, c, k = nck
    subsets = list(combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]))


def test_pass_at_k_does_not_overflow():
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_rejects_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="pass@k"):
        pass_at_k(n, c, k)


def test_avg_at_k_is_the_mean_of_the_first_k():
    assert avg_at_k([1.0, 0.0, 0.0, 0.0], 2) == 0.5
    with pytest.raises(ValueError, match="avg@k"):
        avg_at_k([1.0], 2)


def test_accuracy_interval_is_wilson_for_binary_scores():
    # Wilson's interval for 8 of 10: R, prop.test(8, 10, correct = FALSE).
    interval = accuracy_interval([1.0] * 8 + [0.0] * 2)
    assert (interval.mean, interval.n) == (0.8, 10)
    assert (interval.low, interval.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_accuracy_interval_is_student_t_for_graded_scores():
    # 0.5 ± t(0.975, 3 degrees of freedom) * sd / sqrt(4) = 0.5 ± 3.182446 * 0.1020621
    interval = accuracy_interval([0.25, 0.5, 0.75, 0.5])
    assert (interval.low, interval.high) == pytest.approx((0.175193, 0.824807), abs=1e-6)


def test_accuracy_interval_of_too_few_tasks_is_nan():
    assert np.isnan([accuracy_interval([]).mean, accuracy_interval([0.5]).low]).all()
    assert accuracy_interval([0.5]).mean == 0.5
    assert accuracy_interval([1.0]).low < 1.0  # Wilson's interval exists even for one task


@given(st.lists(UNIT, min_size=2, max_size=30))
def test_accuracy_interval_contains_the_mean_and_stays_in_bounds(values):
    interval = accuracy_interval(values)
    assert -1e-9 <= interval.low <= interval.mean + 1e-9
    assert interval.mean - 1e-9 <= interval.high <= 1 + 1e-9


def test_student_interval_covers_the_mean_95_times_in_100():
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.binomial(8, 0.4, size=40) / 8, (0, 1)) for _ in range(1000)]
    assert np.mean([i.low <= 0.4 <= i.high for i in intervals]) == pytest.approx(0.95, abs=0.02)


def test_permutation_test_enumerates_few_differences():
    # All five differ by +1: 2 of the 32 sign flips are as extreme. Tasks without a difference do not count.
    assert paired_permutation_test([0] * 8, [1] * 5 + [0] * 3) == 2 / 32
    # 4 up and 1 down: |sum| >= 3 for 2 * (1 + 5) of 32 flips.
    assert paired_permutation_test([0, 0, 0, 0, 1], [1, 1, 1, 1, 0]) == 12 / 32


def test_permutation_test_samples_many_differences():
    # scipy counts each tail with (count + 1) / (resamples + 1), and doubles the smaller.
    assert paired_permutation_test(np.zeros(50), np.ones(50), resamples=999) == pytest.approx(2 / 1000)
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 200))
    assert paired_permutation_test(a, b, seed=1) == paired_permutation_test(a, b, seed=1)
    assert paired_permutation_test(a, a) == 1.0


def test_permutation_test_rarely_rejects_a_true_null():
    rng = np.random.default_rng(1)
    ps = [paired_permutation_test(rng.random(30), rng.random(30), resamples=199) for _ in range(300)]
    assert np.mean(np.array(ps) <= 0.05) == pytest.approx(0.05, abs=0.035)


@given(st.lists(st.tuples(UNIT, UNIT), min_size=1, max_size=8))
def test_permutation_test_is_symmetric(pairs):
    a, b = np.array(pairs).T
    assert paired_permutation_test(a, b) == pytest.approx(paired_permutation_test(b, a))


@pytest.mark.parametrize("a, b", [([1.0], [1.0, 2.0]), ([], []), ([np.nan], [1.0])])
def test_permutation_test_rejects_scores_that_do_not_pair(a, b):
    with pytest.raises(ValueError, match="paired"):
        paired_permutation_test(a, b)


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.02, 0.03, 0.04], [0.04, 0.06, 0.06, 0.06]),
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # Wikipedia's example
        ([0.5, 0.9, 1.0], [1.0, 1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([0, 1], [0, 1]),
    ],
)
def test_holm_correction_of_known_values(p_values, corrected):
    """The values are those of R's p.adjust(p, "holm")."""
    assert holm_correction(p_values) == pytest.approx(corrected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_correction_is_monotone_and_between_no_correction_and_bonferronis(p_values):
    corrected = holm_correction(p_values)
    for p, q in zip(p_values, corrected, strict=True):
        assert p <= q <= 1
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [corrected[i] for i in order] == sorted(corrected)
    assert corrected[order[0]] == min(1, p_values[order[0]] * len(p_values))


def test_holm_correction_rejects_what_is_no_probability():
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        holm_correction([0.5, float("nan")])
