"""What official files of all models with deformable attention have in common. Chapter
published_weights."""

from collections.abc import Iterator

from deformable_detr.models.deformable import DeformableConfig
from deformable_detr.weights.foreign import Foreign
from deformable_detr.weights.reading import State


class ForeignDeformable(Foreign):
    """A model whose code began as the official "Deformable DETR"."""

    def shown_by(self, state: State, options: dict) -> dict[str, object]:
        """Also of a file without options; but the number of heads."""
        levels = len(state["transformer.level_embed"])
        offsets = len(state["transformer.encoder.layers.0.self_attn.sampling_offsets.bias"])
        return {
            "num_classes": len(state["class_embed.0.bias"]),
            "num_levels": levels,
            "num_points": offsets // (2 * levels * options["num_heads"]),
        }

    def constants(self, config: DeformableConfig) -> Iterator[str]:
        """Also deformable convolutions and exact padding."""
        yield from super().constants(config)
        yield from ("deformable_stages", "exact_padding")

    def refuse_official(self, config: DeformableConfig) -> None:
        """Two levels are only transformers'."""
        if config.num_levels == 2:
            raise ValueError("a model of 2 levels cannot be exported: the official code has none")
