"""Full-size LTX-2.3 files without data: real headers, a few bytes a tensor, holes for the rest.

Names and shapes are those of the 22B release (tests/golden/real_22b_keys.json), formats those of
`convert --type Q4_K_M`. A hole reads as zeros and takes no disk; a page of it takes RAM like any.
Every tensor begins with some bytes that are not zero: loaders refuse matrices of zeros.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ltxlite.convert.gemma import ARCHITECTURE, llama_name
from ltxlite.convert.layout import Key, lay_out, text, unsigned
from ltxlite.models.gemma import Gemma
from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.models.upscaler import LatentUpscaler, UpscalerConfig
from ltxlite.request import Files
from ltxlite_quant.policy import decide, recipe_named

KEYS = Path(__file__).parent.parent / "tests" / "golden" / "real_22b_keys.json"
RECIPE = "Q4_K_M"
_TRANSFORMER = "model.diffusion_model."  # connectors are under it, too
_BF16_BYTES = 2
_BEGINNING = b"\x3c" * 256  # a block or more of any format: 1.06 in fp16, 0.0115 in bf16
Shapes = Mapping[str, tuple[int, ...]]


def write_release(folder: Path) -> Files:
    """Write transformer and text encoder as Q4_K_M, everything else in bf16; 14 GB that are not."""
    release = json.loads(KEYS.read_text("utf-8"))
    shapes = {name: tuple(shape) for name, shape in release["tensors"].items()}
    config = json.dumps(release["config"])
    own = {n.removeprefix(_TRANSFORMER): s for n, s in shapes.items() if n.startswith(_TRANSFORMER)}
    others = {name: s for name, s in shapes.items() if not name.startswith(_TRANSFORMER)}
    model, encoder, parts, upscaler = (
        folder / name
        for name in (
            "ltx-2.3-22b-distilled-Q4_K_M.gguf",
            "gemma-3-12b-it-Q4_K_M.gguf",
            "ltx-2.3-22b-parts.safetensors",
            "ltx-2.3-spatial-upscaler-x2-1.1.safetensors",
        )
    )
    _write_gguf(model, own, {"general.architecture": text("ltxv"), "config": text(config)})
    _write_gguf(encoder, _gemma(), _gemma_keys())
    _write_safetensors(parts, others, {"config": config, "model_version": "2.3.0"})
    wide = UpscalerConfig(width=1024)
    _write_safetensors(upscaler, _shapes_of(lambda: LatentUpscaler(wide)), {})
    return Files(
        str(model),
        text_encoder=str(encoder),
        vae=str(parts),
        audio_vae=str(parts),
        text_projection=str(parts),
        upscalers=(str(upscaler),),
    )


def _gemma() -> Shapes:
    return {
        llama_name(name): shape for name, shape in _shapes_of(partial(Gemma, GemmaConfig())).items()
    }


def _gemma_keys() -> dict[str, Key]:
    config = GemmaConfig()
    return {
        "general.architecture": text(ARCHITECTURE),
        f"{ARCHITECTURE}.block_count": unsigned(config.layers),
        f"{ARCHITECTURE}.embedding_length": unsigned(config.hidden),
    }


def _shapes_of(build: Callable[[], nn.Module]) -> Shapes:
    with torch.device("meta"):
        network = build()
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def _write_gguf(path: Path, shapes: Shapes, keys: Mapping[str, Key]) -> None:
    layout = lay_out(decide(recipe_named(RECIPE), shapes), keys)
    starts = [(tensor.offset, tensor.nbytes) for tensor in layout.tensors]
    _write_sparse(path, layout.header, layout.size, starts)


def _write_safetensors(path: Path, shapes: Shapes, metadata: Mapping[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    places: list[tuple[int, int]] = []
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * _BF16_BYTES
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        places.append((start, end - start))
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)  # as the writers of real files align them
    packed = len(packed).to_bytes(8, "little") + packed
    starts = [(len(packed) + start, nbytes) for start, nbytes in places]
    _write_sparse(path, packed, len(packed) + end, starts)


def _write_sparse(path: Path, header: bytes, size: int, tensors: Iterable[tuple[int, int]]) -> None:
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)
        for start, nbytes in tensors:
            file.seek(start)
            file.write(_BEGINNING[:nbytes])
