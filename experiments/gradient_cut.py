"""Iterative refinement with its gradient cut between layers, as in the paper, and without the cut.

    python experiments/gradient_cut.py        # about two minutes of one core

Backbone and encoder are those of the shipped detector, and stay as they are. Only what follows them
is trained, from nothing: learned queries and six decoder layers, which refine their boxes; 150
steps, several seeds. Chapter refinement shows what comes of it.
Writes data/results/gradient_cut.json.
"""

import argparse
import dataclasses
from dataclasses import dataclass

import torch
from digits import CHECKPOINTS, DATA, PACKAGES, RESULTS, load_split
from torch import nn

from deformable_detr.data.coco import CocoDataset, collate
from deformable_detr.data.transforms import digits_eval_transform
from deformable_detr.files import write_json
from deformable_detr.losses.criterion import SetCriterion
from deformable_detr.models.decoder import RefiningDecoder
from deformable_detr.models.deformable_detr import DeformableDETR, DeformableDETRConfig
from deformable_detr.provenance import provenance
from deformable_detr.structures import Target, Tokens
from deformable_detr.training.optimiser import lr_factor
from deformable_detr.training.recipe import load_recipe
from deformable_detr.weights.ours import load_model

SEEDS = (0, 1, 2)
LAYERS, STEPS, BATCH, TRAIN, VAL, MEAN_OF = 6, 150, 4, 240, 120, 10
TERMS = ("loss_giou_0", "loss_giou", "gradient_norm")  # first and last layer; before clipping


@dataclass
class Encoded:
    """What a batch is after the encoder."""

    memory: Tokens
    targets: list[Target]

    def __len__(self) -> int:
        return len(self.targets)

    def part(self, places: torch.Tensor) -> "Encoded":
        """Some of the images."""
        fields = ("features", "position", "padding_mask", "valid_ratios")
        rows = {name: getattr(self.memory, name)[places] for name in fields}
        memory = dataclasses.replace(self.memory, **rows)
        return Encoded(memory, [self.targets[i] for i in places.tolist()])


class OnMemory(DeformableDETR):
    """The detector after its encoder: it is given `Encoded` images."""

    def tokens(self, batch):
        """The memory."""
        return batch.memory

    def encode(self, tokens):
        """The memory is encoded already."""
        return tokens, {}


class OpenDecoder(RefiningDecoder):
    """Each layer starts from the last one's boxes, and its gradient flows back through them."""

    def next_references(self, queries, delta, boxes, box_head):
        """The boxes, not detached."""
        return boxes, boxes


class OpenOnMemory(OnMemory):
    """The same without the cut."""

    def make_decoder(self, layers):
        """The decoder above."""
        return OpenDecoder(layers)


VARIANTS = {"cut": OnMemory, "open": OpenOnMemory}


@torch.no_grad()
def encoded(shipped: DeformableDETR, dataset: CocoDataset) -> Encoded:
    """All images of a data set as the shipped detector's memory."""
    memories, targets = [], []
    for start in range(0, len(dataset), 20):
        batch = collate([dataset[i] for i in range(start, min(start + 20, len(dataset)))])
        memories.append(shipped.encode(shipped.tokens(batch))[0])
        targets += batch.targets
    names = ("features", "position", "padding_mask", "valid_ratios")
    joined = {name: torch.cat([getattr(memory, name) for memory in memories]) for name in names}
    return Encoded(dataclasses.replace(memories[0], **joined), targets)


def learn(model: DeformableDETR, data: Encoded, seed: int) -> list[list[float]]:
    """Train what follows the encoder; TERMS at every step."""
    config = dataclasses.replace(load_recipe("digits").train, epochs=1)
    criterion, history = SetCriterion(), []
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=config.lr, weight_decay=config.weight_decay)
    order = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = config.lr * lr_factor(step, STEPS, STEPS, config)
        batch = data.part(torch.randint(len(data), (BATCH,), generator=order))
        losses = criterion(model(batch), batch.targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        norm = nn.utils.clip_grad_norm_(learning, config.clip_norm)
        optimizer.step()
        measured = {name: loss.item() for name, loss in losses.items()} | {"gradient_norm": norm}
        history.append([float(measured[name]) for name in TERMS])
    return history


@torch.no_grad()
def measure(model: DeformableDETR, data: Encoded) -> dict[str, float]:
    """The GIoU loss of the first and of the last layer on pictures that were not trained on."""
    losses = SetCriterion()(model(data), data.targets)
    return {name: round(losses[name].item(), 4) for name in TERMS[:2]}


def run(variant: str, seed: int, shape: DeformableDETRConfig, train: Encoded, val: Encoded) -> dict:
    """Train one decoder on `train` and measure it on `val`."""
    torch.manual_seed(seed)
    model = VARIANTS[variant](shape)
    for part in (model.backbone, model.neck, model.encoder):
        part.requires_grad_(False)  # they are never called
    terms = learn(model, train, seed)
    means = torch.tensor(terms).unfold(0, MEAN_OF, MEAN_OF).mean(-1)  # (STEPS / MEAN_OF, terms)
    curves = {name: [round(x, 4) for x in means[:, i].tolist()] for i, name in enumerate(TERMS)}
    result = {"variant": variant, "seed": seed, "val": measure(model.eval(), val), "curves": curves}
    print(variant, seed, result["val"], flush=True)
    return result


def main() -> None:
    """The command."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    shipped = load_model(CHECKPOINTS / "digits.safetensors")[0].eval()
    memories = []
    for name, count in (("train", TRAIN), ("val", VAL)):
        images = load_split(name, digits_eval_transform())
        images.image_ids = images.image_ids[:count]
        memories.append(encoded(shipped, images))
    shape = dataclasses.replace(shipped.config, two_stage=False, decoder_layers=LAYERS)
    runs = [run(variant, seed, shape, *memories) for seed in SEEDS for variant in VARIANTS]
    about = provenance("python experiments/gradient_cut.py", PACKAGES, data=DATA)
    about |= {"steps": STEPS, "layers": LAYERS, "steps_per_point": MEAN_OF, "runs": runs}
    write_json(RESULTS / "gradient_cut.json", about)


if __name__ == "__main__":
    main()
