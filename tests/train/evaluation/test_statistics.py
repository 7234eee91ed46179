import math

import numpy as np
import pytest

from med3dvlm.train.evaluation.statistics import bootstrap_interval, describe_answers


def test_interval_of_independent_values_is_that_of_the_normal_approximation():
    values = np.random.default_rng(0).random(400) < 0.3
    low, high = bootstrap_interval(values.astype(float))
    mean = values.mean()
    half = 1.96 * math.sqrt(mean * (1 - mean) / 400)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.01)


@pytest.mark.parametrize("level, ends", [(0.95, [0.025, 0.975]), (0.8, [0.1, 0.9])])
def test_the_interval_holds_that_share_of_the_means_of_resampled_values(level, ends):
    values = np.random.default_rng(5).normal(size=40)
    draws = np.random.default_rng(0).integers(40, size=(2000, 40))
    expected = np.quantile(values[draws].mean(axis=1), ends)
    options = {} if level == 0.95 else {"level": level}  # 95 % by default
    assert bootstrap_interval(values, **options) == pytest.approx(expected, rel=1e-9)


def test_questions_about_one_case_count_as_one():
    values = np.repeat(np.random.default_rng(1).random(50) < 0.5, 10).astype(float)
    cases = np.repeat(np.arange(50), 10).tolist()
    narrow, wide = bootstrap_interval(values), bootstrap_interval(values, cases)
    ratio = (wide[1] - wide[0]) / (narrow[1] - narrow[0])
    assert ratio == pytest.approx(math.sqrt(10), rel=0.15)


def test_cases_of_unequal_size_weigh_by_their_questions():
    low, high = bootstrap_interval([1.0, 0.0, 0.0, 0.0], ["a", "b", "b", "b"])
    assert (low, high) == (0.0, 1.0)  # one case drawn twice
    assert bootstrap_interval([0.25] * 7, list("aabbbcc")) == (0.25, 0.25)


def test_scores_that_are_all_equal_end_at_the_exact_bound():
    low, high = bootstrap_interval([1.0] * 10, [row // 2 for row in range(10)])  # 5 clusters
    assert (low, high) == (pytest.approx(0.4782, abs=1e-4), 1.0)
    assert low**5 == pytest.approx(0.025)  # what five hits in a row have, where the share is that
    assert bootstrap_interval([0.0] * 5) == (0.0, pytest.approx(1 - low))
    assert bootstrap_interval([1.0] * 10, list(range(10)), [0, 1] * 5)[0] == pytest.approx(0.025**0.1)
    assert bootstrap_interval([1.0] * 5, level=0.8)[0] == pytest.approx(0.1**0.2)
    assert bootstrap_interval([0.0] * 5, are_scores=False) == (0.0, 0.0)
    assert bootstrap_interval([-1.0] * 5) == (-1.0, -1.0)


def test_draws_are_those_of_the_gathered_clusters():
    generator = np.random.default_rng(8)
    values, cases, types = generator.random(90), generator.integers(0, 30, 90), generator.integers(0, 3, 90)
    rows = {case: row for row, case in enumerate(dict.fromkeys(cases.tolist()))}
    sums, sizes = np.zeros((len(rows), 3)), np.zeros((len(rows), 3))
    for value, case, kind in zip(values, cases.tolist(), types):
        sums[rows[case], kind] += value
        sizes[rows[case], kind] += 1
    draws, means = np.random.default_rng(0), []
    for _ in range(20):
        drawn = draws.integers(len(rows), size=(100, len(rows)))
        means.append(np.nanmean(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), axis=1))
    expected = np.quantile(np.concatenate(means), [0.025, 0.975])
    assert bootstrap_interval(values, cases.tolist(), types.tolist()) == pytest.approx(expected, abs=1e-12)


def test_the_same_seed_gives_the_same_interval_and_no_values_give_none():
    values = np.random.default_rng(2).random(30).tolist()
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, level=0.5)[0] > bootstrap_interval(values, level=0.99)[0]
    assert all(map(math.isnan, bootstrap_interval([])))


def test_one_case_has_no_interval():
    assert all(map(math.isnan, bootstrap_interval([0.0, 1.0, 1.0], ["a", "a", "a"])))
    assert all(map(math.isnan, bootstrap_interval([0.5])))
    assert bootstrap_interval([0.0, 1.0], ["a", "b"]) == (0.0, 1.0)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="`level` must lie between 0 and 1, got 95"):
        bootstrap_interval([1.0], level=95)
    with pytest.raises(ValueError, match="a cluster for each of 2 values, got 1"):
        bootstrap_interval([1.0, 0.0], ["a"])
    with pytest.raises(ValueError, match="got none"):
        describe_answers([])


def test_collapse_is_seen():
    collapsed = describe_answers(["No abnormality is seen here."] * 3 + [""])
    assert collapsed["distinct_share"] == 0.5 and collapsed["most_common_share"] == 0.75
    assert collapsed["empty_share"] == 0.25 and collapsed["repetition"] == 0
    assert collapsed["mean_words"] == 15 / 4
    # 8 words have 5 runs of 4; "a b a b a b a b" has two different ones.
    assert describe_answers(["a b a b a b a b", "one two"])["repetition"] == pytest.approx((1 - 2 / 5) / 2)
