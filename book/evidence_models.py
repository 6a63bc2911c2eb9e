"""Evidence for claims on detectors: small ones are built and run."""

import torch
from claims import CONDITION, FALSE, ROOT, TRUE, Finding, evidence, judge
from evidence_attention import normal, randomised
from evidence_published import PUBLISHED
from torch import nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from deformable_detr import Batch, DeformableDETR, MSDeformAttn, Target
from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.data.coco import CocoDataset, collate
from deformable_detr.data.transforms import digits_eval_transform
from deformable_detr.evaluation.complexity import complexity
from deformable_detr.layers.reading import tokens_read
from deformable_detr.losses.criterion import SetCriterion
from deformable_detr.models import MODELS, DeformableDETRConfig
from deformable_detr.models.heads import move
from deformable_detr.models.sparse_encoder import choose
from deformable_detr.weights.ours import load_model

SMALL = {
    "num_classes": 3,
    "num_queries": 6,
    "backbone": "small",
    "embed_dim": 32,
    "num_heads": 2,
    "num_points": 2,
    "ffn_dim": 32,
    "dropout": 0.0,
}


def small_detector(name: str = "deformable_detr", **options: object) -> nn.Module:
    config, model = MODELS[name]
    known = {k: v for k, v in SMALL.items() if k in config.__dataclass_fields__}
    torch.manual_seed(0)
    return model(config(**known | options))


def two_images() -> Batch:
    targets = [
        Target(
            i, torch.tensor([i, 2]), torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.3, 0.2]]), s
        )
        for i, s in enumerate(((64, 80), (48, 96)))
    ]
    return Batch.from_images([normal(3, *t.original_size) for t in targets], targets)


@evidence("P8")
def boxes_are_normalised() -> Finding:
    start, delta = torch.tensor([0.9, 0.5, 0.4, 0.1]), torch.zeros(4)
    many = move(start.expand(200, 4), 5 * normal(200, 4))
    edge = cxcywh_to_xyxy(move(start, delta))[2].item()
    value = (
        f"numbers from {many.min():.2f} to {many.max():.2f}; cx = 0.9, w = 0.4 ends at {edge:.1f}"
    )
    return Finding(value, judge(bool((many >= 0).all() and (many <= 1).all()) and edge > 1, TRUE))


@evidence("B3")
def levels_of_an_fpn() -> Finding:
    with torch.device("meta"):
        model = DeformableDETR(DeformableDETRConfig())
    convolutions = [m for m in model.neck.modules() if isinstance(m, nn.Conv2d)]
    value = "all that lies between backbone and tokens: " + ", ".join(
        f"{c.kernel_size[0]} x {c.kernel_size[0]} of {c.in_channels}" for c in convolutions
    )
    shapes = [(c.kernel_size[0], c.in_channels) for c in convolutions]
    return Finding(value, judge(shapes == [(1, 512), (1, 1024), (1, 2048), (3, 2048)], FALSE))


@evidence("B6")
def views_are_averaged() -> Finding:
    model, _ = load_model(ROOT / "data" / "checkpoints" / "digits.safetensors")
    model.eval()
    folder = ROOT / "data" / "samples"
    dataset = CocoDataset(folder, folder / "annotations.json", digits_eval_transform())
    overlaps = []
    for index in range(8):
        batch = collate([dataset[index]])
        mirrored = Batch(batch.images.flip(-1), batch.mask.flip(-1), batch.sizes)
        with torch.no_grad():
            boxes, other = model(batch).boxes[0], model(mirrored).boxes[0].clone()
        other[:, 0] = 1 - other[:, 0]
        wanted = cxcywh_to_xyxy(dataset[index][1].boxes)
        kinds = boxes, other, (boxes + other) / 2
        overlaps.append([box_iou(wanted, cxcywh_to_xyxy(kind)).amax(1).mean() for kind in kinds])
    plain, mirror, both = torch.tensor(overlaps).mean(0).tolist()
    value = f"mean IoU of digits: {plain:.2f} plain, {mirror:.2f} mirrored, {both:.2f} averaged"
    return Finding(value, judge(both < 0.8 * min(plain, mirror), FALSE))


@evidence("N2")
def k_is_4_or_8() -> Finding:
    default, points = (
        DeformableDETRConfig().num_points,
        MSDeformAttn().attention_weights.out_features,
    )
    value = f"K = {default} per head and level in published models, {points} samples per query"
    return Finding(value, judge(default == 4 and points == 128, CONDITION))


@evidence("N7")
def references_are_refined() -> Finding:
    moved = {}
    for refine in (False, True):
        model = randomised(small_detector(refine=refine, encoder_layers=1, decoder_layers=3))
        model.backbone.eval()
        with torch.no_grad():
            output = model(two_images())
        first, last = output.auxiliary[0].references, output.references
        moved[refine] = first.shape != last.shape or not torch.equal(first, last)
    value = f"references move: {moved[False]} in the base, {moved[True]} with refinement"
    return Finding(value, judge(moved[True] and not moved[False], CONDITION))


@evidence("N12")
def every_variant_is_deformable() -> Finding:
    model = small_detector("dense_group_detr", encoder_layers=1, decoder_layers=2).train()
    batch = two_images()
    loss = sum(SetCriterion()(model(batch), batch.targets).values())
    modules = sum(isinstance(m, MSDeformAttn) for m in model.modules())
    row = PUBLISHED["dn_detr"]["rows"][0]
    value = f"{row['model']}: {row['attention']}; Group DETR on DETR: {modules} modules that sample"
    return Finding(
        value, judge(bool(loss.isfinite()) and not modules and row["attention"] == "dense", FALSE)
    )


@evidence("N13")
def sparse_detr_learns_by_reinforcement() -> Finding:
    """Its loss is the cross-entropy of scores, with the tokens that the decoder reads most."""
    model = randomised(small_detector("sparse_detr", rho=0.3, encoder_layers=2, decoder_layers=2))
    model.train().backbone.eval()
    batch, kept = two_images(), []
    original = model.losses
    model.losses = lambda memory: kept.append(memory) or original(memory)
    loss = model(batch).losses["scorer"]
    (memory,) = kept
    read, absent = tokens_read(memory.read, False), memory.padding_mask
    chosen, count = choose(read, absent, memory.keep, 0.3)
    wanted = torch.zeros_like(memory.scores).scatter(1, chosen, count.to(memory.scores))
    terms = F.binary_cross_entropy_with_logits(memory.scores, wanted, reduction="none")
    by_hand = (terms.masked_fill(absent, 0).sum(1) / (~absent).sum(1)).mean()
    gradient = torch.autograd.grad(loss, model.scorer.score[0].weight)[0].abs().max()
    same = torch.isclose(loss, by_hand).item() and gradient > 0
    text = "equal to" if same else "not"
    return Finding(
        f"the scorer's loss: {text} a cross-entropy with known answers", judge(same, FALSE)
    )


@evidence("N14")
def encoders_become_cheaper() -> Finding:
    sizes = {"num_levels": 4, "decoder_layers": 1, "ffn_dim": 128}
    parts = {}
    for name, layers in (("deformable_detr", 6), ("efficient_detr", 3), ("lite_detr", 6)):
        model = small_detector(name, encoder_layers=layers, **sizes)
        parts[name] = complexity(model, (128, 160), repeats=0).parts["encoder"]
    shares = [parts[n] / parts["deformable_detr"] for n in ("efficient_detr", "lite_detr")]
    value = f"the encoder's multiply-adds: {shares[0]:.2f} (Efficient), {shares[1]:.2f} (Lite)"
    return Finding(value, judge(max(shares) < 0.7, TRUE))
