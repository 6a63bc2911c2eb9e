"""Checkers of chapter what_matters, "What matters"."""

import math

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from deformable_detr.evaluation.intervals import difference, interval
from deformable_detr.exercises import checks, expect

APART = np.array([0.1, 0.9, 0.4, 0.7, 0.2])  # of seeds that differ a lot


def _expect_row(given, ours, theirs, confidence=0.95, hint=""):
    found = interval(np.subtract(ours, theirs), confidence)
    expect(float(given[0]), found.low, hint)
    expect(float(given[1]), found.high, hint)
    word = "better" if found.low > 0 else "worse" if found.high < 0 else "open"
    expect(given[2], word, "better or worse only where zero is outside")


@checks("what_matters.1")
def check_paired(paired):
    yield "three differences"
    _expect_row(paired([0.2, 0.4, 0.9], [0.0, 0.0, 0.0]), [0.2, 0.4, 0.9], [0.0] * 3, hint="ddof=1")
    yield "pairs that move together"
    shift = np.array([0.02, 0.03, 0.025, 0.02, 0.03])
    for sign in (1, -1):
        ours = APART + sign * shift
        hint = "the spread of the differences, not of the two lists"
        _expect_row(paired(list(ours), list(APART)), ours, APART, hint=hint)
    yield "another confidence"
    ours = APART + np.array([0.3, -0.05, 0.2, 0.15, 0.25])
    for confidence in (0.5, 0.95, 0.99):
        given = paired(list(ours), list(APART), confidence)
        _expect_row(given, ours, APART, confidence, "half of what is left out is on each side")


@checks("what_matters.2")
def check_enough_seeds(enough_seeds):
    yield "a small effect"
    expect(int(enough_seeds(0.1, 1.0)), 387, "t falls as n grows: try n after n")
    yield "large effects"
    expect(int(enough_seeds(1.0, 1.0)), 7, "with few seeds t is much larger than 1.96")
    expect(int(enough_seeds(100.0, 1.0)), 2, "no spread is known from one seed")
    expect(int(enough_seeds(0.02, 0.02)), 7, "only the ratio of effect and spread counts")
    yield "another confidence"
    expect(int(enough_seeds(1.0, 1.0, 0.99)), 11)


@checks("what_matters.3")
def check_ablate(ablate):
    calls = []

    def train(seed, lift=0.0, noise=0.0):
        calls.append((seed, lift, noise))
        luck = math.sin(12.9 * seed)  # of the seed, shared by all rows
        return luck + lift + noise * math.sin(7.7 * seed + 1)

    changes = {
        "up": {"lift": 0.2, "noise": 0.05},
        "down": {"lift": -0.2, "noise": 0.05},
        "noise": {"noise": 0.3},
        "hardly": {"lift": 0.058, "noise": 0.05},
    }
    seeds = [3, 4, 5, 6, 8]
    rows = ablate(train, changes, seeds)
    yield "a row for each change, with the right word"
    expect(list(rows), list(changes))
    expect([rows[name][2] for name in ("up", "down", "noise")], ["better", "worse", "open"])
    yield "the base is trained once per seed, and every row with the same seeds"
    expect(len(calls), (len(changes) + 1) * len(seeds), "train(seed) once per seed, not per row")
    expect({seed for seed, _, _ in calls}, set(seeds))
    yield "a stricter confidence where there are more rows"
    base = [train(seed) for seed in seeds]
    for number in (1, 4):
        chosen = dict(list(changes.items())[-number:])
        rows = ablate(train, chosen, seeds)
        for name, options in chosen.items():
            ours = [train(seed, **options) for seed in seeds]
            hint = "a row's confidence is 1 - 0.05 / rows"
            _expect_row(rows[name], ours, base, 1 - 0.05 / number, hint)
    yield "a confidence of one's own"
    found = ablate(train, {"up": changes["up"]}, seeds, confidence=0.5)["up"]
    ours = [train(seed, **changes["up"]) for seed in seeds]
    _expect_row(found, ours, base, 0.5)


def _word(low, high):
    return low, high, "better" if low > 0 else "worse" if high < 0 else "open"


def _paired(ddof=1, normal=False, sided=2, words=_word):
    """The interval with one thing wrong."""

    def paired(ours, theirs, confidence=0.95):
        d, n = np.subtract(ours, theirs), len(ours)
        level = 1 - (1 - confidence) / sided
        t = norm.ppf(level) if normal else student.ppf(level, n - 1)
        half = t * d.std(ddof=ddof) / math.sqrt(n)
        return words(d.mean() - half, d.mean() + half)

    return paired


def _welch(ours, theirs, confidence=0.95):
    found = difference(ours, theirs, confidence)
    return _word(found.low, found.high)


def _always_a_word(low, high):
    return low, high, "better" if low + high > 0 else "worse"


def _ablate(again=False, strict=True, other_seeds=False):
    def ablate(train, changes, seeds, confidence=0.95):
        each = 1 - (1 - confidence) / (len(changes) if strict else 1)
        base, rows = [train(seed) for seed in seeds], {}
        for name, options in changes.items():
            if again:
                base = [train(seed) for seed in seeds]
            own = [seed + 100 for seed in seeds] if other_seeds else seeds
            found = interval(np.subtract([train(s, **options) for s in own], base), each)
            rows[name] = _word(found.low, found.high)
        return rows

    return ablate


WRONG = {
    "what_matters.1": [
        ("two groups instead of pairs", _welch),
        ("the normal distribution", _paired(normal=True)),
        ("ddof=0", _paired(ddof=0)),
        ("all of the error on one side", _paired(sided=1)),
        ("a word at any price", _paired(words=_always_a_word)),
    ],
    "what_matters.2": [
        ("1.96 for t", lambda e, s, c=0.95: max(2, math.ceil((1.96 * s / e) ** 2))),
        (
            "the confidence is ignored",
            lambda e, s, c=0.95: next(
                n for n in range(2, 999) if student.ppf(0.975, n - 1) * s <= e * math.sqrt(n)
            ),
        ),
        (
            "n degrees of freedom",
            lambda e, s, c=0.95: next(
                n for n in range(2, 999) if student.ppf((1 + c) / 2, n) * s <= e * math.sqrt(n)
            ),
        ),
    ],
    "what_matters.3": [
        ("the base anew for each row", _ablate(again=True)),
        ("no Bonferroni", _ablate(strict=False)),
        ("other seeds than the base's", _ablate(other_seeds=True)),
    ],
}
