"""The operator's results: rows of several runs merged, compared with ours, and drawn."""

from pathlib import Path

from benchmarks import timing
from benchmarks.peers import CASES, COMPILED, HUGGING_FACE, MODES, OFFICIAL, OURS, PACKAGE

SAME = ("cpu", "vectors", "cores", "versions")  # or else times cannot be compared


def merge(old: dict, new: dict) -> dict:
    """New rows in the place of old ones for the same thing, on the same machine and versions."""
    if any(old.get(key) != new[key] for key in SAME):
        old = {}
    merged = dict(new)
    for table, keys in {
        "rows": ("shape", "mode", "threads", "allocator", "peer"),
        "memory": ("shape", "mode", "peer"),
        "scaling": ("work",),
    }.items():
        both = *old.get(table, ()), *new.get(table, ())
        kept = {tuple(row[k] for k in keys): row for row in both}
        merged[table] = list(kept.values())
    merged["ratios"] = ratios(merged["rows"])
    encoder = [
        row
        for row in merged["rows"]
        if (row["shape"], row["threads"], row["peer"]) == ("encoder", 1, OURS)
    ]
    merged["part_of_the_limit"] = [
        {k: row[k] for k in ("mode", "allocator")}
        | {"part": round(merged["limit"][f"{row['mode']}_ms"] / row["median_ms"], 2)}
        for row in encoder
    ]
    return merged


def ratios(rows: list[dict]) -> list[dict]:
    """How many times as long as ours each peer takes: medians, and minima, which disturbances
    change least; same shape, mode, threads and allocator."""
    keys = ("shape", "mode", "threads", "allocator")
    ours = {tuple(row[k] for k in keys): row for row in rows if row["peer"] == OURS}
    result = []
    for row in rows:
        base = ours.get(tuple(row[k] for k in keys))
        if row["peer"] != OURS and base:
            times = {
                "times": round(row["median_ms"] / base["median_ms"], 2),
                "times_of_minima": round(row["minimum_ms"] / base["minimum_ms"], 2),
                "times_of_cpu": round(row["cpu_median_ms"] / base["cpu_median_ms"], 2),
            }
            result.append({k: row[k] for k in (*keys, "peer")} | times)
    return result


def plot(result: dict, path: Path) -> None:
    """How many times faster ours is, one thread: one panel per allocator and one bar per peer, as
    far as they were measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {"default": "allocator as it comes", "kept": "allocator told to keep its memory"}
    rows = [row for row in result["ratios"] if row["threads"] == 1]
    allocators = [name for name in titles if any(row["allocator"] == name for row in rows)]
    names = [
        name
        for name in (OFFICIAL, HUGGING_FACE, PACKAGE, COMPILED)
        if any(row["peer"] == name for row in rows)
    ]
    groups = [(shape, mode) for shape in CASES for mode in MODES]
    with plt.style.context(timing.ROOT / "chapters" / "book.mplstyle"):
        figure, panels = plt.subplots(
            1, len(allocators), figsize=(9.5, 6), sharex=True, sharey=True, squeeze=False
        )
        for panel, allocator in zip(panels[0], allocators, strict=True):
            own = [row for row in rows if row["allocator"] == allocator]
            for index, peer in enumerate(names):
                chosen = {(r["shape"], r["mode"]): r["times"] for r in own if r["peer"] == peer}
                places = [i + 0.2 * (index - 1.5) for i, g in enumerate(groups) if g in chosen]
                lengths = [chosen[g] for g in groups if g in chosen]
                bars = panel.barh(places, lengths, 0.19, color=f"C{index}", label=peer)
                panel.bar_label(bars, fmt="%.1f x", padding=2, fontsize=8)
            panel.axvline(1, color="black", linewidth=1)
            panel.set_title(titles[allocator])
            panel.set_xlabel("times as long as ours (the line)")
        panels[0, 0].set_yticks(range(len(groups)), [f"{shape}\n{mode}" for shape, mode in groups])
        panels[0, 0].invert_yaxis()
        panels[0, 0].set_xlim(0, 1.12 * max(row["times"] for row in rows))
        figure.suptitle(f"Multi-scale deformable attention, one thread ({result['cpu']})")
        legend = panels[0, 0].get_legend_handles_labels()
        figure.legend(*legend, loc="outside lower center", ncols=4)
        figure.savefig(path)
        plt.close(figure)
