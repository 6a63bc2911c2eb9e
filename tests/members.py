"""Small members of the family, and what their tests have in common."""

import dataclasses

import torch

from deformable_detr import Batch, Target
from deformable_detr.models import MODELS

SIZES = dict(
    num_classes=3,
    num_queries=6,
    backbone="small",
    num_levels=3,
    embed_dim=32,
    num_heads=2,
    num_points=2,
    encoder_layers=2,
    decoder_layers=3,
    ffn_dim=32,
    dropout=0.0,
)
OTHERS: dict[str, dict] = {  # options that differ from a member's defaults, beside SIZES
    "deformable_detr": {"refine": True},
    "efficient_detr": {"encoder_layers": 3, "decoder_layers": 1},
}


def tiny(name, **changes):
    """A small configuration of a member."""
    kind = MODELS[name][0]
    known = {field.name for field in dataclasses.fields(kind)}
    sizes = {key: value for key, value in SIZES.items() if key in known}
    return kind(**sizes | OTHERS.get(name, {}) | changes)


def build(config, kind=None, seed=0):
    """A model whose numbers are not the special ones of an untrained one; its batch norms do not
    look at the batch."""
    torch.manual_seed(seed)
    model = (kind or MODELS_BY_CONFIG[type(config)])(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.backbone.eval()
    return model


MODELS_BY_CONFIG = dict(MODELS.values())


def make_batch(*counts, seed=1, sizes=((64, 80), (48, 96), (56, 40))):
    """Images of unlike sizes with so many objects each."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(3, *size, generator=generator) for size in sizes[: len(counts)]]
    targets = [
        Target(
            i,
            torch.randint(3, (n,), generator=generator),
            torch.rand(n, 4, generator=generator) * 0.3 + 0.2,
            sizes[i],
        )
        for i, n in enumerate(counts)
    ]
    return Batch.from_images(images, targets)


def padded_more(tokens, right=3, below=2):
    """The same tokens on larger maps, whose new cells hold rubbish and count as padding."""
    levels, start = [], 0
    for (height, width), ratio in zip(
        tokens.spatial_shapes, tokens.valid_ratios.unbind(1), strict=True
    ):
        part, start = slice(start, start + height * width), start + height * width
        H, W = height + below, width + right
        level = []
        for x, rubbish in ((tokens.features, 7.0), (tokens.position, -5.0)):
            larger = torch.full((len(x), H, W, x.shape[-1]), rubbish)
            larger[:, :height, :width] = x[:, part].unflatten(1, (height, width))
            level.append(larger.flatten(1, 2))
        mask = torch.ones(len(level[0]), H, W, dtype=torch.bool)
        mask[:, :height, :width] = tokens.padding_mask[:, part].unflatten(1, (height, width))
        levels.append((*level, mask.flatten(1), ratio * torch.tensor([width / W, height / H])))
    features, position, mask = (torch.cat([level[i] for level in levels], 1) for i in range(3))
    shapes = [(h + below, w + right) for h, w in tokens.spatial_shapes]
    ratios = torch.stack([level[3] for level in levels], 1)
    return dataclasses.replace(
        tokens,
        features=features,
        position=position,
        padding_mask=mask,
        spatial_shapes=shapes,
        valid_ratios=ratios,
    )


def output_of(model, batch, tokens=None, seed=5):
    """What a model says of a batch, or of these tokens in its place, with these random numbers."""
    torch.manual_seed(seed)
    if tokens is None:
        return model(batch)
    model.tokens = lambda _: tokens
    try:
        return model(batch)
    finally:
        del model.tokens


def without_gradient(model, losses):
    """The parameters that no term of the loss reaches."""
    model.zero_grad()
    sum(losses.values()).backward()
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
