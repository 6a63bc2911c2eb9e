"""Checkers of chapter ten_times_faster, "Ten times faster?"."""

import math

import numpy as np

from deformable_detr.evaluation.intervals import difference
from deformable_detr.exercises import checks, expect


@checks("ten_times_faster.1")
def check_choose(choose):
    yield "one seed per rate"
    one = {1e-3: [(0.2, 0.3)], 5e-4: [(0.4, 0.1)]}
    rate, test = choose(one)
    expect(rate, 5e-4, "choose on val, which comes first")
    expect(list(test), [0.1], "report test")
    yield "the best mean, not the best seed"
    several = {1e-3: [(0.5, 0.4), (0.1, 0.2)], 5e-4: [(0.4, 0.3), (0.35, 0.35)]}
    rate, test = choose(several)
    expect(rate, 5e-4, "the mean over seeds decides")
    expect(list(test), [0.3, 0.35], "every seed's value, in order")
    yield "rates with different numbers of seeds"
    rate, _ = choose({1e-3: [(0.3, 0.0)] * 3, 5e-4: [(0.5, 0.0)]})
    expect(rate, 5e-4, "a mean, not a sum")


@checks("ten_times_faster.2")
def check_steps_to_reach(steps_to_reach):
    steps = [100, 200, 300, 400]
    yield "between two evaluations"
    expect(steps_to_reach(steps, [0.1, 0.2, 0.4, 0.5], 0.3), 250.0)
    yield "a curve that goes down in between"
    values = [0.1, 0.3, 0.2, 0.5]
    expect(steps_to_reach(steps, values, 0.25), 175.0, "the first time counts")
    falling = [0.1, 0.4, 0.1, 0.2]
    expect(steps_to_reach(steps, falling, 0.25), 150.0, "np.interp needs rising values")
    dips = [0.2, 0.1, 0.4, 0.5]
    expect(steps_to_reach(steps, dips, 0.25), 250.0, "from the value just before, not the best")
    yield "before the first evaluation"
    expect(steps_to_reach(steps, values, 0.05), 50.0, "from step 0 with value 0")
    yield "exactly at an evaluation"
    expect(steps_to_reach(steps, values, 0.3), 200.0)
    expect(steps_to_reach(steps, values, 0.5), 400.0, "reached, not passed")
    yield "never"
    expect(steps_to_reach(steps, values, 0.6), math.inf, "math.inf, not the last step")


@checks("ten_times_faster.3")
def check_factor(factor):
    slow, fast = [900.0, 1400.0, 1100.0], [80.0, 120.0, 95.0, 70.0, 105.0]
    gap = difference(np.log(slow), np.log(fast))
    middle, low, high = np.exp([gap.mean, gap.low, gap.high])
    yield "the factor"
    expect(factor(slow, fast)[0], middle, "the mean of logarithms, and the exponential")
    yield "its interval"
    given = factor(slow, fast)
    expect(given[1], low, "Welch's interval of the logarithms", rtol=1e-4)
    expect(given[2], high, "Welch's interval of the logarithms", rtol=1e-4)
    yield "the other way round"
    expect(np.array(factor(fast, slow)), 1 / np.array([middle, high, low]), rtol=1e-4)
    yield "seeds that agree"
    expect(np.array(factor([300.0, 300.0], [30.0, 30.0])), np.full(3, 10.0), "no error, no width")


def _choose(key=None, column=0):
    def choose(runs):
        rate = max(runs, key=lambda rate: (key or np.mean)([pair[column] for pair in runs[rate]]))
        return rate, [test for _, test in runs[rate]]

    return choose


def _last_time(steps, values, target):
    steps, values = [0, *steps], [0.0, *values]
    for i in range(len(steps) - 1, 0, -1):
        if values[i - 1] < target <= values[i]:
            share = (target - values[i - 1]) / (values[i] - values[i - 1])
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return math.inf


def _first_time(steps, values, target):
    steps, values = [0, *steps], [0.0, *values]
    i = next(i for i, value in enumerate(values) if value >= target)
    share = (target - values[i - 1]) / (values[i] - values[i - 1])
    return steps[i - 1] + share * (steps[i] - steps[i - 1])


def _no_interpolation(steps, values, target):
    return next((s for s, v in zip(steps, values, strict=True) if v >= target), math.inf)


def _best_so_far(steps, values, target):
    reached = max(values) >= target
    return _first_time(steps, np.maximum.accumulate(values), target) if reached else math.inf


def _above(steps, values, target):
    reached = max(values) > target
    return _first_time(steps, values, target) if reached else math.inf


def _interpolated(steps, values, target):
    return float(np.interp(target, [0.0, *values], [0, *steps]))


def _factor(pairs=False, normal=False, logs=True):
    def factor(slow, fast):
        if pairs:
            ratios = np.log(np.divide.outer(slow, fast).ravel())
            half = 2 * ratios.std(ddof=1) / math.sqrt(len(ratios))
            return tuple(np.exp([ratios.mean(), ratios.mean() - half, ratios.mean() + half]))
        if not logs:
            middle = np.mean(slow) / np.mean(fast)
            return middle, middle, middle
        gap = difference(np.log(slow), np.log(fast))
        half = gap.high - gap.mean
        if normal:
            x, y = np.log(slow), np.log(fast)
            half = 1.96 * math.sqrt(x.var(ddof=1) / len(x) + y.var(ddof=1) / len(y))
        return tuple(np.exp([gap.mean, gap.mean - half, gap.mean + half]))

    return factor


WRONG = {
    "ten_times_faster.1": [
        ("chosen on test", _choose(column=1)),
        ("chosen by the best seed", _choose(max)),
        ("a sum in place of a mean", _choose(sum)),
    ],
    "ten_times_faster.2": [
        ("the last time", _last_time),
        ("no interpolation", _no_interpolation),
        ("np.interp on values that fall", _interpolated),
        ("the best value so far", _best_so_far),
        ("above the target, not at it", _above),
    ],
    "ten_times_faster.3": [
        ("all pairs as measurements", _factor(pairs=True)),
        ("1.96 in place of Student's t", _factor(normal=True)),
        ("a ratio of means", _factor(logs=False)),
    ],
}
