"""Outputs and gradients against Hugging Face's Deformable DETR with the same random weights."""

from collections import defaultdict

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from deformable_detr import Batch, DeformableDETR, DeformableDETRConfig, Target
from deformable_detr.losses.criterion import SetCriterion
from deformable_detr.weights.formats import file_name, to_huggingface

transformers = pytest.importorskip("transformers", minversion="5.0")

VARIANTS = {
    "base": {},
    "single_scale": {"num_levels": 1},
    "dc5": {"num_levels": 1, "dilation": True},
    "refine": {"refine": True},
    "two_stage": {"refine": True, "two_stage": True},
}


def randomise(model, seed=0):
    """Weights that exercise everything: no zero biases, no uniform attention, no uniform norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif "norm" in name or "bn" in name or "downsample.1" in name:
                noise = torch.randn(tensor.shape, generator=generator) * 0.1
                tensor.copy_(noise + (1 if name.endswith("weight") else 0))
            elif tensor.ndim > 1:
                tensor.copy_(tensor + torch.randn(tensor.shape, generator=generator) * 0.02)
            else:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)


def huggingface_model(config):
    backbone = transformers.TimmBackboneConfig(
        backbone=config.backbone,
        use_pretrained_backbone=False,
        freeze_batch_norm_2d=False,
        out_indices=[4] if config.num_levels == 1 else [2, 3, 4],
        **({"output_stride": 16} if config.dilation else {}),
    )
    theirs = transformers.DeformableDetrConfig(
        backbone_config=backbone,
        dilation=config.dilation,
        num_labels=config.num_classes,
        num_queries=config.num_queries,
        num_feature_levels=config.num_levels,
        d_model=config.embed_dim,
        encoder_attention_heads=config.num_heads,
        decoder_attention_heads=config.num_heads,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        encoder_ffn_dim=config.ffn_dim,
        decoder_ffn_dim=config.ffn_dim,
        encoder_n_points=config.num_points,
        decoder_n_points=config.num_points,
        with_box_refine=config.refine,
        two_stage=config.two_stage,
        two_stage_num_proposals=config.num_queries,
        auxiliary_loss=True,
        tie_word_embeddings=False,
    )
    return transformers.DeformableDetrForObjectDetection(theirs).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_weights_same_output(variant):
    torch.manual_seed(0)
    config = DeformableDETRConfig(num_classes=17, num_queries=50, **VARIANTS[variant])
    ours = DeformableDETR(config).eval()
    randomise(ours)
    theirs = huggingface_model(config)
    state, _ = to_huggingface(ours)
    names = {name: file_name(name) for name in theirs.state_dict()}
    assert set(names.values()) == state.keys()
    theirs.load_state_dict({name: state[stored] for name, stored in names.items()})

    batch = Batch.from_images([torch.randn(3, 170, 150), torch.randn(3, 121, 203)])
    with torch.no_grad():
        output = ours(batch)
        expected = theirs(pixel_values=batch.images, pixel_mask=(~batch.mask).long())
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.boxes, expected.pred_boxes, atol=1e-4, rtol=0)
    assert output.logits.std() > 0.05  # the weights do say something


def corners(boxes):
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def giou(one, other):
    """Of every pair, (N, M), from cxcywh: area by area, as Rezatofighi et al. define it."""
    a, b = corners(one)[:, None], corners(other)[None]

    def area(x):
        return (x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1)

    both = torch.cat(
        [torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], -1
    )
    hull = torch.cat(
        [torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], -1
    )
    union = area(a) + area(b) - area(both)
    return area(both) / union - (area(hull) - union) / area(hull)


def official_loss(logits, boxes, labels, truth, num_boxes):
    """2 focal + 5 L1 + 2 GIoU of one layer, after matching by the same three, in plain steps."""
    total = 0
    for i, (label, box) in enumerate(zip(labels, truth, strict=True)):
        p = logits[i].sigmoid()
        positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
        negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
        distance = (boxes[i][:, None] - box[None]).abs().sum(-1)
        cost = 2 * (positive - negative)[:, label] + 5 * distance - 2 * giou(boxes[i], box)
        queries, objects = linear_sum_assignment(cost.detach().numpy())
        target = torch.zeros_like(logits[i])
        target[queries, label[objects]] = 1
        agreement = p * target + (1 - p) * (1 - target)
        weight = 0.25 * target + 0.75 * (1 - target)
        total = total - 2 * (weight * (1 - agreement) ** 2 * agreement.log()).sum()
        total = total + 5 * distance[queries, objects].sum()
        total = total + 2 * (1 - giou(boxes[i], box)[queries, objects]).sum()
    return total / num_boxes


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_weights_same_gradient_of_every_parameter(variant):
    """Their network under the official loss, worked out here: theirs of transformers is another."""
    torch.manual_seed(0)
    config = DeformableDETRConfig(
        num_classes=17, num_queries=20, encoder_layers=2, decoder_layers=3, **VARIANTS[variant]
    )
    ours = DeformableDETR(config).eval()
    randomise(ours)
    theirs = huggingface_model(config)
    state, _ = to_huggingface(ours)
    theirs.load_state_dict({name: state[file_name(name)] for name in theirs.state_dict()})
    ours, theirs = ours.double(), theirs.double()
    labels = [torch.tensor([3, 0, 16]), torch.tensor([], dtype=torch.int64)]
    truth = [torch.rand(n, 4, dtype=torch.float64) * 0.3 + 0.3 for n in (3, 0)]
    images = [torch.randn(3, h, w, dtype=torch.float64) for h, w in ((110, 90), (70, 135))]
    targets = [Target(i, *pair, (1, 1)) for i, pair in enumerate(zip(labels, truth, strict=True))]
    batch = Batch.from_images(images, targets)

    def loss_function(logits, labels, device, boxes, config, all_logits, all_boxes):
        return (
            sum(
                official_loss(*layer, labels, truth, 3)
                for layer in zip(all_logits, all_boxes, strict=True)
            ),
            {},
            [],
        )

    theirs.loss_function = loss_function
    found = theirs(pixel_values=batch.images, pixel_mask=(~batch.mask).long(), labels=labels)
    expected = found.loss
    if config.two_stage:
        first = found.enc_outputs_class, found.enc_outputs_coord_logits.sigmoid()
        expected = expected + official_loss(*first, [x * 0 for x in labels], truth, 3)
    expected.backward()
    loss = sum(SetCriterion()(ours(batch), targets).values())
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-5)
    loss.backward()

    assert all((p.grad is not None) == p.requires_grad for p in ours.parameters())
    with torch.no_grad():  # the gradients, under their names
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad if parameter.requires_grad else torch.zeros(()))
    gradients, _ = to_huggingface(ours)
    frozen = ("model.conv1", "model.bn1", "model.layer1")
    copies = defaultdict(list)  # of ours, theirs has one for each layer that uses it
    for name, parameter in theirs.named_parameters():
        if not any(part in name for part in frozen):
            copies[gradients[file_name(name)].data_ptr()].append((name, parameter))
    for same in copies.values():
        name, gradient = same[0][0], gradients[file_name(same[0][0])]
        parts = [parameter.grad for _, parameter in same if parameter.grad is not None]
        scale = gradient.abs().max().item()
        if name.endswith("k_proj.bias"):  # zero but for rounding: a softmax does not see it
            scale = 1e-6
        assert scale > 0, name
        torch.testing.assert_close(
            gradient, sum(parts), rtol=0, atol=1e-4 * scale, msg=name, check_dtype=False
        )
