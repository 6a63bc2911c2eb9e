"""How sure a mean over few repeats is, and what a comparison of two may claim."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student


@dataclass(frozen=True)
class Interval:
    """A mean, and the ends of the interval that holds the true one with 95 % confidence.

    Of one repeat the ends are NaN: it says nothing about others.
    """

    mean: float
    low: float
    high: float
    repeats: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f}, n = {self.repeats})"


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of repeats that differ by chance, such as seeds, with Student's t interval.

    values: finite, at least one. ValueError otherwise.
    """
    values = _finite(values, at_least=1)
    mean, n = float(values.mean()), len(values)
    if n == 1:
        return Interval(mean, math.nan, math.nan, n)
    half = student.ppf((1 + confidence) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n)
    return Interval(mean, mean - float(half), mean + float(half), n)


def difference(
    ours: Sequence[float], theirs: Sequence[float], confidence: float = 0.95
) -> Interval:
    """Welch's interval of mean(ours) - mean(theirs), whose variances may differ.

    Both finite, with at least two values each; ValueError otherwise. repeats: the smaller number.
    """
    a, b = _finite(ours, at_least=2), _finite(theirs, at_least=2)
    errors = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    mean, error = float(a.mean() - b.mean()), math.sqrt(sum(errors))
    if error == 0:
        return Interval(mean, mean, mean, min(len(a), len(b)))
    freedom = sum(errors) ** 2 / (errors[0] ** 2 / (len(a) - 1) + errors[1] ** 2 / (len(b) - 1))
    half = float(student.ppf((1 + confidence) / 2, freedom)) * error
    return Interval(mean, mean - half, mean + half, min(len(a), len(b)))


def verdict(ours: Sequence[float], theirs: Sequence[float], digits: int = 3) -> str:
    """What repeats show: "better by a to b", "worse by a to b" or "no difference larger than c".

    An ordering is claimed only where the interval of the difference leaves out zero; otherwise c is
    its end that is farther from zero: a larger difference, of either sign, would not fit.
    """
    return in_words(difference(ours, theirs), digits)


def in_words(found: Interval, digits: int = 3) -> str:
    """What `verdict` says of the interval of a difference, of pairs too."""
    low, high = sorted(map(abs, (found.low, found.high)))
    if found.low > 0 or found.high < 0:
        word = "better" if found.low > 0 else "worse"
        return f"{word} by {low:.{digits}f} to {high:.{digits}f}"
    return f"no difference larger than {high:.{digits}f}"


def _finite(values: Sequence[float], at_least: int) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or len(array) < at_least or not np.isfinite(array).all():
        raise ValueError(f"expected at least {at_least} finite values, got {list(values)}")
    return array
