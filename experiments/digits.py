"""The shipped detector: pretrain a small backbone on crops, train two seeds, train the first on,
report on test.

    python experiments/digits.py            # what `make results` runs; resumes where it stopped

Writes data/checkpoints/digits_backbone.safetensors, data/checkpoints/digits.safetensors (seed 0,
trained on), their cards beside them, and data/results/digits_training.json. About six hours of one
core; the two seeds run side by side.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from deformable_detr.backbones import build_backbone
from deformable_detr.backbones.small import ResidualBlock
from deformable_detr.data.coco import CocoDataset, find_split
from deformable_detr.data.transforms import digits_eval_transform, digits_train_transform
from deformable_detr.evaluation.coco import evaluate
from deformable_detr.files import write_atomically, write_json
from deformable_detr.models.deformable_detr import DeformableDETR
from deformable_detr.provenance import provenance
from deformable_detr.training.loop import Interrupted, train
from deformable_detr.training.recipe import load_recipe
from deformable_detr.weights.ours import load_model, save_model

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data" / "digits"
CHECKPOINTS, RESULTS = ROOT / "data" / "checkpoints", ROOT / "data" / "results"
BACKBONE = CHECKPOINTS / "digits_backbone.safetensors"
SEEDS = (0, 1)
DIGITS = load_recipe("digits")
MODEL = DIGITS.model_config(num_classes=10)
FINER = dataclasses.replace(DIGITS.train, giou_weight=5.0, evaluate_every=3)
ROUNDS = (  # all seeds train the first; the first seed then warms up again, twice
    dataclasses.replace(DIGITS.train, epochs=14),
    dataclasses.replace(FINER, epochs=12),
    dataclasses.replace(FINER, epochs=8, lr=6e-4, backbone_lr=6e-4),
)
CROPS, PRETRAIN_STEPS = 12_000, 1_200
COMMAND = "python experiments/digits.py"
PACKAGES = ("torchvision", "numpy", "scikit-learn", "scikit-image", "pillow")


class CropClassifier(nn.Module):
    """A backbone with maps of strides 4, 8 and 16 and one block more, and linear classifiers on the
    maps of strides 8, 16 and 32, pooled by their maximum. Stride 32 sees whole crops: the layers
    before it learn shapes."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        _, fine, coarse = backbone.channels
        self.last = ResidualBlock(coarse, 128)
        self.heads = nn.ModuleList(nn.Linear(channels, 10) for channels in (fine, coarse, 128))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, 48, 48) to three times (B, 10)."""
        _, fine, coarse = self.backbone(images)
        maps = fine, coarse, self.last(coarse)
        return [head(x.amax((2, 3))) for head, x in zip(self.heads, maps, strict=True)]


def load_split(split: str, transform: object) -> CocoDataset:
    """A split of the digits."""
    return CocoDataset(*find_split(DATA, split), transform)


def load_crops(split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` digits of a split, cut out with a margin and resized to 48 x 48."""
    dataset = load_split(split, digits_eval_transform())
    crops, labels = [], []
    for image, target in (dataset[i] for i in range(len(dataset))):
        for label, (cx, cy, w, h) in zip(target.labels, target.boxes * 128, strict=True):
            half = max(w.item(), h.item()) * 0.6 + 1
            left, right = (int(min(max(cx + s * half, 0), 128)) for s in (-1, 1))
            top, bottom = (int(min(max(cy + s * half, 0), 128)) for s in (-1, 1))
            crop = image[None, :, top:bottom, left:right]
            crops.append(nn.functional.interpolate(crop, (48, 48), mode="bilinear")[0])
            labels.append(label)
        if len(crops) >= count:
            break
    return torch.stack(crops), torch.stack(labels)


def pretrain_backbone() -> None:
    """The digits' ImageNet: ten-way classification of crops, in about two minutes."""
    if BACKBONE.exists():
        print(f"{BACKBONE.relative_to(ROOT)} is there; delete it to train it anew")
        return
    torch.manual_seed(0)
    crops = load_crops("train", CROPS)
    model = CropClassifier(build_backbone("small"))
    teach_crops(model, crops, PRETRAIN_STEPS)
    accuracy = crop_accuracy(model.eval())
    write_atomically(BACKBONE, lambda path: save_file(model.backbone.state_dict(), path))
    card = provenance(COMMAND, PACKAGES, seed=0, data=DATA)
    card |= {"crops": CROPS, "steps": PRETRAIN_STEPS, "val_accuracy": accuracy}
    write_json(BACKBONE.with_suffix(".json"), card)
    print(f"accuracy on crops of val at strides 8, 16, 32: {accuracy}")


def teach_crops(
    model: CropClassifier,
    data: tuple[torch.Tensor, torch.Tensor],
    steps: int,
    progress: bool = True,
) -> None:
    """Train on crops and their labels, of random sizes and colours."""
    crops, labels = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in tqdm(range(steps), desc="backbone", unit="step", disable=not progress):
        chosen = torch.randint(len(crops), (64,))
        images = crops[chosen][:, torch.randperm(3)]
        if torch.rand(()) < 0.5:
            images = -images
        side = 8 * int(torch.randint(3, 7, ()))  # 24 to 48 pixels
        images = nn.functional.interpolate(images, (side, side), mode="bilinear")
        losses = [nn.functional.cross_entropy(x, labels[chosen]) for x in model(images)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def crop_accuracy(model: CropClassifier) -> list[float]:
    """On 1,000 crops of val, for each of the three strides."""
    crops, labels = load_crops("val", 1000)
    return [round((x.argmax(1) == labels).float().mean().item(), 3) for x in model(crops)]


def run_folder(seed: int, part: int) -> Path:
    """Of a round of a seed."""
    return ROOT / "runs" / "digits" / (f"seed{seed}" if part == 0 else f"seed{seed}-{part}")


def rounds_of(seed: int) -> range:
    """The rounds that a seed trains."""
    return range(len(ROUNDS) if seed == SEEDS[0] else 1)


def train_seed(seed: int) -> None:
    """The rounds of a seed in runs/digits, on one thread; resumes."""
    torch.set_num_threads(1)
    for part in rounds_of(seed):
        train_round(seed, part)


def train_round(seed: int, part: int) -> None:
    """One training run, from the weights of the round before it."""
    output = run_folder(seed, part)
    if (output / "done.json").exists():
        return
    spent = output / "cpu_seconds.json"  # by the processes that were interrupted
    before = json.loads(spent.read_text()) if spent.exists() else 0
    started = time.process_time()
    if part == 0:
        torch.manual_seed(seed)
        model = DeformableDETR(MODEL)
        model.backbone.load_state_dict(load_file(BACKBONE))
    else:
        model, _ = load_model(run_folder(seed, part - 1) / "last.safetensors")
    train_set = load_split("train", digits_train_transform())
    val_set = load_split("val", digits_eval_transform())
    recipe = dataclasses.replace(ROUNDS[part], seed=seed + 100 * part)
    try:
        train(model, train_set, val_set, output, recipe)
    except Interrupted as stop:
        write_json(spent, before + time.process_time() - started)
        raise SystemExit(f"seed {seed}: {stop}") from None
    write_json(output / "done.json", {"cpu_seconds": round(before + time.process_time() - started)})


def train_seeds(at_once: int) -> None:
    """All seeds, a process each, `at_once` of them side by side; SystemExit where one stopped."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=train_seed, args=(seed,)) for seed in SEEDS]
    try:
        for first in range(0, len(processes), at_once):
            group = processes[first : first + at_once]
            for process in group:
                process.start()
            for process in group:
                process.join()
            if any(process.exitcode for process in group):
                raise SystemExit("a training stopped; the same command continues it")
    except KeyboardInterrupt:  # the processes had it too, and are writing their checkpoints
        for process in multiprocessing.active_children():
            process.join()
        raise SystemExit(130) from None


def report() -> None:
    """Evaluate the last weights of every finished round on test, and write the shipped files."""
    runs = []
    for part in range(len(ROUNDS)):
        for seed in SEEDS:
            if part in rounds_of(seed) and (run_folder(seed, part) / "done.json").exists():
                runs.append(summary(seed, part))
                print(f"seed {seed}, round {part}, test:\n{evaluate_text(runs[-1]['test'])}")
    about = provenance(COMMAND, PACKAGES, data=DATA)
    write_json(RESULTS / "digits_training.json", about | {"runs": runs})
    ship([run for run in runs if run["seed"] == SEEDS[0]])


def summary(seed: int, part: int) -> dict:
    """What a finished round took and reached."""
    folder = run_folder(seed, part)
    model, _ = load_model(folder / "last.safetensors")
    metrics = evaluate(model, load_split("test", digits_eval_transform())).to_dict()
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "seed": seed,
        "round": part,
        "epochs": ROUNDS[part].epochs,
        "test": metrics,
        "cpu_seconds": json.loads((folder / "done.json").read_text())["cpu_seconds"],
        "val": [{"step": x["step"], **x["val"]} for x in log if "val" in x],
        "loss": [[x["step"], round(x["loss"], 3)] for x in log if "loss" in x][::50],
    }


def ship(rounds: list[dict]) -> None:
    """The weights of the last of these rounds of the first seed, and their card."""
    seed, part = rounds[-1]["seed"], rounds[-1]["round"]
    model, categories = load_model(run_folder(seed, part) / "last.safetensors")
    card = provenance(COMMAND, PACKAGES, seed, DATA) | {
        "steps": sum(run["val"][-1]["step"] for run in rounds),
        "rounds": [dataclasses.asdict(recipe) for recipe in ROUNDS[: part + 1]],
        "cpu_seconds": sum(run["cpu_seconds"] for run in rounds),
        "test": rounds[-1]["test"],
    }
    save_model(model, CHECKPOINTS / "digits.safetensors", categories, card)
    write_json(CHECKPOINTS / "digits.json", card)


def evaluate_text(metrics: dict) -> str:
    """The three figures that the project promises."""
    return ", ".join(f"{name} {metrics[name]:.3f}" for name in ("ap", "ap50", "ap_small"))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sequential", action="store_true", help="one seed after the other, on one core"
    )
    args = parser.parse_args()
    if not DATA.exists():
        raise SystemExit("no digits: run `python data/make_digits.py` first")
    print("2 minutes of pretraining, two seeds of about 110 minutes, each on a core of its own,")
    print("and about 130 minutes more of the first")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    pretrain_backbone()
    train_seeds(1 if args.sequential else len(SEEDS))
    report()


if __name__ == "__main__":
    main()
