"""A whole detector, ours against Hugging Face's with equal weights: time, memory, and their parts.

    python benchmarks/model.py                        # all of it; some ten minutes
    python benchmarks/model.py --threads 2 --part times

The paper's base model (ResNet-50, four levels, 300 queries) on one image of 800 x 1066 pixels:
inference, and a training step of forward, loss and backward. The loss is the same simple one for
both, so that only the models differ. Writes data/results/model_avx2.json, or what
the processor's vectors are called.
"""

import os
import sys

if __name__ == "__main__":  # this file's folder would hide Python's own module called operator
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import copy
import itertools
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

from benchmarks import timing
from benchmarks.peers import HUGGING_FACE, OURS, progress
from deformable_detr import Batch, DeformableDETR, DeformableDETRConfig, MSDeformAttn
from deformable_detr.files import write_json
from deformable_detr.provenance import provenance
from deformable_detr.weights.formats import file_name, to_huggingface

COMMAND = "python benchmarks/model.py"
HEIGHT, WIDTH = 800, 1066
MODES = ("inference", "training step")
PARTS = ("times", "breakdown", "channels_last")
REST = "heads and the rest"
# the operator by the names that a profile has for it: ours, and the range around theirs
OPERATORS = ("deformable_detr::ms_deform_attn", "range: operator")
BACKWARD = "autograd::engine::evaluate_function: "

Predict = Callable[[], tuple[Tensor, Tensor]]


def detectors(config: DeformableDETRConfig) -> dict[str, nn.Module]:
    """Both, with the same random weights, under which queries look about one pixel around the
    initial star, as they do early in training."""
    torch.manual_seed(0)
    ours = DeformableDETR(config)
    for module in ours.modules():
        if isinstance(module, MSDeformAttn):
            nn.init.normal_(module.sampling_offsets.weight, std=config.embed_dim**-0.5)
    state, content = to_huggingface(ours)
    theirs = DeformableDetrForObjectDetection(DeformableDetrConfig.from_dict(content))
    names = {name: file_name(name) for name in theirs.state_dict()}
    theirs.load_state_dict({name: state[stored] for name, stored in names.items()})
    return {OURS: ours, HUGGING_FACE: theirs}


def predictors(models: dict[str, nn.Module], image: Tensor) -> dict[str, Predict]:
    """For each model a call that gives logits and boxes of the last layer. image: (3, H, W)."""
    ours, theirs = models[OURS], models[HUGGING_FACE]
    batch = Batch.from_images([image])
    mask = (~batch.mask).long()

    def predict() -> tuple[Tensor, Tensor]:
        output = ours(batch)
        return output.logits, output.boxes

    def predict_theirs() -> tuple[Tensor, Tensor]:
        output = theirs(pixel_values=batch.images, pixel_mask=mask)
        return output.logits, output.pred_boxes

    return {OURS: predict, HUGGING_FACE: predict_theirs}


def call(model: nn.Module, predict: Predict, mode: str) -> timing.Call:
    """One inference, or one training step up to the gradients."""

    def infer() -> tuple[Tensor, Tensor]:
        model.eval()
        with torch.no_grad():
            return predict()

    def step() -> None:
        model.train()
        logits, boxes = predict()
        (logits.square().mean() + boxes.square().mean()).backward()
        model.zero_grad(set_to_none=True)

    return infer if mode == "inference" else step


def largest_difference(models: dict[str, nn.Module], predict: dict[str, Predict]) -> float:
    """Between the two models' predictions."""
    ours, theirs = (call(models[name], predict[name], "inference")() for name in models)
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def measure_times(mode: str, calls: dict[str, timing.Call], threads: int, rounds: int) -> list:
    """A row for each model; time and peak memory."""
    each = dict.fromkeys(calls, rounds)
    result = timing.side_by_side(calls, each, attempts=1, warm=False, memory=True)
    progress(f"{mode}, {threads} threads: {dict((n, r['median_ms']) for n, r in result.items())}")
    where = {"mode": mode, "threads": threads}
    return [{**where, "model": name, **figures} for name, figures in result.items()]


def watch(model: nn.Module, name: str) -> list:
    """Hooks that put a range around each part of a model, for the profiler; returns handles."""
    inner = model if name == OURS else model.model
    watched = [(getattr(inner, part), part) for part in ("backbone", "encoder", "decoder")]
    projections = model.neck.input_proj if name == OURS else inner.input_proj
    watched += [(module, "input projections") for module in projections]
    watched += [
        (module, "operator")
        for module in model.modules()
        if type(module).__name__ == "MultiScaleDeformableAttention"
    ]
    open_ranges, handles = [], []

    def enter(label: str) -> None:
        open_ranges.append(record_function(f"range: {label}"))
        open_ranges[-1].__enter__()

    for module, label in watched:
        handles += [
            module.register_forward_pre_hook(lambda *_, label=label: enter(label)),
            module.register_forward_hook(lambda *_: open_ranges.pop().__exit__(None, None, None)),
        ]
    return handles


def breakdown(model: nn.Module, name: str, run: timing.Call) -> dict[str, float]:
    """Milliseconds of each part in one call, the backward pass's with the forward's: a backward
    node has the sequence number of the operation that made it."""
    handles = watch(model, name)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    for handle in handles:
        handle.remove()
    total: defaultdict[str, float] = defaultdict(float)
    maker: dict[int, str] = {}
    backward = []
    for event in sorted(profiler.events(), key=lambda e: e.time_range.start):
        chain = ancestry(event)
        if chain[-1].startswith(BACKWARD):
            backward += [event] if len(chain) == 1 else []
            continue
        total[part(chain)] += event.self_cpu_time_total
        if event.sequence_nr >= 0:
            maker[event.sequence_nr] = part(chain)
    for event in backward:
        total[maker.get(event.sequence_nr, REST)] += event.cpu_time_total
    return {key: round(value / 1e3, 1) for key, value in sorted(total.items(), key=lambda x: -x[1])}


def ancestry(event: torch.autograd.profiler_util.FunctionEvent) -> list[str]:
    """The event's name and those of all events around it, the outermost last."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def part(names: list[str]) -> str:
    """The part of the model that an event with this ancestry belongs to."""
    ranges = (name.removeprefix("range: ") for name in names if name.startswith("range: "))
    outer = next((name for name in ranges if name != "operator"), REST)
    return f"{outer}: operator" if any(name in OPERATORS for name in names) else outer


def channels_last(body: nn.Module, images: Tensor, rounds: int) -> list[dict]:
    """A backbone's convolutions, forward and forward + backward: images (and weights) as they are,
    and with the channels last in memory, the conversion of the images included."""
    converted = copy.deepcopy(body).to(memory_format=torch.channels_last)
    last = torch.channels_last
    variants = {
        "as it is": lambda: body(images),
        "images": lambda: body(images.contiguous(memory_format=last)),
        "images and weights": lambda: converted(images.contiguous(memory_format=last)),
    }

    def forward(run: timing.Call) -> None:
        with torch.no_grad():
            run()

    def both(run: timing.Call) -> None:
        run().square().mean().backward()

    rows = []
    for mode, function in {"forward": forward, "forward + backward": both}.items():
        calls = {name: lambda f=function, run=run: f(run) for name, run in variants.items()}
        result = timing.side_by_side(calls, dict.fromkeys(calls, rounds), attempts=1)
        rows += [{"mode": mode, "channels_last": name, **r} for name, r in result.items()]
    return rows


def summarise(result: dict) -> dict:
    """How many times as long theirs takes, and what part of its memory ours does."""
    rows = defaultdict(dict)
    for row in result.get("times", ()):
        rows[f"{row['mode']}, {row['threads']} threads"][row["model"]] = row
    ratios = {}
    for where, both in rows.items():
        ours, theirs = both[OURS], both[HUGGING_FACE]
        ratios[where] = {
            "times": round(theirs["median_ms"] / ours["median_ms"], 2),
            "times_of_minima": round(theirs["minimum_ms"] / ours["minimum_ms"], 2),
            "times_of_cpu": round(theirs["cpu_median_ms"] / ours["cpu_median_ms"], 2),
        }
        if ours.get("extra_mib") and theirs.get("extra_mib"):
            ratios[where]["part_of_memory"] = round(ours["extra_mib"] / theirs["extra_mib"], 2)
    return {"ratios": ratios}


def stored(path: Path, about: dict) -> dict:
    """The results so far, where they come from the same command, machine and versions; or none."""
    old = json.loads(path.read_text()) if path.exists() else {}
    return old if all(old.get(key) == value for key, value in about.items()) else about


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    path = timing.results_path("model")
    result = stored(path, provenance(COMMAND, ("torchvision", "transformers")))

    def save(table: str, rows: list[dict]) -> None:
        replace(result, table, rows)
        write_json(path, result | summarise(result))  # safe if the rest is stopped

    models = detectors(DeformableDETRConfig())
    image = torch.randn(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    small = image[:, : HEIGHT // 4, : WIDTH // 4]
    result["largest_difference"] = largest_difference(models, predictors(models, small))
    warm_up(models, small)
    predict = predictors(models, image)
    calls = {
        mode: {name: call(models[name], predict[name], mode) for name in models}
        for mode in arguments.modes
    }
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        if "times" in arguments.part:
            for mode, both in calls.items():
                save("times", measure_times(mode, both, threads, arguments.rounds))
        if "channels_last" in arguments.part:
            body = nn.Sequential(*models[OURS].backbone.body.values())
            rows = channels_last(body, image[None], arguments.rounds)
            save("channels_last", [{"threads": threads, **row} for row in rows])
        if "breakdown" in arguments.part:
            for (mode, both), name in itertools.product(calls.items(), models):
                parts = breakdown(models[name], name, both[name])
                row = {"mode": mode, "threads": threads, "model": name, "ms": parts}
                save("breakdown", [row])


def warm_up(models: dict[str, nn.Module], image: Tensor) -> None:
    """Build kernels and load libraries, on a small image."""
    predict = predictors(models, image)
    for name, mode in itertools.product(models, MODES):
        call(models[name], predict[name], mode)()


def replace(result: dict, table: str, rows: list[dict]) -> None:
    """Put rows into a table of the result, in the place of those for the same thing."""
    keys = ("mode", "threads", "model", "channels_last", "form")
    found = {tuple(row.get(k) for k in keys): row for row in (*result.get(table, ()), *rows)}
    result[table] = list(found.values())


if __name__ == "__main__":
    main()
