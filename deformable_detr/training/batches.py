"""Which images make up each step, and how they look in it: by seed and step alone.
Chapter training_at_every_size."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deformable_detr.data.coco import collate
from deformable_detr.interrupts import ignore_interrupt
from deformable_detr.structures import Batch
from deformable_detr.training.config import TrainConfig


def count_steps(images: int, config: TrainConfig, processes: int) -> int:
    """The steps of an epoch, which leaves out a last, smaller batch.

    Raises ValueError where the images are fewer than one batch.
    """
    batch = config.batch_size * config.accumulate * processes
    if images < batch:
        raise ValueError(f"{images} training images are less than a batch of {batch}")
    return images // batch


def load_batches(
    dataset: Dataset,
    config: TrainConfig,
    steps: range,
    steps_per_epoch: int,
    process: int,
    processes: int,
) -> Iterator[list[Batch]]:
    """The config.accumulate batches of one process for each of the steps."""
    loader = DataLoader(
        SeededDataset(dataset, config.seed),
        batch_sampler=BatchOrder(len(dataset), config, steps, steps_per_epoch, process, processes),
        collate_fn=collate,
        num_workers=config.num_workers,
        worker_init_fn=ignore_interrupt,
        generator=torch.Generator(),  # leaves the global random state alone
    )
    batches = iter(loader)
    return iter(lambda: list(islice(batches, config.accumulate)), [])


class BatchOrder:
    """Which samples make up the batches of one process: (epoch, index) pairs.

    A step has config.accumulate batches in each process; together they are the same samples for any
    number of processes and batches that multiply to the same.
    """

    def __init__(
        self,
        length: int,
        config: TrainConfig,
        steps: range,
        steps_per_epoch: int,
        process: int,
        processes: int,
    ) -> None:
        self.length, self.config, self.steps = length, config, steps
        self.steps_per_epoch, self.process, self.processes = steps_per_epoch, process, processes

    def __len__(self) -> int:
        return len(self.steps) * self.config.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        parts = self.config.accumulate * self.processes
        size = self.config.batch_size * parts
        shuffled, order = -1, []
        for step in self.steps:
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != shuffled:
                generator = torch.Generator().manual_seed(self.config.seed * 100_003 + epoch)
                order = torch.randperm(self.length, generator=generator).tolist()
                shuffled = epoch
            chosen = order[position * size : (position + 1) * size]
            for part in range(self.process, parts, self.processes):
                yield [(epoch, index) for index in chosen[part::parts]]


class SeededDataset(Dataset):
    """A data set whose random transforms depend on seed, epoch and index alone."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, object]:
        """The sample `index` as it looks in an epoch; key: (epoch, index)."""
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.seed, epoch, index)))
            return self.dataset[index]
