"""What repeats allow to say: intervals worked by hand, and verdicts that need them."""

import math

import numpy as np
import pytest

from deformable_detr.evaluation.intervals import difference, interval, verdict


def test_an_interval_by_hand():
    """Of 1, 2, 3: standard error 1 / sqrt(3), and t = 4.303 for two degrees of freedom."""
    found = interval([1, 2, 3])
    assert found.mean == 2 and found.repeats == 3
    assert found.high - 2 == 2 - found.low == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)


def test_one_repeat_says_nothing_about_others():
    found = interval([0.5])
    assert found.mean == 0.5 and math.isnan(found.low) and math.isnan(found.high)


def test_intervals_hold_the_true_mean_as_often_as_they_say():
    draws = np.random.default_rng(0).normal(size=(2000, 3))
    held = [found.low < 0 < found.high for found in map(interval, draws)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_a_difference_by_hand():
    """Welch: errors 1/3 and 4/3, 2.94 degrees of freedom, of which t is 3.218."""
    found = difference([10, 11, 12], [1, 3, 5])
    assert found.mean == 8
    assert found.high - 8 == pytest.approx(3.2182 * math.sqrt(5 / 3), abs=1e-3)


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ([0.50, 0.51, 0.52], [0.30, 0.31, 0.32], "better by 0.177 to 0.223"),
        ([0.30, 0.31, 0.32], [0.50, 0.51, 0.52], "worse by 0.177 to 0.223"),
        ([0.30, 0.31, 0.32], [0.30, 0.31, 0.32], "no difference larger than 0.023"),
        ([0.5, 0.5], [0.4, 0.4], "better by 0.100 to 0.100"),
    ],
)
def test_verdicts(ours, theirs, said):
    assert verdict(ours, theirs) == said


def test_an_ordering_is_not_claimed_where_intervals_leave_it_open():
    """Each of ours is better than its neighbour, and yet chance could have done it."""
    assert verdict([0.31, 0.41], [0.30, 0.40]).startswith("no difference larger than 0.")


@pytest.mark.parametrize("values", [[], [0.1, math.nan], [[0.1, 0.2]]])
def test_what_is_no_list_of_numbers_is_refused(values):
    with pytest.raises(ValueError, match="at least 1 finite values"):
        interval(values)


def test_a_comparison_needs_repeats_of_both():
    with pytest.raises(ValueError, match="at least 2 finite values"):
        verdict([0.5], [0.4, 0.5])
