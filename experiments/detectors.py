"""What most studies try: a recipe with changes, trained from the shipped backbone on the digits for
so many steps, and measured on the way (val) and at the end (test)."""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from digits import BACKBONE, DATA
from safetensors.torch import load_file
from study import row

from deformable_detr.data.coco import CocoDataset, collate, find_split
from deformable_detr.evaluation.agnostic import without_classes
from deformable_detr.evaluation.coco import predict_dataset, score
from deformable_detr.evaluation.complexity import count
from deformable_detr.evaluation_mode import evaluating
from deformable_detr.files import writing
from deformable_detr.look.attention import record_attention
from deformable_detr.look.sampling import record_sampling
from deformable_detr.losses.matcher import HungarianMatcher
from deformable_detr.models import DEFAULT, MODELS, BaseDetector
from deformable_detr.structures import Batch
from deformable_detr.training.loop import train
from deformable_detr.training.recipe import Recipe, load_recipe

SIDE = 128  # pixels of a scene
ON_THE_WAY, PROBED, AT_THE_END = 200, 64, 500  # images of val, of val, and of test
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar")


@dataclass(frozen=True)
class Detector:
    """A detector and its training.

    settings: as `--set` has them. steps: of the optimiser; evaluations: on val, that many at equal
    distances. change: done to the new model, a function that can be imported. weights: that its
    backbone starts from.
    """

    recipe: str = "digits"
    settings: tuple[str, ...] = ()
    steps: int = 300
    evaluations: int = 2
    change: Callable[[BaseDetector], None] | None = field(default=None)
    weights: Path = BACKBONE

    def resolved(self, seed: int) -> Recipe:
        """The recipe for one seed. Its epochs are the evaluations."""
        recipe = load_recipe(self.recipe).changed(self.settings)
        changed = dataclasses.replace(recipe.train, epochs=self.evaluations, seed=seed)
        return dataclasses.replace(recipe, train=changed)

    def build(self, seed: int, classes: int = 10) -> BaseDetector:
        """The new model, with its backbone's weights."""
        recipe = self.resolved(seed)
        torch.manual_seed(seed)
        model = MODELS[recipe.model.get("name", DEFAULT)][1](recipe.model_config(classes))
        model.backbone.load_state_dict(load_file(self.weights))
        if self.change:
            self.change(model)
        return model


def describe(detector: Detector) -> dict:
    """What makes two trainings the same: all that differs from the library's defaults, and what is
    not the library's."""
    recipe, default = detector.resolved(0), type(detector.resolved(0).train)()
    train_options = dataclasses.asdict(recipe.train)
    own = {k: v for k, v in train_options.items() if v != getattr(default, k)}
    return {
        "recipe": detector.recipe,
        "set": list(detector.settings),
        "train": own | {"seed": "of the trial"},
        "model": recipe.model,
        "steps": detector.steps,
        "change": detector.change.__name__ if detector.change else None,
    }


class Draws(CocoDataset):
    """So many images of a split, drawn anew in each epoch; `training.batches` has seeded that."""

    length = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple:
        """The image drawn for this epoch and index, and its target."""
        return super().__getitem__(int(torch.randint(len(self.image_ids), ())))


def train_detector(detector: Detector, seed: int, folder: Path) -> list[dict]:
    """The rows of one training."""
    return fit(detector, seed, folder)[1]


def fit(detector: Detector, seed: int, folder: Path) -> tuple[BaseDetector, list[dict]]:
    """One training, which resumes where a killed one was saved: the model and its rows."""
    recipe = detector.resolved(seed)
    evaluation = recipe.eval_transform(), recipe.train.top_k
    per_epoch = detector.steps // detector.evaluations
    draws = Draws(*find_split(DATA, "train"), recipe.train_transform())
    model = detector.build(seed, len(draws.categories))
    draws.length = per_epoch * recipe.train.batch_size
    curve = Curve(folder / "curve.jsonl", model, per_epoch, evaluation)
    train(model, draws, None, folder, recipe.train, on_step=curve.on_step, progress=False)
    last = measure(model, "test", *evaluation, AT_THE_END)
    multiply_adds, _ = count(model, (SIDE, SIDE))
    size = sum(parameter.numel() for parameter in model.parameters())
    (folder / "checkpoint.pt").unlink()  # three quarters of the folder
    return model, [
        *curve.rows(),
        *(row("test", detector.steps, name, value) for name, value in last.items()),
        row("model", detector.steps, "multiply_adds", multiply_adds),
        row("model", detector.steps, "parameters", size),
        row("model", detector.steps, "cpu_seconds_in_all", round(curve.seconds_in_all(), 1)),
    ]


def measure(
    model: BaseDetector, split: str, transform: object, top_k: int, images: int
) -> dict[str, float]:
    """COCO's figures on the first images of a split, and AP without classes as object_ap."""
    dataset = CocoDataset(*find_split(DATA, split), transform)
    dataset.image_ids = dataset.image_ids[:images]
    found = predict_dataset(model, dataset, progress=False, top_k=top_k)
    figures = score(found, dataset).to_dict()
    one = score(*without_classes(found, dataset)).to_dict()
    chosen = {name: figures[name] for name in FIGURES}
    return chosen | {"object_ap": one["ap"], "object_ap50": one["ap50"]}


class Curve:
    """What is measured on val at the end of each epoch, in a file, so that it survives a kill."""

    def __init__(
        self, path: Path, model: BaseDetector, per_epoch: int, evaluation: tuple[object, int]
    ) -> None:
        self.path, self.model, self.per_epoch = path, model, per_epoch
        self.evaluation, self.probe = evaluation, first_images(evaluation[0])
        self.records = {}  # by step; of one that was done twice, the last
        if path.exists():
            lines = map(json.loads, path.read_text().splitlines())
            self.records = {record["step"]: record for record in lines}
        self.began = time.process_time()

    def on_step(self, step: int, losses: dict[str, float]) -> None:
        """Called by the trainer after each step."""
        if step % self.per_epoch:
            return
        seconds = time.process_time() - self.began
        before = self.records.get(step - self.per_epoch, {})
        record = {
            "step": step,
            "cpu_seconds": round(before.get("cpu_seconds", 0) + seconds, 2),
            "loss": round(losses["loss"], 4),
            "matches": matches(self.model, self.probe),
            "val": measure(self.model, "val", *self.evaluation, ON_THE_WAY)
            | effective_keys(self.model, self.probe),
        }
        record["in_all"] = before.get("in_all", 0) + time.process_time() - self.began
        self.began = time.process_time()
        self.records[step] = record
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def seconds_in_all(self) -> float:
        """Of training and measuring, until now."""
        return self.records[max(self.records)]["in_all"] + time.process_time() - self.began

    def rows(self) -> list[dict]:
        """The table's, in the order of steps."""
        rows, before = [], None
        for step, record in sorted(self.records.items()):
            values = {"loss": record["loss"], "cpu_seconds": record["cpu_seconds"]}
            rows += [row("train", step, name, value) for name, value in values.items()]
            rows += [row("val", step, name, value) for name, value in record["val"].items()]
            if before:
                rows.append(row("val", step, "instability", changed(before, record["matches"])))
            before = record["matches"]
        return rows


def first_images(transform: object) -> Batch:
    """The first images of val as one batch."""
    dataset = CocoDataset(*find_split(DATA, "val"), transform)
    return collate([dataset[i] for i in range(min(PROBED, len(dataset)))])


@torch.no_grad()
def matches(model: BaseDetector, batch: Batch) -> list[list[int]]:
    """For each image, the query that the matcher gives to each object, by the last layer."""
    with evaluating(model):
        output = model(batch)
    found = HungarianMatcher()(output, batch.targets, model.scoring)
    return [queries[objects.argsort()].tolist() for queries, objects in found]


def changed(before: list[list[int]], now: list[list[int]]) -> float:
    """The share of objects whose query is another one (DN-DETR, section 3.1)."""
    pairs = [pair for images in zip(before, now, strict=True) for pair in zip(*images, strict=True)]
    return round(sum(a != b for a, b in pairs) / len(pairs), 4)


@torch.no_grad()
def effective_keys(model: BaseDetector, batch: Batch) -> dict[str, float]:
    """Over how many keys or samples the last layers of encoder and decoder spread a query: the
    exponential of the attention's entropy, as its mean over queries and heads."""
    with evaluating(model):
        try:
            with record_sampling(model) as record:
                model(batch)
            weights = {
                name: layers[-1].weights.flatten(-2)
                for name, layers in (("encoder", record.encoder), ("decoder", record.decoder))
            }
        except ValueError:  # nothing samples: it is dense attention
            with record_attention(model) as record:
                model(batch)
            encoder = [n for n in record if n.startswith("encoder")]
            decoder = [n for n in record if n.endswith("cross_attention")]
            last = {"encoder": encoder[-1], "decoder": decoder[-1]}
            weights = {name: record[module].weights for name, module in last.items()}
    entropies = {name: torch.special.entr(each).sum(-1) for name, each in weights.items()}
    return {f"{n}_effective_keys": round(e.exp().mean().item(), 4) for n, e in entropies.items()}
