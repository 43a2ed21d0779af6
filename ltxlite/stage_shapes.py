"""The latent sizes of a job's stages."""

from ltxlite.errors import RequestError
from ltxlite.geometry import ClipShape
from ltxlite.network_configs import NetworkConfigs
from ltxlite.request import Request, Stage


def stage_shape(request: Request, stage: Stage, networks: NetworkConfigs) -> ClipShape:
    """Return a stage's latent shape; without a picture it has no frames, rows and columns.

    Raises RequestError if its size is off the grid.
    """
    if not request.picture:
        return ClipShape(0, 0, 0, _sound_length(request, networks), float(request.rate))
    grid = networks.latent_grid()
    sizes = [size * stage.fraction for size in (request.height, request.width)]
    if request.frames != grid.snap_frames(request.frames):
        raise RequestError(
            f"{request.frames} frames: wanted {grid.time}n + 1, such as "
            f"{grid.snap_frames(request.frames)}"
        )
    for size in sizes:
        if size.denominator != 1 or size % grid.space:
            raise RequestError(
                f"{request.width}x{request.height} at scale {stage.scale} gives {float(size):g} "
                f"pixels; wanted multiples of {grid.space}"
            )
    rows, columns = (int(size) // grid.space for size in sizes)
    frames = grid.latent_frames(request.frames)
    length = _sound_length(request, networks)
    return ClipShape(frames, rows, columns, length, float(request.rate))


def _sound_length(request: Request, networks: NetworkConfigs) -> int:
    length = networks.audio_grid().latent_frames(request.frames, request.rate)
    if length < 1:
        raise RequestError(
            f"{request.frames} frames at {request.fps} fps are too short for any sound; "
            "make the clip longer"
        )
    return length
