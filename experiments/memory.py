"""Memory and time of one training step at COCO's size, on a CPU: what chapter
training_at_every_size shows.

    python experiments/memory.py            # about 10 minutes of one core; resumes

One process for each configuration, one after the other. Writes data/results/training_sizes.json.
"""

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import resource
import sys
import time

import torch
from digits import PACKAGES, RESULTS, ROOT
from torch import Tensor, nn

from deformable_detr.evaluation.complexity import LiveTensors, make_batch
from deformable_detr.files import write_json
from deformable_detr.losses.criterion import SetCriterion
from deformable_detr.models.deformable_detr import DeformableDETR, DeformableDETRConfig
from deformable_detr.provenance import provenance
from deformable_detr.structures import Batch, Target
from deformable_detr.training.loop import PAPER
from deformable_detr.training.optimiser import parameter_groups
from deformable_detr.training.precision import autocast

BOXES = 7  # of an image; COCO has 7.3 on average
PARTS = ("backbone", "input_proj", "encoder", "decoder")


@dataclasses.dataclass(frozen=True)
class Size:
    """What differs between two measurements; the model is always the paper's with a ResNet-50."""

    height: int = 800
    width: int = 1066
    batch_size: int = 1
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False

    @property
    def name(self) -> str:
        """For a file."""
        kept = "checkpointing" if self.gradient_checkpointing else "plain"
        return f"{self.height}x{self.width}-{self.batch_size}-{self.mixed_precision}-{kept}"


SMALL = Size(400, 533)  # for what is slow here: this CPU has no arithmetic in bfloat16
SIZES = (
    Size(),
    Size(gradient_checkpointing=True),
    Size(600, 800),
    SMALL,
    dataclasses.replace(SMALL, batch_size=2),
    dataclasses.replace(SMALL, gradient_checkpointing=True),
    dataclasses.replace(SMALL, mixed_precision="bf16"),
    dataclasses.replace(SMALL, mixed_precision="bf16", gradient_checkpointing=True),
)


def random_batch(size: Size) -> Batch:
    """Noise with boxes."""
    batch = make_batch((size.height, size.width), size.batch_size)
    shape = (size.height, size.width)
    targets = [
        Target(i, torch.randint(91, (BOXES,)), torch.rand(BOXES, 4) * 0.4 + 0.1, shape)
        for i in range(size.batch_size)
    ]
    return dataclasses.replace(batch, images=torch.randn_like(batch.images), targets=targets)


class Step:
    """A model, its optimiser and a batch, ready for steps as `train` makes them."""

    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)
        self.model = DeformableDETR(DeformableDETRConfig()).train()
        self.model.set_gradient_checkpointing(size.gradient_checkpointing)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, PAPER))
        self.criterion, self.batch = SetCriterion(), random_batch(size)
        self.precision = size.mixed_precision

    def backward(self) -> None:
        """The gradients."""
        self.optimizer.zero_grad()
        with autocast(torch.device("cpu"), self.precision):
            output = self.model(self.batch)
        sum(self.criterion(output.float(), self.batch.targets).values()).backward()

    def __call__(self) -> None:
        """One whole step."""
        self.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), PAPER.clip_norm)
        self.optimizer.step()

    def tensors(self) -> list[Tensor]:
        """All that is alive between two steps, gradients not included."""
        moments = [x for state in self.optimizer.state.values() for x in state.values()]
        own = [*self.model.parameters(), *self.model.buffers(), *moments]
        return [*own, self.batch.images, self.batch.mask]


def digest(model: nn.Module) -> str:
    """Of all gradients, bit by bit."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.grad is not None:
            found.update(parameter.grad.numpy().tobytes())
    return found.hexdigest()[:16]


def watch(model: nn.Module, live: LiveTensors) -> dict[str, int]:
    """For each part, filled as the model runs: the bytes that its forward pass leaves alive."""
    kept = dict.fromkeys(PARTS, 0)

    def enter(part: str) -> None:
        kept[part] -= live.now

    def leave(part: str) -> None:
        kept[part] += live.now

    modules = [(part, getattr(model, part)) for part in PARTS if part != "input_proj"]
    modules += [("input_proj", module) for module in model.neck.input_proj]
    for part, module in modules:
        module.register_forward_pre_hook(lambda *_, part=part: enter(part))
        module.register_forward_hook(lambda *_, part=part: leave(part))
    return kept


def measure(size: Size) -> dict:
    """One step to warm up and to make AdamW's moments, and one that counts."""
    torch.set_num_threads(1)
    step = Step(size)
    step.backward()
    gradients = digest(step.model)
    step.optimizer.step()
    step.optimizer.zero_grad()
    start = time.process_time()
    step()
    seconds = time.process_time() - start
    unit = 1 if sys.platform == "darwin" else 1024
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    step.optimizer.zero_grad()
    with LiveTensors(step.tensors()) as live:
        before, kept = live.now, watch(step.model, live)
        step()
    return dataclasses.asdict(size) | {
        "cpu_seconds": round(seconds, 2),
        "peak_rss": rss,
        "peak_tensors": live.peak,
        "between_steps": before,
        "kept_by_forward": kept,
        "gradients": gradients,
    }


def run(size: Size) -> dict:
    """`measure`, or what it gave before, in a process of its own."""
    done = ROOT / "runs" / "memory" / f"{size.name}.json"
    if not done.exists():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result = pool.apply(measure, (size,))
        done.parent.mkdir(parents=True, exist_ok=True)
        write_json(done, result)
    result = json.loads(done.read_text())
    tensors, rss = (result[key] / 1e9 for key in ("peak_tensors", "peak_rss"))
    print(f"{size.name}: {result['cpu_seconds']} CPU s, tensors {tensors:.2f} GB, RSS {rss:.2f} GB")
    return result


def main() -> None:
    """The command."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(f"{len(SIZES)} configurations, three steps of up to two minutes each")
    runs = [run(size) for size in SIZES]
    about = provenance("python experiments/memory.py", PACKAGES, seed=0)  # its data are noise
    about |= {"threads": 1, "seconds": "of the processor, one step each, beside other work"}
    write_json(RESULTS / "training_sizes.json", about | {"boxes": BOXES, "runs": runs})


if __name__ == "__main__":
    main()
