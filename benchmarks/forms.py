"""A whole detector at its best, ours against Hugging Face's at theirs, beside what is possible.

    python benchmarks/forms.py              # some ten minutes, most of them of the compiler
    python benchmarks/forms.py --modes "training step" --forms float32 bfloat16

Each in every form that may make it fast: as it comes, in bfloat16, compiled, and both; theirs in
bfloat16 by autocast and, for inference, with all its weights narrowed too. Its attention is
torch's scaled_dot_product_attention in each. The models, the image and the calls are those of
benchmarks/model.py. The limit is the time of the model's products at the rate of one large product
of matrices, timed between the others. A training step's weights stay in float32, its products are
in bfloat16 by autocast; of ours it is told which part takes how long. Writes
data/results/forms_avx512.json, or what the processor's vectors are called.
"""

import os
import sys

if __name__ == "__main__":  # this file's folder would hide Python's own module called operator
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.model import (
    HEIGHT,
    MODES,
    WIDTH,
    Predict,
    breakdown,
    call,
    detectors,
    replace,
    stored,
    warm_up,
)
from benchmarks.peers import HUGGING_FACE, OURS, progress
from deformable_detr import Batch, DeformableDETRConfig
from deformable_detr.evaluation.complexity import count
from deformable_detr.files import first_line, write_json
from deformable_detr.inference.precision import in_bf16
from deformable_detr.provenance import provenance

COMMAND = "python benchmarks/forms.py"
PLAIN, NARROW, COMPILED, BOTH = "float32", "bfloat16", "compiled", "compiled, bfloat16"
ALL_NARROW, LIMIT = "bfloat16, weights too", "limit"
DTYPES = {PLAIN: torch.float32, NARROW: torch.bfloat16}
FORMS = (PLAIN, NARROW, COMPILED, BOTH, ALL_NARROW)
SIDE = 2048  # of the matrices whose product shows the machine's rate


def forms(models: dict[str, nn.Module], image: Tensor, mode: str) -> dict[tuple, timing.Call]:
    """Calls by model and form."""
    batch = Batch.from_images([image])
    mask = (~batch.mask).long()

    def ours(model: nn.Module, autocast: bool) -> Predict:
        def predict() -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", torch.bfloat16, autocast):
                output = model(batch)
            return output.logits, output.boxes

        return predict

    def theirs(model: nn.Module, autocast: bool, dtype: torch.dtype = torch.float32) -> Predict:
        def predict() -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", torch.bfloat16, autocast):
                output = model(pixel_values=batch.images.to(dtype), pixel_mask=mask)
            return output.logits, output.pred_boxes

        return predict

    made = {}
    for name, make in ((OURS, ours), (HUGGING_FACE, theirs)):
        model, compiled = models[name], torch.compile(models[name])
        made[name, PLAIN] = model, make(model, False)
        made[name, NARROW] = model, make(model, True)
        made[name, COMPILED] = model, make(compiled, False)
        made[name, BOTH] = model, make(compiled, True)
    if mode == "inference":  # weights narrowed once
        narrow = in_bf16(models[OURS].eval())
        made[OURS, NARROW] = narrow, ours(narrow, False)
        narrow = copy.deepcopy(models[HUGGING_FACE]).to(torch.bfloat16)
        made[HUGGING_FACE, ALL_NARROW] = narrow, theirs(narrow, False, torch.bfloat16)
    return {key: call(model, predict, mode) for key, (model, predict) in made.items()}


def measure(
    models: dict[str, nn.Module],
    image: Tensor,
    mode: str,
    rounds: int,
    chosen: Sequence[str] = FORMS,
) -> list[dict]:
    """A row for each form, with the reason where it does not run; and the limit of inference."""
    calls, rows = forms(models, image, mode), []
    calls = {key: run for key, run in calls.items() if key[1] in chosen}
    for name, form in list(calls):
        try:
            calls[name, form]()
        except Exception as error:  # whatever a compiler may raise
            del calls[name, form]
            reason = f"{type(error).__name__}: {first_line(error)}"[:300]
            rows.append({"mode": mode, "model": name, "form": form, "does not run": reason})
        progress(f"{mode}: {name}, {form} is warm")
    watched = {form: calls[OURS, form] for form in DTYPES if (OURS, form) in calls}
    if mode == "inference":
        for form, dtype in DTYPES.items():
            calls[LIMIT, form] = partial(torch.mm, *torch.randn(2, SIDE, SIDE).to(dtype))
    products = count(models[OURS], (HEIGHT, WIDTH))[0] / SIDE**3
    found = timing.side_by_side(calls, dict.fromkeys(calls, rounds), attempts=1, warm=False)
    for (name, form), figures in found.items():
        limit = {"limit_ms": round(figures["minimum_ms"] * products, 1)} if name == LIMIT else {}
        if name == OURS and form in watched and mode == "training step":
            figures["parts_ms"] = breakdown(models[OURS], OURS, watched[form])
        rows.append({"mode": mode, "model": name, "form": form, **figures, **limit})
        progress(f"{mode}: {name}, {form}: {limit.get('limit_ms', figures['median_ms'])} ms")
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["inference"])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = detectors(DeformableDETRConfig())
    image = torch.randn(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    warm_up(models, image[:, : HEIGHT // 4, : WIDTH // 4])
    path = timing.results_path("forms")
    about = provenance(COMMAND, ("torchvision", "transformers")) | {"threads": 1}
    result = stored(path, about)
    for mode in arguments.modes:
        rows = measure(models, image, mode, arguments.rounds, arguments.forms)
        replace(result, "rows", rows)
        write_json(path, result)


if __name__ == "__main__":
    main()
