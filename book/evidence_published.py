"""Evidence for claims that stands in tables which others have published (data/published.toml), or
in the bibliography."""

import tomllib

import rendering
from claims import CONDITION, FALSE, ROOT, TRUE, UNTESTABLE, Finding, evidence, judge

PUBLISHED = tomllib.loads((ROOT / "data" / "published.toml").read_text(encoding="utf-8"))


def published(table: str, model: str) -> dict:
    """The row of a published table."""
    return next(row for row in PUBLISHED[table]["rows"] if row["model"] == model)


def slower(ours: float, theirs: float) -> float:
    """By how many per cent fewer images per second."""
    return 100 * (1 - ours / theirs)


@evidence("P13")
def ten_times_fewer_epochs() -> Finding:
    ours, theirs = (published("table1", name) for name in ("Deformable DETR", "DETR"))
    epochs, hours = (theirs[key] / ours[key] for key in ("epochs", "hours"))
    gains = {key: ours[key] - theirs[key] for key in ("ap", "small", "large")}
    value = (
        f"{epochs:.0f} times fewer epochs, {hours:.1f} times fewer hours; AP {gains['ap']:+.1f}, "
        f"small {gains['small']:+.1f}, large {gains['large']:+.1f}"
    )
    holds = epochs == 10 and gains["ap"] > 0 and gains["small"] > gains["ap"] and gains["large"] < 0
    return Finding(value, judge(holds, CONDITION))


@evidence("P15")
def faster_than_dc5() -> Finding:
    four = {m: published("readme", m)["fps4"] for m in ("Deformable DETR", "DETR-DC5")}
    times = four["Deformable DETR"] / four["DETR-DC5"]
    lost = [
        slower(
            *(published(table, model)[key] for model in ("Deformable DETR", "Faster R-CNN + FPN"))
        )
        for table, key in (("table1", "fps"), ("readme", "fps4"), ("readme", "fps"))
    ]
    value = (
        f"{times:.2f} times; {lost[0]:.0f} % slower by Table 1, {lost[1]:.0f} % by the README in "
        f"batches of 4, {lost[2]:.0f} % one by one"
    )
    return Finding(value, judge(1.5 < times < 1.65 and lost[0] < 28 < lost[1] < lost[2], CONDITION))


@evidence("P19")
def trained_with_adam() -> Finding:
    used = PUBLISHED["readme"]["optimizer"]
    return Finding(f"main.py of the official code: {used}", judge(used == "AdamW", FALSE))


@evidence("S2")
def ten_to_twenty_times_slower() -> Finding:
    epochs = published("table1", "DETR")["epochs"]
    schedules = PUBLISHED["detectron2"]["schedules"]
    others = [published("table1", "Faster R-CNN + FPN")["epochs"], schedules["3x"], schedules["1x"]]
    times = [epochs / other for other in others]
    value = ", ".join(
        f"{t:.1f} times against {o} epochs" for t, o in zip(times, others, strict=True)
    )
    return Finding(value, judge(times[0] < 10 < times[1] < 20 < times[2], CONDITION))


@evidence("B1")
def half_as_fast() -> Finding:
    names = ("DETR", "DETR-DC5", "Faster R-CNN + FPN")
    detr, dc5, faster = (published("readme", name)["fps"] for name in names)
    value = f"images per second: DETR {detr}, DETR-DC5 {dc5}, Faster R-CNN {faster}"
    return Finding(value, judge(detr > faster > 2 * dc5, CONDITION))


@evidence("B2")
def twenty_times_slower_to_train() -> Finding:
    names = ("DETR", "DETR-DC5", "Faster R-CNN + FPN")
    detr, dc5, faster = (published("table1", name)["hours"] for name in names)
    value = f"GPU hours: {dc5 / faster:.0f} times (DC5), {detr / faster:.0f} times (plain)"
    return Finding(value, judge(15 < dc5 / faster < 25 and detr / faster < 10, CONDITION))


@evidence("N3")
def dc5_has_42() -> Finding:
    plain, dc5 = (published("table1", name)["ap"] for name in ("DETR", "DETR-DC5"))
    value = f"AP of DETR {plain}, of DETR-DC5 {dc5}"
    return Finding(value, judge(plain == 42.0 != dc5, FALSE))


@evidence("N4")
def three_times_the_epochs() -> Finding:
    row = published("readme", "++ two-stage")
    long = next(r["ap"] for r in PUBLISHED["figure3"]["rows"] if r["epochs"] == 150)
    value = f"{row['ap']} is two-stage, {row['epochs']} epochs; the base has {long} after 150"
    same = (row["ap"], row["small"], row["large"]) == (46.9, 29.6, 61.6)
    return Finding(value, judge(same and row["epochs"] == 50 and long < row["ap"], FALSE))


@evidence("N5")
def faster_rcnn_in_12_epochs() -> Finding:
    row = published("detectron2", "R101")
    epochs = PUBLISHED["detectron2"]["schedules"][row["schedule"]]
    value = f"{row['ap']} with the schedule {row['schedule']}, about {epochs} epochs"
    return Finding(value, judge(row["ap"] == 42.0 and epochs > 12, FALSE))


@evidence("N6")
def small_objects() -> Finding:
    ours, theirs = (published("table1", name)["small"] for name in ("Deformable DETR", "DETR"))
    gain = 100 * (ours / theirs - 1)
    return Finding(f"{ours} / {theirs} = {gain:+.1f} %", judge(round(gain) == 29, TRUE))


@evidence("N8")
def which_university() -> Finding:
    names = PUBLISHED["affiliations"]["names"]
    value = f"below the paper's title: {names[1]}"
    return Finding(value, judge(not any("Chinese Academy" in name for name in names), FALSE))


@evidence("N9")
def dn_detr_has_48_6() -> Finding:
    rows = PUBLISHED["dn_detr"]["rows"]
    row = next(row for row in rows if row["ap"] == 48.6)
    value = f"48.6: {row['attention']}; DN-DETR itself, {rows[0]['attention']}: {rows[0]['ap']}"
    based = PUBLISHED["dn_detr"]["based_on"] != "Deformable DETR"
    return Finding(value, judge("encoder" in row["attention"] and based, CONDITION))


@evidence("N10")
def dino_by_the_same_group() -> Finding:
    def authors(key: str) -> set[str]:
        return {str(person) for person in rendering.papers()[key].persons["author"]}

    ours, theirs = authors("zhu2021deformable"), authors("zhang2023dino")
    value = f"{len(ours)} and {len(theirs)} authors, {len(ours & theirs)} in common"
    return Finding(value, judge(not ours & theirs, FALSE))


@evidence("N11")
def twelve_per_cent() -> Finding:
    ours, theirs = published("dino", "DINO"), published("table1", "Deformable DETR")
    gain = 100 * (ours["ap"] / theirs["ap"] - 1)
    value = f"{gain:+.1f} %, {ours['epochs']} epochs against {theirs['epochs']}"
    return Finding(value, judge(round(gain) == 12 and ours["epochs"] < theirs["epochs"], CONDITION))


@evidence("N17")
def engineering_overhead() -> Finding:
    return Finding("nothing to measure", UNTESTABLE)


@evidence("D4")
def few_keys_in_a_backbone() -> Finding:
    return Finding("not trained", UNTESTABLE)


@evidence("R1")
def sparse_detr_saves() -> Finding:
    sparse = published("sparse_detr", "Sparse DETR, 10 %")
    saved, gained = [], []
    for name in ("Deformable DETR", "Deformable DETR, two stages"):
        row = published("sparse_detr", name)
        saved.append(100 * (1 - sparse["gflops"] / row["gflops"]))
        gained.append(100 * (sparse["fps"] / row["fps"] - 1))
    value = (
        f"FLOPs {saved[0]:.0f} or {saved[1]:.0f} % fewer, images per second "
        f"{gained[0]:.0f} or {gained[1]:.0f} % more"
    )
    holds = all(36 < s < 42 for s in saved) and gained[0] < 42 < gained[1]
    return Finding(value, judge(holds, CONDITION))
