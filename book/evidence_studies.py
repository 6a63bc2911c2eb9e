"""Evidence for claims that the results of studies hold (data/results)."""

import csv
import json
import math
from collections import defaultdict
from statistics import mean

from claims import CONDITION, RESULTS, TRUE, UNCONFIRMED, UNTESTABLE, Finding, evidence, judge

from deformable_detr.evaluation.intervals import Interval, in_words, interval

C, M, K, QUERIES = 256, 8, 4, 300  # of the published models
IMAGES_PER_STEP = 8  # of the studies on the digits
LEAST_AP = 0.3  # at which a detector of digits is of use
# AP that counts as no gain; most of those in the paper's Table 2 are larger
NOTHING = 0.01
FEW = Finding("too few trainings yet", UNTESTABLE)


def study(name: str) -> list[dict[str, str]]:
    """The rows of finished trials."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["status"] == "done"]


def ablated(ours: str, theirs: str) -> Interval | None:
    """What the AP of one row of the ablations is above that of another, seed by seed; None where
    fewer than two seeds have both."""
    aps = defaultdict(dict)
    for row in study("ablations"):
        if (row["split"], row["metric"]) == ("test", "ap"):
            aps[row["configuration"]][row["seed"]] = float(row["value"])
    pairs = [aps[ours][seed] - aps[theirs][seed] for seed in aps[ours].keys() & aps[theirs].keys()]
    return interval(pairs) if len(pairs) > 1 else None


def promises_nothing(changed: bool, small: bool) -> str:
    """The verdict on a claim that nothing happens. changed: an effect is seen that it denies.
    small: intervals leave no room for one that counts. Where neither is so, it takes more seeds."""
    return CONDITION if small else UNCONFIRMED if changed else UNTESTABLE


def result(name: str) -> dict:
    """A study's JSON file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def counted(configuration: str) -> dict[int, int]:
    """The study of costs: multiply-adds by number of tokens."""
    with (RESULTS / "cost.csv").open(encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["configuration"] == configuration]
    return {int(r["at"]): int(r["value"]) for r in rows if r["metric"] == "multiply_adds"}


@evidence("P1")
def complexity_formula() -> Finding:
    found, tokens = counted("deformable, decoder"), 4096
    small = QUERIES * C * C + 5 * QUERIES * K * C + 3 * QUERIES * C * M * K
    as_coded = small + tokens * C * C
    least = small + min(tokens, QUERIES * K) * C * C
    value = (
        f"decoder, {tokens:,} pixels: counted {found[tokens] / 1e6:.1f} M, the formula without "
        f"its minimum {as_coded / 1e6:.1f} M, with it {least / 1e6:.1f} M"
    )
    return Finding(value, judge(found[tokens] == as_coded > 2 * least, CONDITION))


@evidence("P3")
def encoder_is_linear() -> Finding:
    def slope(name: str) -> float:
        (few, low), (many, high) = sorted(counted(name).items())[-2:]
        return math.log(high / low) / math.log(many / few)

    sparse, dense = slope("deformable, encoder"), slope("dense, encoder")
    value = f"exponent of the tokens: deformable {sparse:.2f}, dense {dense:.2f}"
    return Finding(value, judge(abs(sparse - 1) < 0.01 and dense > 1.9, TRUE))


@evidence("P4")
def decoder_does_not_grow() -> Finding:
    found = counted("deformable, decoder")
    few, many = min(found), max(found)
    growth = found[many] / found[few]
    late = QUERIES * C * (C + 3 * M * K + K * C + 5 * M * K)  # projected after reading
    value = (
        f"as coded {growth:.0f} times as many multiply-adds for {many:,} pixels as for {few}; "
        f"samples projected: {late / 1e6:.0f} M for any"
    )
    return Finding(value, judge(growth > 10 and late < found[many], CONDITION))


@evidence("P9")
def robust_to_first_boxes() -> Finding:
    found = [ablated(f"first boxes {size}", "base") for size in (0.05, 0.2)]
    if None in found:
        return FEW
    said = [in_words(each) for each in found]
    value = f"AP with sizes of 0.05: {said[0]}; of 0.2: {said[1]} (against 0.1)"
    changed = any(each.low > 0 or each.high < 0 for each in found)
    small = all(each.low > -NOTHING and each.high < NOTHING for each in found)
    return Finding(value, promises_nothing(changed, small))


@evidence("P10")
def gradients_are_cut() -> Finding:
    norms, losses = defaultdict(list), defaultdict(list)
    for run in result("gradient_cut")["runs"]:
        norms[run["variant"]].append(mean(run["curves"]["gradient_norm"]))
        losses[run["variant"]].append(run["val"]["loss_giou"])
    larger = min(norms["open"]) / max(norms["cut"])
    value = (
        f"mean gradient norm {mean(norms['open']):.0f} without the cut, {mean(norms['cut']):.0f} "
        f"with it; last loss {mean(losses['open']):.2f} and {mean(losses['cut']):.2f}"
    )
    return Finding(value, judge(larger > 2 and max(losses["open"]) < min(losses["cut"]), CONDITION))


@evidence("P11")
def boxes_are_decided_at_borders() -> Finding:
    items = result("looking")["gradient"]["items"]
    ratio = {item: items[item]["sides to ends"]["all"] for item in "xwyh"}
    value = "energy at the sides, divided by that at the ends: " + ", ".join(
        f"{item} {numbers[0]:.1f}" for item, numbers in ratio.items()
    )
    holds = all(ratio[item][1] > 3 for item in "xw") and all(
        ratio[item][2] < 1 / 3 for item in "yh"
    )
    return Finding(value, judge(holds, TRUE))


@evidence("P12")
def decoder_looks_at_the_whole_object() -> Finding:
    border = result("looking")["decoder"]["layers"][-1]["border"]["all"]
    own, equal = border["own"], border["unweighted"]
    value = (
        f"{own[0]:.2f} of the weight near the border; equal weights would put {equal[0]:.2f} there"
    )
    return Finding(value, judge(own[1] > 2 * equal[2], UNCONFIRMED))


@evidence("P14")
def ten_times_fewer_images() -> Finding:
    """How soon the mean over seeds reaches the best one of the dense detector, on the same map."""
    ours = mean_curve("detr", "one map")
    rivals = [mean_curve("detr", name) for name in ("DETR", "DETR, 0.0005")]
    theirs = max(rivals, key=lambda curve: max(curve.values(), default=-1.0))
    if not ours or not theirs:
        return FEW
    aim = max(theirs.values())
    if aim < LEAST_AP:
        images = [f"{IMAGES_PER_STEP * max(curve):,.0f}" for curve in (theirs, ours)]
        value = (
            f"AP {aim:.2f} of the dense detector within {images[0]} images, "
            f"{max(ours.values()):.2f} of the deformable one within {images[1]}"
        )
        return Finding(value, UNTESTABLE)
    needed = min(step for step, ap in theirs.items() if ap >= aim)
    reached = [step for step, ap in sorted(ours.items()) if ap >= aim]
    if not reached:
        return Finding(f"AP {aim:.2f} of the dense detector was not reached", UNTESTABLE)
    ratio = needed / reached[0]
    value = f"an AP of {aim:.2f} after {ratio:.1f} times fewer images"
    return Finding(value, TRUE if ratio >= 10 else CONDITION if ratio > 1 else UNCONFIRMED)


def mean_curve(name: str, configuration: str) -> dict[float, float]:
    """AP on val by step, the mean over seeds; empty with fewer than two."""
    curve = defaultdict(list)
    for row in study(name):
        if (row["configuration"], row["metric"], row["split"]) == (configuration, "ap", "val"):
            curve[float(row["at"])].append(float(row["value"]))
    most = max(map(len, curve.values()), default=0)
    return {at: mean(aps) for at, aps in curve.items() if len(aps) == most > 1}


@evidence("P16")
def fpn_adds_nothing() -> Finding:
    found = ablated("FPN on the maps", "base")
    if found is None:
        return FEW
    verdict = promises_nothing(changed=found.low > 0, small=found.high < NOTHING)
    return Finding(f"AP with a pyramid on the maps: {in_words(found)}", verdict)


def base_against(name: str) -> Finding:
    """The base of the ablations against one of its variants."""
    found = ablated("base", name)
    if found is None:
        return FEW
    none = UNCONFIRMED if found.high < NOTHING else UNTESTABLE  # no room for a gain, or too much
    return Finding(f"AP {in_words(found)}", CONDITION if found.low > 0 else none)


@evidence("P17")
def more_points_help() -> Finding:
    return base_against("K = 1")


@evidence("P18")
def more_scales_help() -> Finding:
    return base_against("one map")


@evidence("S1")
def dense_attention_starts_uniform() -> Finding:
    shares = defaultdict(list)
    found = {
        (r["configuration"], r["seed"], r["at"], r["metric"]): float(r["value"])
        for r in study("initialisation")
    }
    for (name, seed, at, metric), value in found.items():
        if metric.endswith("effective_keys"):
            shares[name].append(value / found[name, seed, at, "tokens"])
    dense, sparse = shares["dense"], shares["deformable, one map"]
    value = (
        f"effective keys: {100 * min(dense):.0f} to {100 * max(dense):.0f} % of the tokens; "
        f"deformable {100 * max(sparse):.1f} % of 64, {100 * min(sparse):.1f} % of 1024"
    )
    return Finding(value, judge(min(dense) > 0.9 and max(sparse) < 0.1, TRUE))


@evidence("N15")
def points_gather_on_edges() -> Finding:
    found = result("looking")
    gains = [
        [layer["edge rank"]["all"]["own minus borrowed"] for layer in found[part]["layers"]]
        for part in ("decoder", "encoder")
    ]
    value = "rank of edge strength, above that of a borrowed pattern: decoder " + ", ".join(
        f"{gain[0]:+.3f}" for gain in gains[0]
    )
    later = [gain for part in gains for gain in part[1:]]
    first = [part[0] for part in gains]
    holds = all(low > 0 for _, low, _ in later) and max(m for m, _, _ in first) < 0.01
    return Finding(value, judge(holds and max(m for m, _, _ in later) < 0.1, CONDITION))


@evidence("N16")
def adaptive_points() -> Finding:
    found = defaultdict(dict)
    for row in study("thresholds"):
        if row["split"] == "test":
            found[row["configuration"]][row["metric"]] = float(row["value"])
    by_weight, fixed = found["weight at least 0.02"], found["8 heaviest"]
    points = mean(by_weight[f"{part}_points"] for part in ("encoder", "decoder"))
    value = (
        f"of 12 points, {points:.1f} in the mean by a threshold: AP {by_weight['ap']:.3f}; "
        f"8 for every query: {fixed['ap']:.3f}"
    )
    alike = points > 7.5 and abs(by_weight["ap"] - fixed["ap"]) < 0.005
    return Finding(value, judge(alike, UNTESTABLE))
