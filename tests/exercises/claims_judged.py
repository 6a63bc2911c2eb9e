"""Checkers of chapter claims_judged, "The claims, judged"."""

import math

from deformable_detr.exercises import checks, expect

ROWS = [
    {"model": "A", "epochs": 500, "params": 41, "ap": 42.0, "small": 20.5, "large": 61.1},
    {"model": "B", "epochs": 50, "params": 40, "ap": 43.8, "small": 26.4, "large": 58.0},
    {"model": "C", "epochs": 50, "params": 41, "ap": 46.9, "small": 29.6, "large": 61.6},
    {"model": "D", "epochs": 36, "params": 47, "ap": 46.9, "small": 27.0, "large": 62.0},
]

EXAMPLES = ((14, 14, 7, 7, 384, 5), (6, 10, 3, 5, 8, 3))


@checks("claims_judged.1")
def check_overhead(overhead):
    yield "the multiply-adds"
    added, _ = overhead(14, 14, 7, 7, 384, 5)
    expect(added, 27 * 49 * 384, "(k * k + 2) for each sampled point and channel")
    expect(overhead(6, 10, 3, 5, 8, 3)[0], 11 * 15 * 8, "points of the keys' grid, not pixels")
    yield "their share of the whole module"
    for height, width, rows, columns, channels, kernel in EXAMPLES:
        pixels, keys = height * width, rows * columns
        attention = 2 * pixels * keys * channels + 2 * (pixels + keys) * channels**2
        added = (kernel**2 + 2) * keys * channels
        given = overhead(height, width, rows, columns, channels, kernel)[1]
        expect(given, added / (attention + added), "the whole has the offset network in it")


@checks("claims_judged.3")
def check_row(row_of):
    figures = {"ap": 46.9, "small": 29.6, "large": 61.6}
    yield "the row with these figures"
    expect(row_of(figures | {"epochs": 50, "params": 41}, ROWS), ("C", []), "all figures count")
    expect(row_of({"ap": 42.0, "small": 20.5, "large": 61.1}, ROWS)[0], "A")
    yield "labels that are not that row's"
    expect(row_of(figures | {"epochs": 150, "params": 40}, ROWS), ("C", ["epochs", "params"]))
    expect(row_of(figures | {"epochs": 150, "params": 41}, ROWS), ("C", ["epochs"]))
    expect(row_of(figures | {"params": 40}, ROWS), ("C", ["params"]), "only labels that are given")
    yield "figures that no row has"
    given = row_of({"ap": 46.9, "small": 28.0, "large": 61.6, "epochs": 150}, ROWS)
    expect(given, (None, []), "None, and nothing to compare with")
    given = row_of({"ap": 46.9, "small": 29.6, "large": 58.0}, ROWS)
    expect(given, (None, []), "three figures must agree, not two")
    yield "figures that were rounded"
    rounded = {"ap": 46.94, "small": 29.57, "large": 61.6, "epochs": 150}
    expect(row_of(rounded, ROWS), ("C", ["epochs"]), "within 0.05")


@checks("claims_judged.2")
def check_times_fewer(times_fewer):
    theirs = {1000: [0.1, 0.2], 2000: [0.3, 0.5], 8000: [0.4, 0.6]}
    yield "both reach it"
    ours = {500: [0.2, 0.3], 1000: [0.5, 0.6], 1500: [0.7, 0.7]}
    expect(times_fewer(ours, theirs), 8.0, "8000 images against 1000")
    yield "means, not the luckiest seed"
    lucky = {500: [0.1, 0.9], 1000: [0.2, 0.6], 2000: [0.5, 0.6]}
    expect(times_fewer({500: [0.2, 0.7], 1000: [0.3, 0.5], 4000: [0.5, 0.6]}, theirs), 2.0)
    expect(times_fewer(lucky, theirs), 8000 / 500, "0.5 in the mean counts as reached")
    yield "where the rival is best, it need not be last"
    falling = theirs | {16000: [0.3, 0.5]}
    expect(times_fewer(ours, falling), 8.0, "count the rival's images until its own best mean")
    yield "never reached, or of no use"
    expect(times_fewer({500: [0.2, 0.3], 1000: [0.4, 0.5]}, theirs), None, "None: not shown")
    weak = {1000: [0.01, 0.02], 2000: [0.04, 0.05]}
    expect(times_fewer(ours, weak), None, "an AP below `useful` is no aim")
    expect(times_fewer(ours, weak, useful=0.04), 4.0, "`useful` is an argument")


def _overhead(taps=lambda k: k * k + 2, places=lambda pixels, keys: keys, alone=False, times=1):
    def overhead(height, width, rows, columns, channels, kernel):
        pixels, keys = height * width, rows * columns
        attention = 2 * pixels * keys * channels + 2 * (pixels + keys) * channels**2
        added = times * taps(kernel) * places(pixels, keys) * channels
        return added, added / (attention if alone else attention + added)

    return overhead


def _row(keys=("ap", "small", "large"), labels=True, every=False, nearest=False, within=0.05):
    def row_of(claim, rows):
        def gap(row):
            return max(abs(row[key] - claim[key]) for key in keys)

        fitting = [row for row in rows if gap(row) <= within]
        if nearest:
            fitting = [min(rows, key=gap)]
        if not fitting:
            return None, []
        row = fitting[-1]
        names = [key for key in ("epochs", "params") if every or key in claim]
        return row["model"], [k for k in names if claim.get(k) != row[k]] if labels else []

    return row_of


def _times(reduce=lambda aps: math.fsum(aps) / len(aps), last=False, invert=False, always=False):
    def times_fewer(ours, theirs, useful=0.3):
        means = {images: reduce(aps) for images, aps in theirs.items()}
        wanted = means[max(means)] if last else max(means.values())
        at = max(means) if last else min(i for i, mean in means.items() if mean >= wanted)
        reached = [i for i, aps in ours.items() if reduce(aps) >= wanted]
        if always and not reached:
            reached = [max(ours)]
        if not reached or (wanted < useful and not always):
            return None
        return min(reached) / at if invert else at / min(reached)

    return times_fewer


WRONG = {
    "claims_judged.1": [
        ("without the two outputs", _overhead(taps=lambda k: k * k)),
        ("pixels for points", _overhead(places=lambda pixels, keys: pixels)),
        ("ten times as many, as in the paper", _overhead(times=10)),
        ("the share of the attention alone", _overhead(alone=True)),
    ],
    "claims_judged.3": [
        ("AP alone", _row(keys=("ap",))),
        ("two figures of three", _row(keys=("ap", "small"))),
        ("equal to the last digit", _row(within=0)),
        ("labels not compared", _row(labels=False)),
        ("labels that are not given count as wrong", _row(every=True)),
        ("the nearest row, whatever it says", _row(nearest=True)),
    ],
    "claims_judged.2": [
        ("the best seed", _times(reduce=max)),
        ("until the rival's end", _times(last=True)),
        ("upside down", _times(invert=True)),
        ("a number where nothing was shown", _times(always=True)),
    ],
}
