"""How an existing clip lies in the frames of each stage: in the same place in all of them."""

from dataclasses import replace
from fractions import Fraction

from ltxlite.conditions import Source
from ltxlite.media.fit import Fit
from ltxlite.request import Request

Size = tuple[int, int]  # height, width


def magnified(source: Source, size: Size) -> Size:
    """Return the size at which frames of a source are delivered."""
    height, width = (round(side * Fraction(source.magnify)) for side in size)
    return height, width


def source_fit(request: Request, source: Source, frame: Size, size: Size) -> Fit:
    """Return how frames of a source lie in those of a stage, where all of a frame is to come back.

    frame: size of the source's frames.  size: of the stage's, a fraction of the request's: the
    source takes the same part of them in every stage, so that a later one goes on where an earlier
    one left off.
    """
    whole = (request.height, request.width)
    last = Fit.inside(magnified(source, frame), whole)
    rows, columns = (
        min(max(round(Fraction(side * own, full)), 1), own)
        for side, own, full in zip((last.rows, last.columns), size, whole, strict=True)
    )
    return replace(last, rows=rows, columns=columns, grid_height=size[0], grid_width=size[1])
