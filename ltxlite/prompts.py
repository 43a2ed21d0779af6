"""All texts of a job, and what its stages see of them."""

from ltxlite.context_cache import ContextCache
from ltxlite.encode import Contexts, Note, encode_prompts
from ltxlite.models.passes import Avoided
from ltxlite.networks import Networks
from ltxlite.relay import Clip, passages, spans
from ltxlite.relay_text import whole_text
from ltxlite.request import Request
from ltxlite.stages import Prompts, needs_negative


def prompt_texts(request: Request) -> list[str]:
    """Return every text that a job has encoded, the prompt first, each once."""
    return list(dict.fromkeys(_texts(request).values()))


def check_texts(request: Request, networks: Networks) -> None:
    """Raise RequestError for segments that do not fit into the clip."""
    relay = request.conditions.relay
    if relay is not None:
        spans(relay.segments, Clip(request.frames, float(request.rate), networks.latent_grid()))


def encode_texts(
    request: Request, networks: Networks, note: Note, cache: ContextCache | None = None
) -> Prompts:
    """Encode the prompt with its segments, and whatever else stages need.

    Raises RequestError if prompt and segments are longer than a context.
    """
    relay, texts = request.conditions.relay, _texts(request)
    rows = () if relay is None else passages(networks.tokenizer(), request.prompt, relay)
    contexts = encode_prompts(networks, list(texts.values()), note, cache)
    made = dict(zip(texts, contexts, strict=True))
    return Prompts(
        made["prompt"], made.get("negative"), avoided=_avoided(request, made), passages=rows
    )


def _texts(request: Request) -> dict[str, str]:
    """Return texts by what they are for."""
    nag = request.conditions.nag
    texts = {"prompt": whole_text(request.prompt, request.conditions.relay)}
    if any(needs_negative(stage) for stage in request.stages):
        texts["negative"] = request.negative or ""
    if nag is not None and nag.video is not None:
        texts["nag video"] = nag.video
    if nag is not None and nag.audio is not None:
        texts["nag audio"] = nag.audio
    return texts


def _avoided(request: Request, made: dict[str, Contexts]) -> tuple[Avoided | None, Avoided | None]:
    """Return what picture and sound lead away from."""
    nag = request.conditions.nag
    if nag is None:
        return None, None
    video, audio = made.get("nag video"), made.get("nag audio")
    numbers = (nag.scale, nag.alpha, nag.tau)
    return (
        None if video is None else Avoided(video.video, *numbers),
        None if audio is None else Avoided(audio.audio, *numbers),
    )
