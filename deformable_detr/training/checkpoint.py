"""Which run a checkpoint is of, and reading one of any age. Chapter training_at_every_size.

A checkpoint is what `Training.state_dict` gives, the random states of every process, and the
run's identity: what must be the same in a run and its resumption.
"""

import dataclasses
from pathlib import Path

from deformable_detr.data.coco import CocoDataset
from deformable_detr.data.names import counted
from deformable_detr.files import first_line
from deformable_detr.models import DEFAULT, MODELS, BaseDetector, model_name
from deformable_detr.training.config import TrainConfig
from deformable_detr.training.optimiser import GROUPS, group_of
from deformable_detr.weights.ours import upgrade_name
from deformable_detr.weights.reading import read_pickle, tensors_of

MAY_CHANGE = {  # between a run and its resumption
    "num_workers",
    "checkpoint_minutes",
    "patience",
    "gradient_checkpointing",
}

EPOCHS = "recipe epochs"


def described(recipe: TrainConfig, model: object) -> dict:
    """A run's options, but for those that may change on the way. model: a configuration of one of
    MODELS."""
    options = {
        f"recipe {key}": value
        for key, value in dataclasses.asdict(recipe).items()
        if key not in MAY_CHANGE
    }
    options |= {f"model {key}": value for key, value in dataclasses.asdict(model).items()}
    return {"model": model_name(model)} | options


def identify(
    recipe: TrainConfig, model: object, card: dict, dataset: CocoDataset, processes: int
) -> dict:
    """What must be the same in a run and its resumption: options, data and processes."""
    return {
        **described(recipe, model),
        **{f"data {key}": value for key, value in card.items()},
        "training images": len(dataset),
        "categories": [[c["id"], c["name"]] for c in dataset.categories],
        "processes": processes,
    }


def read_checkpoint(path: Path, identity: dict, model: BaseDetector) -> dict:
    """A checkpoint of the run with this identity, as one is written today.

    Raises ValueError where the file is no checkpoint, or of another run: then it says what differs.
    """
    try:
        saved = read_pickle(path)
        tensors_of(saved["model"], path)
        before = completed(saved["identity"], identity)
    except Exception as error:
        reason = first_line(error).rpartition(f"{path} is not a readable file of weights: ")[2]
        raise ValueError(
            f"{path} is no checkpoint of ours ({reason}): "
            "delete it, or start anew without resuming (--fresh)"
        ) from None
    changed = differences(before, identity)
    if len(changed) == 1 and changed[0].startswith(EPOCHS):
        epochs = counted(before[EPOCHS], "epoch")
        raise ValueError(
            f"{path} is of this run with {epochs}, at step {saved['step']}: it is "
            f"continued for more epochs, not for fewer, got {identity[EPOCHS]}. Its weights so far "
            "are in last.safetensors; --fresh starts anew"
        )
    if changed:
        raise ValueError(
            f"{path} is of another run: {'; '.join(changed)}. Give another folder, "
            "start anew (--fresh), or train on from last.safetensors (--init)"
        )
    return upgraded(saved | {"identity": before}, identity, model)


def completed(before: dict, now: dict) -> dict:
    """A checkpoint's identity with the options that are newer than it: they had the effect of their
    defaults. What had no model's name was the first of MODELS."""
    name = before.get("model", DEFAULT)
    if name not in MODELS:
        raise ValueError(f"it is of a model {name!r}, known are {', '.join(MODELS)}")
    defaults = described(TrainConfig(), MODELS[name][0]())
    return defaults | {"categories": now["categories"]} | before


def differences(before: dict, now: dict) -> list[str]:
    """What differs between two identities; of another model, its options are not worth a word. More
    epochs are no difference: they continue a run."""
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if before[EPOCHS] < now[EPOCHS]:
        changed.remove(EPOCHS)
    if "model" in changed:
        changed = [key for key in changed if not key.startswith("model ")]
    if "data transforms" in changed:  # of which not all have a short side
        changed = [key for key in changed if key != "data short_side"]
    return [f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed]


def upgraded(saved: dict, identity: dict, model: BaseDetector) -> dict:
    """A checkpoint as it is written today, from one of any age.

    Once the optimiser's state was by numbers, and some parameters had other names.
    """
    batch = identity["recipe batch_size"] * identity["recipe accumulate"] * identity["processes"]
    epoch = saved["step"] // (identity["training images"] // batch)
    newer = {"stale": 0, "scaler": {}, "best_epoch": 0, "threshold": None}
    saved = newer | {"epochs_ended": epoch} | saved
    if "param_groups" not in saved["optimizer"]:
        return saved
    names = {old: upgrade_name(old, model.config) for old in saved["model"]}
    saved["optimizer"] = by_name(saved["optimizer"]["state"], names, model)
    saved["model"] = {names[old]: tensor for old, tensor in saved["model"].items()}
    if "average" in saved:
        inner = {f"module.{old}": f"module.{new}" for old, new in names.items()}
        saved["average"] = {inner.get(old, old): x for old, x in saved["average"].items()}
    return saved


def by_name(
    numbered: dict[int, dict], names: dict[str, str], model: BaseDetector
) -> dict[str, dict]:
    """An optimiser's state by today's names of parameters.

    numbered: by place in `parameter_groups` of the parameters in their old order. names: today's
    for each old one, in the old order, which buffers share.
    """
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    trained = [old for old, new in names.items() if new in learning]
    order = sorted(trained, key=lambda old: GROUPS.index(group_of(old)))  # stable: else as it was
    return {names[order[number]]: state for number, state in numbered.items()}
