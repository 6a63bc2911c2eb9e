"""What is worth a line about pictures, said once for all of them. Chapter your_own_data."""

from deformable_detr.data.names import printable
from deformable_detr.inference.detector import Detector
from deformable_detr.inference.sources import Source

LARGE = 4  # times the size that a model knows: its objects have another size there
MOST_PIXELS = 2**23  # at once: some GB of memory


class Remarks:
    """Pictures of which only a part is seen: one frame of several, or a shrunken whole.

    tiles: the side of tiles, where pictures are seen so.
    """

    def __init__(self, detector: Detector, tiles: int | None = None) -> None:
        self.known_side, self.resizes, self.tiles = detector.known_side, detector.resizes, tiles
        self.several: dict[str, int] = {}
        self.large: dict[str, tuple[int, int]] = {}

    def note_frames(self, source: Source, frames: int) -> None:
        """How many frames a picture's file has."""
        if frames > 1:
            self.several[_name(source)] = frames

    def note_size(self, source: Source, size: tuple[int, int]) -> None:
        """A picture's (width, height); ValueError where it has too many pixels to be seen at
        once."""
        if self.tiles:
            return
        if not self.resizes and size[0] * size[1] > MOST_PIXELS:
            raise ValueError(
                f"{_name(source)} has {size[0]} x {size[1]} pixels, more than the "
                f"{MOST_PIXELS:,} that are seen at once: --tiles SIDE (tiles=) looks at it in "
                "pieces"
            )
        if min(size) >= LARGE * self.known_side:
            self.large[_name(source)] = size

    def lines(self) -> list[str]:
        """A line for each kind that there was."""
        lines = []
        if self.several:
            name, frames = next(iter(self.several.items()))
            lines.append(f"{name} has {frames} frames{_more(self.several)}: the first is looked at")
        if self.large:
            name, size = next(iter(self.large.items()))
            side = self.known_side
            times = f"{min(size) / side:.1f} times the {side} that the model knows"
            lines.append(
                f"{name} has {size[0]} x {size[1]} pixels{_more(self.large)}, {times}, so that it "
                f"may miss small objects: --tiles {side} (tiles={side}) looks at it in pieces"
            )
        return lines


def _name(source: Source) -> str:
    return printable(source.path or "an image")


def _more(pictures: dict) -> str:
    return f", and {len(pictures) - 1} more such files" if len(pictures) > 1 else ""
