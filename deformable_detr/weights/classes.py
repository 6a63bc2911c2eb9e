"""Classes are found by their names: a model for other classes keeps what it knows. Chapter
published_weights.

A class head has one row of numbers for each class. The same ten names in another order are the same
rows in another order; ten other names have nothing to keep.
"""

import dataclasses
from collections import defaultdict
from dataclasses import dataclass, field

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from deformable_detr.data.names import counted, printable
from deformable_detr.models import BaseDetector, build_model
from deformable_detr.models.base import DetectorConfig
from deformable_detr.models.heads import ClassHead

Rows = list[int | None]  # for each class the row that it had, None where it is new
SHOWN = 8  # names, in a message


@dataclass
class Adaptation:
    """What became of a model that was fitted to other classes or queries.

    kept: the tensors that are as they were. fresh: the others, by name, and what of them was kept.
    kept_classes, new_classes: the names of classes whose rows in the class heads were kept, and
    were made anew.
    """

    kept: list[str] = field(default_factory=list)
    fresh: dict[str, str] = field(default_factory=dict)
    kept_classes: list[str] = field(default_factory=list)
    new_classes: list[str] = field(default_factory=list)

    def classes(self) -> str:
        """What became of the classes, in one line or two."""
        lines = ("classes kept", self.kept_classes), ("classes made anew", self.new_classes)
        return "\n".join(f"{what}: {_few(names)}" for what, names in lines if names)

    def __str__(self) -> str:
        total = len(self.kept) + len(self.fresh)
        lines = [f"kept {len(self.kept)} of {total} tensors as they were"]
        return "\n".join(
            [*lines, *(f"  {name}: {why}" for name, why in self.fresh.items()), self.classes()]
        )


def with_classes(
    model: BaseDetector,
    from_categories: list[dict] | None,
    to_categories: list[dict],
    num_queries: int | None = None,
) -> tuple[BaseDetector, Adaptation]:
    """The model for other classes, and what became of its tensors and classes.

    from_categories: {"id": ..., "name": str} of the model's classes, in the order of its labels;
    None where nobody knows their names, so that none can be kept. to_categories: of those wanted. A
    class of the same name keeps its row, whatever its id; others start with the prior of the
    model's scoring. num_queries: of learned queries as many are kept as there are in both. Where
    nothing changes, the model itself is returned. ValueError where from_categories are not as many
    as the model's classes.
    """
    config = model.config
    if from_categories is not None and len(from_categories) != config.num_classes:
        given = counted(len(from_categories), "category")
        raise ValueError(f"the model has {counted(config.num_classes, 'class')}, got {given}")
    rows = _rows(from_categories or [], to_categories)
    wanted = dataclasses.replace(
        config, num_classes=len(rows), num_queries=num_queries or config.num_queries
    )
    names = [category["name"] for category in to_categories]
    report = Adaptation(
        kept_classes=[name for name, row in zip(names, rows, strict=True) if row is not None],
        new_classes=[name for name, row in zip(names, rows, strict=True) if row is None],
    )
    if wanted == config and rows == list(range(config.num_classes)):
        report.kept = list(model.state_dict())
        return model, report
    new = build_model(wanted)
    _carry_over(model, new, rows, report)
    widest = max(model.parameters(), key=lambda p: p.dtype.itemsize)  # of bfloat16 beside float32
    return new.to(widest).train(model.training), report


def plain_categories(num_classes: int) -> list[dict]:
    """Categories for labels whose names are not known: COCO's where there are 91, else numbers."""
    names = [f"class {i}" for i in range(num_classes)]
    if num_classes == DetectorConfig.num_classes:
        names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return [{"id": i, "name": name} for i, name in enumerate(names)]


def _rows(known: list[dict], wanted: list[dict]) -> Rows:
    """Of several classes of one name, such as COCO's unused "N/A", the first becomes the first."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, category in enumerate(known):
        rows[category["name"]].append(row)
    return [rows[c["name"]].pop(0) if rows[c["name"]] else None for c in wanted]


def _carry_over(old: BaseDetector, new: BaseDetector, rows: Rows, report: Adaptation) -> None:
    """Copy into a new model all tensors of an old one that fit, and of the others' rows those that
    stay."""
    before = old.state_dict()
    heads = {name: head for name, head in new.named_modules() if isinstance(head, ClassHead)}
    for name, tensor in new.state_dict().items():
        source = list(range(len(before[name]))) if tensor.ndim else []
        head = heads.get(name.rpartition(".")[0])
        if head is not None:
            source = _head_rows(head, rows, old.config.num_classes, len(before[name]))
        elif tensor.shape != before[name].shape:  # learned queries
            source = [i if i < len(before[name]) else None for i in range(len(tensor))]
        if tensor.shape == before[name].shape and source == list(range(len(source))):
            tensor.copy_(before[name])
            report.kept.append(name)
            continue
        kept = [i for i, row in enumerate(source) if row is not None]
        tensor[kept] = before[name][[source[i] for i in kept]].to(tensor)
        sizes = f"{tuple(before[name].shape)} before, {tuple(tensor.shape)} now"
        report.fresh[name] = f"{len(kept)} of {len(tensor)} rows kept: {sizes}"


def _head_rows(head: ClassHead, rows: Rows, classes_before: int, outputs_before: int) -> Rows:
    """Where each row of a class head comes from.

    What is beyond the classes, such as the logit of no object, stays behind them. A head that only
    tells objects from background does so by row 0, which stays in its place.
    """
    source = [*rows, *range(classes_before, outputs_before)]
    return [0, *source[1:]] if head.class_agnostic else source


def _few(names: list[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(map(printable, names[:SHOWN])) + more
