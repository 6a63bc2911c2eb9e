"""What all detectors here have in common: from a batch of images to sets of predictions.

Chapter pixels_to_boxes. A member of the family replaces parts. It is a small file, never a copy of
`forward`.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from torch import Tensor, nn

from deformable_detr.layers.stack import Stack
from deformable_detr.losses.scoring import FocalScoring, Scoring
from deformable_detr.ops.sizes import quietly
from deformable_detr.options import option
from deformable_detr.structures import Batch, Output, Predictions, Queries, Target, Tokens

SAME_TENSORS = ("dropout", "exact_padding")  # options with which any weights of a model go
Sets = dict[str, Predictions]  # that training supervises beside the decoder's, by name


@dataclass(frozen=True)
class DetectorConfig:
    """What decides the shape of every detector; the defaults are those of "Deformable DETR"."""

    num_classes: int = option(91, "classes; the data's, where there is data")
    num_queries: int = option(
        300, "object queries: boxes that an image can have", "num_queries", "num_queries"
    )
    backbone: str = option(
        "resnet50", 'a key of BACKBONES: "small", a ResNet, or a DAT ("dat_tiny")', "backbone"
    )
    dilation: bool = option(
        False, "the backbone's last stage at stride 16 (DC5)", "dilation", "dilation"
    )
    embed_dim: int = option(256, "C, the width of tokens and queries", "hidden_dim", "d_model")
    num_heads: int = option(
        8, "heads", "nheads", ("encoder_attention_heads", "decoder_attention_heads")
    )
    encoder_layers: int = option(6, "layers of the encoder", "enc_layers", "encoder_layers")
    decoder_layers: int = option(6, "layers of the decoder", "dec_layers", "decoder_layers")
    ffn_dim: int = option(
        1024, "width inside a layer", "dim_feedforward", ("encoder_ffn_dim", "decoder_ffn_dim")
    )
    dropout: float = option(0.1, "in [0, 1)", "dropout", "dropout")
    position: str = option(
        "sine", '"sine" or "learned"', "position_embedding", "position_embedding_type"
    )
    position_size: int = option(50, "rows and columns that learned positions cover")

    may_be_zero: ClassVar[tuple[str, ...]] = ()  # of the whole numbers of this class itself

    def __post_init__(self) -> None:
        check_counts(self)


class BaseDetector(nn.Module):
    """Backbone, tokens, encoder, queries, decoder, heads.

    A member makes these parts: `backbone`, images to maps; `neck`, maps and mask to `Tokens`;
    `encoder`, `decoder`; `class_heads` and `box_heads`, one each for all layers of the decoder or
    one for each layer. It defines `queries`, and may change `encode`.
    """

    def __init__(self, config: DetectorConfig, scoring: Scoring | None = None) -> None:
        super().__init__()
        self.config = config
        self.scoring = scoring or FocalScoring()

    def forward(self, batch: Batch) -> Output:
        """Class logits and boxes of every query, for every decoder layer.

        batch.images: (B, 3, H, W), normalised as the backbone expects; batch.targets are seen in
        training only. Boxes come relative to each image without its padding. Raises ValueError on
        other shapes.
        """
        tokens = self.tokens(batch)
        memory, encoded = self.encode(tokens)
        queries, proposed = self.queries(memory, batch.targets if self.training else None)
        class_heads, box_heads = self.heads_of_layers()
        layers = self.decoder(queries, memory, box_heads)
        predictions = [
            Predictions(head(content), boxes, references, groups=queries.groups)
            for head, (content, boxes, references) in zip(class_heads, layers, strict=True)
        ]
        return self.output(predictions, queries, memory, encoded | proposed)

    def tokens(self, batch: Batch) -> Tokens:
        """The backbone's maps, and levels above them, as one sequence with positions."""
        check_images(batch.images, batch.mask)
        images, dtype = batch.images, next(self.parameters()).dtype
        if images.is_floating_point() and images.dtype != dtype:  # torch's default may be float64
            images = images.to(dtype)
        return self.neck(self.backbone(images), batch.mask)

    def encode(self, tokens: Tokens) -> tuple[Tokens, Sets]:
        """The memory, and what the encoder itself predicts."""
        return self.encoder(tokens), {}

    def queries(self, memory: Tokens, targets: list[Target] | None) -> tuple[Queries, Sets]:
        """What the decoder starts from, and what was predicted on the way to it. targets: of the
        batch, in training; else None."""
        raise NotImplementedError

    def learned_queries(self) -> int:
        """How many queries are learned, where they are."""
        return self.config.num_queries

    def heads_of_layers(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The class head and the box head of each layer of the decoder."""
        layers = len(self.decoder.layers)
        pair = self.class_heads, self.box_heads
        classes, boxes = (list(h) if len(h) == layers else [h[0]] * layers for h in pair)
        return classes, boxes

    def output(
        self, layers: list[Predictions], queries: Queries, memory: Tokens, others: Sets
    ) -> Output:
        """All layers' predictions as one output, those of denoising queries set apart."""
        known = queries.denoising
        if known is not None:
            noised = [
                dataclasses.replace(
                    layer.queries(0, known.size),
                    matches=known.matches,
                    groups=known.groups,
                    counted=known.counted,
                )
                for layer in layers
            ]
            layers = [layer.queries(known.size) for layer in layers]
            others = others | {"denoising": noised[-1]}
            others |= {f"denoising_{i}": layer for i, layer in enumerate(noised[:-1])}
        last = layers[-1]
        return Output(**vars(last), auxiliary=layers[:-1], others=others, scoring=self.scoring)

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Whether training computes the stages of a ResNet and the layers of encoder and decoder
        again in the backward pass, instead of keeping what is inside them."""
        for module in self.modules():
            if isinstance(module, Stack):
                module.gradient_checkpointing = on

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: Path | str,
        num_classes: int | None = None,
        num_queries: int | None = None,
        categories: list[dict] | None = None,
        **changes: object,
    ) -> Self:
        """A published detector, or one of ours, in evaluation mode: "SenseTime/deformable-detr",
        a folder, an official .pth, a .safetensors file; see `weights.published.load_pretrained`.
        ValueError where it is of another class than this."""
        # the one door upwards, opened when somebody comes through: models know of no files
        from deformable_detr.weights.published import load_pretrained

        loaded = load_pretrained(name_or_path, num_classes, num_queries, categories, **changes)
        model = loaded.model
        if not isinstance(model, cls):
            raise ValueError(f"{name_or_path} is a {type(model).__name__}, not a {cls.__name__}")
        return model

    def save_pretrained(
        self,
        path: Path | str,
        categories: list[dict] | None = None,
        format: str = "ours",
        card: dict | None = None,
    ) -> None:
        """Write this model, as "ours", "huggingface" or "official"; see `weights.published`."""
        from deformable_detr.weights.published import save_pretrained

        save_pretrained(self, path, categories, format, card)


@quietly
def check_images(images: Tensor, mask: Tensor) -> None:
    """ValueError unless images are (B, 3, H, W) and the mask (B, H, W)."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    if mask.shape != (images.shape[0], *images.shape[2:]):
        given = f"mask {tuple(mask.shape)} for images {tuple(images.shape)}"
        raise ValueError(f"mask must be (B, H, W), got {given}")


def check_counts(config: DetectorConfig) -> None:
    """ValueError where an integer option of a configuration is not positive, or not at least zero
    where it may be that."""
    counts = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.type is int}
    free = {n for kind in type(config).__mro__ for n in vars(kind).get("may_be_zero", ())}
    wrong = {name: value for name, value in counts.items() if value < 1 and name not in free}
    if wrong:
        raise ValueError(f"these must be at least 1: {wrong}")
    negative = {name: value for name, value in counts.items() if value < 0}
    if negative:
        raise ValueError(f"these must be at least 0: {negative}")


def for_each_image(memory: Tokens, *learned: Tensor) -> list[Tensor]:
    """The same rows, (Q, C) each, for every image of a batch."""
    return [x.expand(memory.features.shape[0], -1, -1) for x in learned]


def xavier(*parts: nn.Module) -> None:
    """Every matrix of these parts drawn as DETR does (Glorot and Bengio, 2010)."""
    for part in parts:
        for parameter in part.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
