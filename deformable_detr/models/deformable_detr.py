"""Deformable DETR: backbone, encoder, decoder and heads as one module (chapter 8)."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deformable_detr.backbones import build_backbone
from deformable_detr.layers.attention import MSDeformAttn
from deformable_detr.layers.position import build_position_encoding
from deformable_detr.layers.stack import Stack
from deformable_detr.models.transformer import (
    DeformableDecoder,
    DeformableEncoder,
    FirstStage,
    in_full,
)
from deformable_detr.structures import Batch, Output, Tokens

PRIOR = 0.01  # of an object, for every class of every query, before training (Lin et al., 2017)


@dataclass(frozen=True)
class DeformableDETRConfig:
    """Everything that decides a detector's shape; the defaults are the paper's base model.

    backbone: "small" or a torchvision ResNet. dilation: the last stage at stride 16 (DC5).
    num_levels: 1 uses the backbone's last map, 2 and 3 its last maps, and each level beyond is a
    convolution of stride 2 on the one before. refine: iterative box refinement. two_stage: queries
    from the encoder's proposals; needs refine. anchor_size: the side, as a part of the image's, of
    the boxes that proposals start from on the finest level; it doubles on each next one. The
    official 0.05 suits stride 8 on images of 800 pixels and more. deformable_stages: how many of a
    ResNet's last stages have deformable convolutions, to 3. position: "sine" or "learned", the
    latter for maps of up to position_size rows and columns.
    """

    num_classes: int = 91
    num_queries: int = 300
    backbone: str = "resnet50"
    dilation: bool = False
    num_levels: int = 4
    embed_dim: int = 256
    num_heads: int = 8
    num_points: int = 4
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn_dim: int = 1024
    dropout: float = 0.1
    position: str = "sine"
    refine: bool = False
    two_stage: bool = False
    anchor_size: float = 0.05
    deformable_stages: int = 0
    position_size: int = 50

    def __post_init__(self) -> None:
        if self.two_stage and not self.refine:
            raise ValueError("two_stage needs refine=True: the proposals are boxes to be refined")
        counts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type is int}
        counts.pop("deformable_stages")  # may be 0, and is the backbone's to check
        wrong = {name: value for name, value in counts.items() if value < 1}
        if wrong:
            raise ValueError(f"these must be at least 1: {wrong}")


class DeformableDETR(nn.Module):
    """The detector of "Deformable DETR: Deformable Transformers for End-to-End Object Detection".

    Variants by config: single-scale (num_levels=1), DC5, refinement, two-stage. pretrained_backbone
    loads torchvision's ImageNet weights.
    """

    def __init__(self, config: DeformableDETRConfig, pretrained_backbone: bool = False) -> None:
        super().__init__()
        self.config = config
        C = config.embed_dim
        self.backbone = build_backbone(
            config.backbone, config.dilation, pretrained_backbone, config.deformable_stages
        )
        self.input_proj = build_input_projections(self.backbone.channels, config.num_levels, C)
        self.position = build_position_encoding(config.position, C, config.position_size)
        self.level_embed = nn.Parameter(torch.empty(config.num_levels, C))

        layer = (C, config.num_levels, config.num_heads, config.num_points)
        layer += (config.ffn_dim, config.dropout)
        self.encoder = DeformableEncoder(config.encoder_layers, *layer)
        self.decoder = DeformableDecoder(config.decoder_layers, *layer)
        if config.two_stage:
            self.first_stage = FirstStage(C, config.anchor_size)
        else:
            self.query_embed = nn.Embedding(config.num_queries, 2 * C)  # position, then content
            self.reference_points = nn.Linear(C, 2)

        # one head for all layers, or with refinement one each, and one more for the first stage
        heads = config.decoder_layers + config.two_stage if config.refine else 1
        self.class_heads = nn.ModuleList(nn.Linear(C, config.num_classes) for _ in range(heads))
        self.box_heads = nn.ModuleList(BoxHead(C) for _ in range(heads))
        self.reset_parameters()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: Path | str,
        num_classes: int | None = None,
        num_queries: int | None = None,
        **changes: object,
    ) -> "DeformableDETR":
        """A published detector, or one of ours, in evaluation mode: "SenseTime/deformable-detr",
        a folder, an official .pth, a .safetensors file; see `pretrained.load_pretrained`."""
        from deformable_detr.weights.published import load_pretrained  # which imports this file

        return load_pretrained(name_or_path, num_classes, num_queries, **changes).model

    def save_pretrained(
        self, path: Path | str, categories: list[dict] | None = None, format: str = "ours"
    ) -> None:
        """Write this model, as "ours", "huggingface" or "official"; see `pretrained`."""
        from deformable_detr.weights.published import save_pretrained

        save_pretrained(self, path, categories, format)

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Whether training computes the stages of a ResNet and the layers of encoder and decoder
        again in the backward pass, instead of keeping what is inside them."""
        for module in self.modules():
            if isinstance(module, Stack):
                module.gradient_checkpointing = on

    def reset_parameters(self) -> None:
        """The official initialisation; the backbone's own is left alone."""
        parts = [self.encoder, self.decoder]
        parts.append(self.first_stage if self.config.two_stage else self.reference_points)
        for part in parts:
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        if not self.config.two_stage:
            nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)
        for head in self.class_heads:
            nn.init.constant_(head.bias, -math.log((1 - PRIOR) / PRIOR))
        for head in self.box_heads:
            head.reset_last_layer()
        # from a point: start with boxes of sigmoid(-2) = 0.12, as the official code; A.4 says 0.1
        if not self.config.two_stage:
            nn.init.constant_(self.box_heads[0].layers[-1].bias[2:], -2.0)

    def forward(self, batch: Batch) -> Output:
        """Class logits and boxes of every query, for every decoder layer.

        batch.images: (B, 3, H, W), normalised as the backbone expects. Boxes come relative to each
        image without its padding. Raises ValueError on other shapes.
        """
        tokens = self.tokens(batch)
        memory = self.encoder(tokens)
        queries, query_position, references, first_stage = self.queries(memory, tokens)
        layers = self.decoder(
            queries,
            query_position,
            references,
            memory,
            tokens,
            self._heads(self.box_heads),
            self.config.refine,
        )
        outputs = [
            Output(class_head(queries), boxes, references=references)
            for class_head, (queries, boxes, references) in zip(
                self._heads(self.class_heads), layers, strict=True
            )
        ]
        return dataclasses.replace(outputs[-1], auxiliary=outputs[:-1], first_stage=first_stage)

    def tokens(self, batch: Batch) -> Tokens:
        """The backbone's maps and the levels above them, as one sequence with positions."""
        if batch.images.ndim != 4 or batch.images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(batch.images.shape)}")
        if batch.mask.shape != (len(batch.images), *batch.images.shape[2:]):
            given = f"mask {tuple(batch.mask.shape)} for images {tuple(batch.images.shape)}"
            raise ValueError(f"mask must be (B, H, W), got {given}")
        maps = self.backbone(batch.images)[-self.config.num_levels :]
        features, positions, masks, shapes, ratios = [], [], [], [], []
        last = maps[-1]
        for level, projection in enumerate(self.input_proj):
            if level < len(maps):
                feature = projection(maps[level])
            else:  # the first extra level sees the backbone's raw output, the next ones the last
                feature = last = projection(last)
            shape = feature.shape[-2:]
            mask = F.interpolate(batch.mask[None].float(), size=shape)[0].bool()
            position = self.position(mask).to(feature) + self.level_embed[level, :, None, None]
            features.append(feature.flatten(2).transpose(1, 2))  # (B, H_l * W_l, C)
            positions.append(position.flatten(2).transpose(1, 2))
            masks.append(mask.flatten(1))
            shapes.append(tuple(shape))
            ratios.append(valid_ratio(mask))
        return Tokens(
            torch.cat(features, 1),
            torch.cat(positions, 1),
            torch.cat(masks, 1),
            shapes,
            torch.stack(ratios, 1).to(self.level_embed),  # not to autocast's precision
        )

    def queries(
        self, memory: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor, Tensor, Output | None]:
        """What the decoder starts from: queries and their position, (B, Q, C) each, references
        (B, Q, 2 or 4), and in the two-stage model the first stage's output."""
        if not self.config.two_stage:
            position, queries = self.query_embed.weight.chunk(2, dim=-1)
            references = in_full(self.reference_points, position).sigmoid()
            batch = len(memory)
            return (*(x.expand(batch, -1, -1) for x in (queries, position, references)), None)
        logits, boxes = self.first_stage.propose(
            memory, tokens, self.class_heads[-1], self.box_heads[-1]
        )
        selected = self.first_stage.select(logits, boxes, self.config.num_queries)
        return (*selected, Output(logits, boxes))

    def _heads(self, heads: nn.ModuleList) -> list[nn.Module]:
        """One head for each decoder layer."""
        layers = self.config.decoder_layers
        return list(heads[:layers]) if self.config.refine else [heads[0]] * layers


class BoxHead(nn.Module):
    """Three linear layers from a query to its box (A.3)."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(embed_dim, size) for size in (embed_dim,) * 2 + (4,))

    def reset_last_layer(self) -> None:
        """Predict zeros, so that boxes start at their references."""
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, queries: Tensor) -> Tensor:
        """(..., C) to (..., 4), to be added to the inverse sigmoid of a reference."""
        for layer in self.layers[:-1]:
            queries = layer(queries).relu()
        return self.layers[-1](queries)


def build_input_projections(channels: list[int], num_levels: int, embed_dim: int) -> nn.ModuleList:
    """One projection to embed_dim for each level: 1x1 on the backbone's last maps, then 3x3 of
    stride 2 for each level beyond (A.2)."""
    projections = []
    used = channels[-num_levels:]
    for channel in used:
        projections.append(nn.Conv2d(channel, embed_dim, 1))
    channel = used[-1]
    for _ in range(num_levels - len(used)):
        projections.append(nn.Conv2d(channel, embed_dim, 3, stride=2, padding=1))
        channel = embed_dim
    for convolution in projections:
        nn.init.xavier_uniform_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    return nn.ModuleList(nn.Sequential(c, nn.GroupNorm(32, embed_dim)) for c in projections)


def valid_ratio(mask: Tensor) -> Tensor:
    """(B, 2): the part of the width and of the height that is not padding. mask: (B, H, W)."""
    return torch.stack([(~mask[:, 0]).float().mean(1), (~mask[:, :, 0]).float().mean(1)], -1)
