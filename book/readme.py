"""The README's tables and its picture, from stored results: `python book/readme.py`."""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import nbformat
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from PIL import Image
from torch import nn

from deformable_detr import Batch, Detections, postprocess
from deformable_detr.data.images import read_image
from deformable_detr.data.transforms import digits_eval_transform
from deformable_detr.look.figures import draw_sampling_points
from deformable_detr.look.pictures import draw_detections
from deformable_detr.look.sampling import record_sampling
from deformable_detr.weights.ours import load_model

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def chapters_table() -> str:
    """A row for each chapter: number and title, what it needs to run, how long it is to read."""
    measured = json.loads((ROOT / "data" / "results" / "chapters.json").read_text())
    rows = ["| chapter | runs in | peak memory | reading | exercises |", "|---" * 5 + "|"]
    for name, figures in sorted(measured.items()):
        notebook = nbformat.read(ROOT / "chapters" / f"{name}.ipynb", as_version=4)
        title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
        rows.append(
            f"| [{title}](chapters/{name}.ipynb) | {max(1, round(figures['seconds']))} s "
            f"| {figures['peak_mib']} MiB | {figures['reading_minutes']} min "
            f"| {figures['exercise_minutes']} min |"
        )
    return "\n".join(rows)


def results_table() -> str:
    """The metrics on the test split of both seeds and of what was trained on from the first, whose
    last row is the shipped detector."""
    results = json.loads((ROOT / "data" / "results" / "digits_training.json").read_text())
    columns = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    rows = [
        "| | AP | AP50 | AP75 | AP small | AP medium | AP large | training, one core |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        values = " | ".join(f"{run['test'][column]:.3f}" for column in columns)
        name = f"seed {run['seed']}, {run['epochs']} epochs"
        if run["round"]:
            name = f"and {run['epochs']} more epochs of seed {run['seed']}"
        rows.append(f"| {name} | {values} | {run['cpu_seconds'] / 60:.0f} min |")
    return "\n".join(rows)


def operator_table() -> str:
    """How many times as long as ours each peer takes, one thread, medians; a row for each kind of
    call, and in it a figure for each processor."""
    files = sorted((ROOT / "data" / "results").glob("operator_avx*.json"))
    times: dict[tuple, list[str]] = defaultdict(lambda: ["-"] * len(files))
    for column, path in enumerate(files):
        for row in json.loads(path.read_text())["ratios"]:
            if row["threads"] == 1 and row["allocator"] == "default":
                key = row["shape"], row["mode"], row["peer"]
                times[key][column] = f"{row['times']:.1f}"
    peers = list(dict.fromkeys(peer for _, _, peer in times))
    vectors = ", ".join(path.stem.removeprefix("operator_").upper() for path in files)
    rows = [f"| times on {vectors} | " + " | ".join(peers) + " |", "|---" * (len(peers) + 1) + "|"]
    for shape, mode in dict.fromkeys((shape, mode) for shape, mode, _ in times):
        cells = " | ".join(", ".join(times[shape, mode, peer]) for peer in peers)
        rows.append(f"| {shape}, {mode} | {cells} |")
    return "\n".join(rows)


def detector_table() -> str:
    """The whole detector against Hugging Face's: seconds, and memory above the weights."""
    rows = ["| | | threads | ours | Hugging Face | times | memory |", "|---" * 7 + "|"]
    for path in sorted((ROOT / "data" / "results").glob("model_avx*.json")):
        results = json.loads(path.read_text())
        found = {(row["mode"], row["threads"], row["model"]): row for row in results["times"]}
        for mode, threads in dict.fromkeys((mode, threads) for mode, threads, _ in found):
            ours, theirs = (found[mode, threads, model] for model in ("ours", "Hugging Face"))
            seconds = [row["median_ms"] / 1e3 for row in (ours, theirs)]
            rows.append(
                f"| {results['vectors']} | {mode} | {threads} | {seconds[0]:.1f} s "
                f"| {seconds[1]:.1f} s | {seconds[1] / seconds[0]:.1f} x "
                f"| {ours['extra_mib'] / theirs['extra_mib']:.0%} |"
            )
    return "\n".join(rows)


def forms_table() -> str:
    """Both detectors in each form, and what an inference's products alone would take."""
    results = json.loads((ROOT / "data" / "results" / "forms_avx512.json").read_text())
    found = {(row["model"], f"{row['mode']}, {row['form']}"): row for row in results["rows"]}
    forms = dict.fromkeys(form for _, form in found)
    rows = [f"| {results['cpu']}, 1 thread | ours | Hugging Face | limit |", "|---" * 4 + "|"]
    for form in forms:
        cells = [form]
        for model, key in (
            ("ours", "median_ms"),
            ("Hugging Face", "median_ms"),
            ("limit", "limit_ms"),
        ):
            milliseconds = found.get((model, form), {}).get(key)
            cells.append(f"{milliseconds / 1e3:.1f} s" if milliseconds else "")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def updated(text: str) -> str:
    """The README with its tables made anew between their markers."""
    tables = {
        "chapters": chapters_table(),
        "operator": operator_table(),
        "detector": detector_table(),
        "forms": forms_table(),
        "results": results_table(),
    }
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        text, found = pattern.subn(lambda match, t=table: f"{match[1]}{t}\n{match[2]}", text)
        if found != 1:
            raise ValueError(f"README.md needs one pair of markers <!-- {name} -->")
    return text


def draw_picture(path: Path) -> None:
    """What the shipped detector finds on three sample images, and where it looked for one digit."""
    model, categories = load_model(ROOT / "data" / "checkpoints" / "digits.safetensors")
    names = [category["name"] for category in categories]
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.1), layout="constrained")
    for axis, number in zip(axes, (8, 12, 21, 12), strict=True):
        image = read_image(ROOT / "data" / "samples" / f"{number:06}.png")
        if axis is axes[-1]:
            draw_widest_digit(axis, model, image, names)
        else:
            axis.imshow(draw_detections(image, detect(model, image), names))
            axis.set_axis_off()
    figure.savefig(path, dpi=110)


def detect(model: nn.Module, image: Image.Image) -> Detections:
    """What the shipped detector finds on one sample image."""
    batch = Batch.from_images([digits_eval_transform()(image)])
    with torch.no_grad():
        (found,) = postprocess(model(batch), [(image.height, image.width)], threshold=0.4)
    return found


def draw_widest_digit(axes: Axes, model: nn.Module, image: Image.Image, names: list[str]) -> None:
    """Where the last decoder layer looked for the widest digit that is found."""
    with record_sampling(model) as record:
        found = detect(model, image)
    widest = int((found.boxes[:, 2] - found.boxes[:, 0]).argmax())
    x0, y0, x1, y1 = found.boxes[widest].tolist()
    draw_sampling_points(
        axes,
        image,
        record.decoder[-1],
        int(found.queries[widest]),
        (image.height, image.width),
        reference=((x0 + x1) / 2, (y0 + y1) / 2),
        box=(x0, y0, x1, y1),
        label=f"where it looked for this {names[found.labels[widest]]}",
    )


def main() -> int:
    """Write the tables and the picture."""
    matplotlib.use("Agg")
    README.write_text(updated(README.read_text()))
    draw_picture(ROOT / "data" / "results" / "readme.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
