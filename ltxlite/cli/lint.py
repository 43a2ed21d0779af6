"""What a job is warned of before it runs: sizes, mixtures and words that go badly."""

import re
from collections.abc import Callable, Iterator

from ltxlite.given.reference_factors import follows_references
from ltxlite.networks import Networks
from ltxlite.presets import Model
from ltxlite.request import Request

Note = Callable[[str], None]
TALLEST, WIDEST_SQUARE = 1600, 1536  # pixels (features A3)
ADVISED_TOKENS = 15_000  # of the first stage; beyond 20 000 grids and colour loss (features A3)

# Of prompts (features.md H7). Times in square brackets are ID-LoRA's own way and stay.
_WORDS = (
    (r"the (?:scene|video|shot|clip) (?:opens|begins|starts)", "say what is there, not that it"),
    (r"(?:hard|jump|smash)?\s*cuts? to\b", "a clip has no cuts; --segments puts prompts in order"),
    (r"doll(?:y|ies|ying) out", "is often misunderstood; say what comes into view"),
    (r"(?<!\[)\b\d+:\d\d\s*-\s*\d+:\d\d\b", "times are not read; --segments and --schedule are"),
)
_FEW_WORDS = 5


def lint(
    request: Request, networks: Networks, model: Model, distilled_lora: bool, note: Note
) -> None:
    """Tell what of a job will probably disappoint; nothing is refused."""
    grid = networks.latent_grid()
    first = request.stages[0].fraction
    tokens = (
        int(request.width * first / grid.space)
        * int(request.height * first / grid.space)
        * grid.latent_frames(request.frames)
    )
    if request.picture and tokens > ADVISED_TOKENS:
        note(
            f"warning: the first stage has {tokens} latent places; beyond {ADVISED_TOKENS} "
            "quality falls (grids, lost colour): smaller, shorter or one stage more helps"
        )
    if request.picture and request.height >= TALLEST > request.width:
        note(f"warning: portrait clips of {TALLEST} rows and more tend to fall apart")
    if request.width == request.height and request.width > WIDEST_SQUARE:
        note(f"warning: square clips above {WIDEST_SQUARE} pixels may shift in colour")
    if model.variant == "distilled" and distilled_lora:
        note("warning: a distilled LoRA on a distilled checkpoint overcooks the picture; drop one")
    if not request.conditions.references:
        for path in filter(follows_references, request.files.loras):
            note(f"warning: {path} follows references, and there is none; see --reference")
    for remark in prompt_remarks(request):
        note(remark)


def prompt_remarks(request: Request) -> Iterator[str]:
    """Yield what prompts say that the model does not follow well."""
    relay = request.conditions.relay
    segments = () if relay is None else tuple(segment.text for segment in relay.segments)
    if not request.prompt.strip() and not segments:
        yield "the prompt is empty: the clip will be whatever the model likes"
        return
    text = " ".join((request.prompt, *segments))
    for pattern, advice in _WORDS:
        if found := re.search(pattern, text, re.IGNORECASE):
            yield f"prompt: {found[0].strip()!r}: {advice}"
    if len(text.split()) < _FEW_WORDS:
        yield "prompt: a few words leave much open; the model was trained on whole descriptions"
