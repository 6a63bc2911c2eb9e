"""Large images in pieces: where these lie, and a data set made of them. Chapter 12."""

OVERLAP = 0.25  # part of a tile that its neighbour has as well; smaller objects are whole in one


def tile_places(
    width: int, height: int, side: int, overlap: float = OVERLAP
) -> list[tuple[int, int, int, int]]:
    """Where the tiles of an image lie, (x0, y0, x1, y1) in pixels, row by row.

    All are side x side, or as large as the image where it is smaller; neighbours share at least
    `overlap` of their side. ValueError where side is below 1 or overlap not in [0, 0.9].
    """
    if side < 1 or not 0 <= overlap <= 0.9:
        expected = "a side of 1 pixel or more and an overlap in [0, 0.9]"
        raise ValueError(f"tiles need {expected}, got {side} and {overlap}")
    columns, rows = (_starts(length, side, overlap) for length in (width, height))
    return [(x, y, min(x + side, width), min(y + side, height)) for y in rows for x in columns]


def _starts(length: int, side: int, overlap: float) -> list[int]:
    """As few as cover the length, evenly spaced."""
    free = length - side
    if free <= 0:
        return [0]
    steps = -(-free // max(1, int(side * (1 - overlap))))
    return [round(i * free / steps) for i in range(steps + 1)]
