"""What the tests of stopped runs share: a tiny job, and where it stands after each step."""

from pathlib import Path
from typing import Any

from ltxlite.networks import Networks
from ltxlite.opening import open_networks
from ltxlite.pipeline import encode, run_stages
from ltxlite.progress import Clock, Report
from ltxlite.request import Files, Output, Request, Stage
from ltxlite.sampling.settings import Guidance
from ltxlite.stages import Progress, Prompts, beginning

GOLDEN = Path(__file__).parent / "golden" / "models"
MODEL = GOLDEN / "tiny-2.3-distilled.safetensors"
UPSCALER = GOLDEN / "tiny-2.3-spatial-upscaler-x2.safetensors"
LORA = GOLDEN / "tiny-distilled-lora-r4.safetensors"
ENCODER = GOLDEN / "gemma3_tiny_single.safetensors"
GUIDED = Guidance(cfg=2.0, skip_step=2)


def request_of(folder: Path, *stages: Stage, **changes: Any) -> Request:
    files = Files(str(MODEL), text_encoder=str(ENCODER), upscalers=(str(UPSCALER),))
    fields: dict[str, Any] = {"width": 64, "height": 64, "frames": 9, "files": files, **changes}
    return Request("rain", output=Output(str(folder / "clip.mp4")), stages=stages, **fields)


def tiny_networks() -> Networks:
    files = Files(str(MODEL), text_encoder=str(ENCODER), upscalers=(str(UPSCALER),))
    return open_networks(files, "cpu", "float32")


def tiny_prompts(networks: Networks) -> Prompts:
    request = request_of(Path(), Stage(video=Guidance(cfg=2.0)), negative="noise")
    return encode(request, networks, Clock(Report()))


def every_progress(request: Request, networks: Networks, prompts: Prompts) -> list[Progress]:
    """Run a job's stages; return where it stood after each step and each stage."""
    saved: list[Progress] = []
    begun = beginning(request, networks)
    for _ in run_stages(request, networks, prompts, begun, Clock(Report()), saved.append):
        pass
    return saved
