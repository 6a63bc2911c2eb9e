"""Refinement and two stages on the digits, several seeds: what chapter refinement shows.

    python experiments/refinement.py        # about 9 minutes on two cores; resumes

Three detectors that differ in nothing else, 300 steps each. Writes data/results/refinement.json.
"""

import argparse
import dataclasses
import json
import multiprocessing

import torch
from digits import BACKBONE, DATA, MODEL, PACKAGES, RESULTS, ROOT, load_split
from safetensors.torch import load_file

from deformable_detr.data.transforms import digits_eval_transform, digits_train_transform
from deformable_detr.evaluation.coco import evaluate
from deformable_detr.files import write_json
from deformable_detr.models.deformable_detr import DeformableDETR
from deformable_detr.provenance import provenance
from deformable_detr.training.loop import train
from deformable_detr.training.recipe import load_recipe

SEEDS = (0, 1, 2)
VARIANTS = {
    "plain": {"refine": False, "two_stage": False},
    "refinement": {"refine": True, "two_stage": False},
    "refinement, two stages": {"refine": True, "two_stage": True},
}
IMAGES, STEPS_EACH = 2_400, 300


def run(variant: str, seed: int) -> dict:
    """Train one detector on the first 2,400 images, measure it on val."""
    torch.set_num_threads(1)
    folder = ROOT / "runs" / "refinement" / f"{variant.replace(', ', '_').replace(' ', '_')}-{seed}"
    done = folder / "done.json"
    if done.exists():
        return json.loads(done.read_text())
    torch.manual_seed(seed)
    model = DeformableDETR(dataclasses.replace(MODEL, **VARIANTS[variant]))
    model.backbone.load_state_dict(load_file(BACKBONE))
    train_set = load_split("train", digits_train_transform())
    train_set.image_ids = train_set.image_ids[:IMAGES]
    losses = []
    train(
        model,
        train_set,
        None,
        folder,
        dataclasses.replace(load_recipe("digits").train, epochs=1, seed=seed),
        on_step=lambda step, terms: losses.append([step, terms["loss_giou"]]),
        progress=False,
    )
    metrics = evaluate(model, load_split("val", digits_eval_transform())).to_dict()
    smooth = [
        [losses[i][0], round(sum(x for _, x in losses[i : i + 20]) / 20, 4)]
        for i in range(0, len(losses) - 19, 20)
    ]
    result = {"variant": variant, "seed": seed, "val": metrics, "last_layer_giou": smooth}
    write_json(done, result)
    print(f"{variant}, seed {seed}: AP {metrics['ap']:.3f}", flush=True)
    return result


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="trainings side by side")
    args = parser.parse_args()
    jobs = [(variant, seed) for seed in SEEDS for variant in VARIANTS]
    print(f"{len(jobs)} trainings of {STEPS_EACH} steps, about 100 seconds of a core each")
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        runs = pool.starmap(run, jobs, chunksize=1)
    about = provenance("python experiments/refinement.py", PACKAGES, data=DATA)
    write_json(RESULTS / "refinement.json", about | {"steps": STEPS_EACH, "runs": runs})


if __name__ == "__main__":
    main()
