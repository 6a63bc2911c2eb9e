"""What the formats of others have to know of one model: a base, of which each model has a member.

Chapter published_weights.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar

from deformable_detr.models.base import DetectorConfig
from deformable_detr.weights.reading import State
from deformable_detr.weights.renaming import Layout


class Foreign:
    """A model as others publish it, "official" and, where transformers has it, by "huggingface".

    sign: a tensor that official files of this model have, and those of no model after it in
    `formats.FOREIGN`. as_there: options by which the official code computes otherwise than our
    default; a file from there comes with them, and only a model with them goes there. architecture,
    image_processor: the classes in transformers.
    """

    sign: str
    as_there: ClassVar[Mapping[str, object]] = {}
    architecture: str
    image_processor: str
    official: Layout
    huggingface: Layout | None = None  # as in its files, which all versions of transformers read

    def copies(self, name: str, config: DetectorConfig) -> list[str]:
        """The names, as they would be here, under which they store a tensor: usually its own."""
        return [name]

    def shown_by(self, state: State, options: dict) -> dict[str, object]:
        """Options that official tensors show. options: those known so far. KeyError where a tensor
        is not there."""
        raise NotImplementedError

    def constants(self, config: DetectorConfig) -> Iterator[str]:
        """Options that have no counterpart: exported models have their defaults, or `as_there`."""
        if config.position == "learned":
            yield "position_size"

    def official_entries(self, config: DetectorConfig) -> dict[str, object]:
        """Arguments of the official code beside those that stand for one option each."""
        return {}

    def official_options(self, arguments: Mapping, options: dict) -> dict[str, object]:
        """Options that such arguments show, beside `options`, which are known."""
        return {}

    def refuse_official(self, config: DetectorConfig) -> None:
        """ValueError where the official code has no such model."""

    def backbone_maps(self, config: DetectorConfig) -> list[int]:
        """The indices of the backbone's maps that transformers hands on."""
        raise NotImplementedError

    def entries(self, config: DetectorConfig) -> dict[str, object]:
        """Entries of config.json beside those that stand for one option each."""
        return {}

    def options(self, content: dict, options: dict) -> dict[str, object]:
        """Options that such entries show, beside `options`, which are known."""
        return {}

    def complete(self, state: State, content: dict, config: DetectorConfig) -> State:
        """The tensors of a file of Hugging Face's, with those that it leaves out."""
        return state
