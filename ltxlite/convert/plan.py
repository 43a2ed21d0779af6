"""What goes into a GGUF file: tensors under official names, checked against the network, and keys.

Source: formats.md 4.1 and 4.2, what ComfyUI-GGUF (12 January 2026) asks of a file.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ltxlite import __version__
from ltxlite.catalog import SOURCES
from ltxlite.checkpoint.assemble import check_names
from ltxlite.checkpoint.files import ModelFiles, OpenModel
from ltxlite.checkpoint.stored import StoredTensor
from ltxlite.checkpoint.variant import variant_of
from ltxlite.convert import gemma
from ltxlite.convert.inferred import configuration
from ltxlite.convert.layout import Key, boolean, integer, number, shape_keys, text, unsigned
from ltxlite.convert.rows import Planned
from ltxlite.convert.source import SourceFile, source_files
from ltxlite.convert.weighting import Weighting
from ltxlite.errors import CheckpointError
from ltxlite.models.audio_vae import AudioDecoder, AudioEncoder
from ltxlite.models.connector import Connector
from ltxlite.models.gemma import Gemma
from ltxlite.models.text_projection import TextProjection, TextProjectionConfig
from ltxlite.models.transformer import Transformer
from ltxlite.models.video_vae import VideoDecoder, VideoEncoder
from ltxlite.models.vocoder import build_vocoder
from ltxlite.networks import Networks
from ltxlite.release import release_name
from ltxlite_quant.encode import ENCODERS
from ltxlite_quant.policy import Recipe, decide
from ltxlite_quant.scaled import stored_shape
from ltxlite_quant.search_plan import PLANS

Found = dict[str, tuple[StoredTensor, tuple[int, ...]]]  # by name: source, shape in the network


@dataclass(frozen=True, slots=True)
class Part:
    """What is converted together.

    needed: networks that must be there.  optional: those that come along if they are.
    """

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()


PARTS: Mapping[str, Part] = {
    "transformer": Part(("transformer", "video_connector", "audio_connector")),
    "text_projection": Part(("text_projection",)),
    "vae": Part(("video_decoder",), ("video_encoder",)),
    "audio_vae": Part(("audio_decoder", "vocoder"), ("audio_encoder",)),
    "text_encoder": Part(("text_encoder",)),
}

_ARCHITECTURE = "ltxv"  # the one string that ComfyUI-GGUF knows for LTX-Video and all LTX-2
# Only the transformer's loader strips this one, and then drops every name without it.
_STRIPPED = re.compile(r"^(model\.diffusion_model\.|vae\.)")
# Written anew, or about the container and not the model.
_NOT_CARRIED = re.compile(
    r"config$|config_base64$|format$|_quantization_metadata$|quantization_|tied_weights"
    r"|general\.(architecture|alignment|file_type|quantization_version)$|comfy\.|ltxlite\."
    r"|tokenizer\.|gemma3\.|gemma_config$"
)
_LOSSY = "what they lost stays lost; the bf16 release gives a better file"


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything about the new file but the values.

    notes: what the user should know before it starts.  family: "2.0" or "2.3" of a transformer.
    """

    tensors: tuple[Planned, ...]
    keys: Mapping[str, Key]
    sources: tuple[SourceFile, ...]
    notes: tuple[str, ...]
    family: str | None


def plan_conversion(
    files: ModelFiles, part: str, recipe: Recipe, weighting: Weighting | None = None
) -> Plan:
    """Choose, name, check and type all tensors of a part; reads headers only.

    weighting: importances for the matrices that are quantized.
    Raises CheckpointError for a network that is missing, incomplete or of another kind, for
    formats that ltxlite cannot write, and for importances of another model.
    """
    _need(files, PARTS[part].needed[:1])
    networks = Networks(files, torch.device("cpu"), torch.float32)
    family = networks.transformer_config().family if part == "transformer" else None
    found: Found = {}
    for component in _components(files, part, family):
        found |= _checked(networks, component)
    if family == "2.3" and not networks.connector_config(sound=False).gated:
        raise CheckpointError(
            f"{files.models[0].path}: the connectors are LTX-2.0's, the transformer is LTX-2.3's; "
            "take them from the same release"
        )
    names = sorted(found, key=_natural)
    decisions = decide(recipe, {name: found[name][1] for name in names})
    shifts = gemma.shifts(files, names) if part == "text_encoder" else {}
    tensors = tuple(
        Planned(item, found[item.name][0], shifts.get(item.name, 0.0)) for item in decisions
    )
    _refuse_unwritable(tensors)
    notes = _notes(networks, part, family, tensors)
    if weighting is not None:
        tensors, told = weighting.applied(tensors)
        notes += told
    sources = source_files([planned.source for planned in tensors])
    keys = _keys(networks, part, recipe, sources)
    if weighting is not None:
        keys["ltxlite.importance"] = weighting.key()
    return Plan(tensors, keys | shape_keys(decisions), sources, tuple(notes), family)


def _components(files: ModelFiles, part: str, family: str | None) -> list[str]:
    wanted = PARTS[part]
    needed = wanted.needed[:1] if family == "2.0" else wanted.needed
    _need(files, needed)
    return [*needed, *(name for name in wanted.optional if files.find(name) is not None)]


def _need(files: ModelFiles, components: tuple[str, ...]) -> None:
    for component in components:
        if files.find(component) is None:
            held = sorted({name for model in files.models for name in model.components})
            raise CheckpointError(
                f"no {component.replace('_', ' ')} to convert in these files (they hold "
                f"{', '.join(held)}); give a file that has it as another input, such as "
                f"{SOURCES[component].file} of {SOURCES[component].repository}"
            )


def _checked(networks: Networks, component: str) -> Found:
    """Return a network's tensors by official names, each with the shape that the network has.

    Tensors that the network leaves unread come along as they are.
    """
    model = networks.files.find(component)
    assert model is not None  # looked for by the caller
    naming = networks.naming(component)
    network = _skeleton(networks, component)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    used, unread = {}, {}
    for name, stored in model.named(component).items():
        if naming.is_ignored(name):
            unread[_official(component, name)] = (stored, stored.shape)
        else:
            used[naming.rename(name)] = stored
    shapes = {name: _matched(stored, expected.get(name)) for name, stored in used.items()}
    check_names(expected, shapes, f"{model.path} ({component})")
    kept = {_official(component, name): (used[name], shapes[name]) for name in used}
    return kept if component == "text_encoder" else unread | kept


def _official(component: str, name: str) -> str:
    if component == "text_encoder":
        return gemma.llama_name(name)
    return _STRIPPED.sub("", release_name(component, name))


def _matched(stored: StoredTensor, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the network's shape if the stored one is it but for ones, or for padding."""
    if wanted is None:
        return stored.shape
    squeezed = [tuple(size for size in shape if size != 1) for shape in (stored.shape, wanted)]
    padded = stored.shape == stored_shape(stored.format, wanted)
    return wanted if padded or squeezed[0] == squeezed[1] else stored.shape


def _skeleton(networks: Networks, component: str) -> nn.Module:
    """Build a network on meta, for its names and shapes."""
    builders: dict[str, Callable[[], nn.Module]] = {
        "transformer": lambda: Transformer(networks.transformer_config()),
        "video_connector": lambda: Connector(networks.connector_config(sound=False)),
        "audio_connector": lambda: Connector(networks.connector_config(sound=True)),
        "text_projection": lambda: _projection(networks.files.find("text_projection")),
        "text_encoder": lambda: Gemma(networks.gemma_config()),
        "video_encoder": lambda: VideoEncoder(networks.video_config()),
        "video_decoder": lambda: VideoDecoder(networks.video_config()),
        "audio_encoder": lambda: AudioEncoder(networks.audio_config()),
        "audio_decoder": lambda: AudioDecoder(networks.audio_config()),
        "vocoder": lambda: build_vocoder(networks.vocoder_config()),
    }
    with torch.device("meta"):
        return builders[component]()


def _projection(model: OpenModel | None) -> TextProjection:
    """Build the projection for as wide a text encoder as its tensors read; none may be at hand."""
    assert model is not None
    stored = model.named("text_projection")
    shared = "video_aggregate_embed.weight" not in stored
    names = ("aggregate_embed",) if shared else ("video_aggregate_embed", "audio_aggregate_embed")
    shapes = [stored[f"{n}.weight"].shape for n in names if f"{n}.weight" in stored]
    if len(shapes) != len(names) or any(len(shape) != 2 for shape in shapes):
        raise CheckpointError(
            f"{model.path}: wanted the matrices {' and '.join(names)} of a text projection, got "
            f"{', '.join(sorted(stored))}; download it again"
        )
    return TextProjection(
        TextProjectionConfig(shapes[0][1], 1, shapes[0][0], shapes[-1][0], shared)
    )


def _refuse_unwritable(tensors: tuple[Planned, ...]) -> None:
    for planned in tensors:
        wanted, source = planned.decision.format, planned.source
        if wanted.is_quantized and wanted.name not in (*ENCODERS, *PLANS) and not planned.is_copied:
            able = ", ".join(["F32", "F16", "BF16", *ENCODERS, *PLANS])
            raise CheckpointError(
                f"{planned.name} would become {wanted.name}, which ltxlite cannot write yet; "
                f"choose a recipe of {able}"
            )
        dtype = source.format.dtype
        if dtype is not None and not dtype.is_floating_point:
            raise CheckpointError(
                f"{source.container.path}: {source.entry.name} holds {source.format.name} without "
                "scales, which is no weight; download the file again"
            )


def _keys(
    networks: Networks, part: str, recipe: Recipe, sources: tuple[SourceFile, ...]
) -> dict[str, Key]:
    """Return the metadata, in the order of formats.md 4.2."""
    model = networks.files.find(PARTS[part].needed[0])
    assert model is not None
    encoder = part == "text_encoder"
    keys = {
        "general.architecture": text(gemma.ARCHITECTURE if encoder else _ARCHITECTURE),
        "general.quantization_version": unsigned(2),
        "general.file_type": unsigned(recipe.file_type),
    }
    keys |= _carried(model.metadata)
    keys.setdefault("general.name", text(_title(model, part)))
    if encoder:
        return keys | gemma.keys(model, networks.gemma_config()) | _own(sources, part, recipe)
    config, _ = configuration(networks, PARTS[part].needed[0])
    if config is not None:
        compact = json.dumps(config, ensure_ascii=False, separators=(",", ":"))
        keys["config"] = text(compact)
    if part == "transformer":
        variant = variant_of(model)
        keys["ltxlite.family"] = text(networks.transformer_config().family)
        keys["ltxlite.variant"] = text(variant[0] if variant else "unknown")
    return keys | _own(sources, part, recipe)


def _own(sources: tuple[SourceFile, ...], part: str, recipe: Recipe) -> dict[str, Key]:
    """Return where the file comes from."""
    listed = [{"file": s.name, "bytes": s.nbytes, "header_sha256": s.header} for s in sources]
    return {
        "ltxlite.version": text(__version__),
        "ltxlite.part": text(part),
        "ltxlite.sources": text(json.dumps(listed, ensure_ascii=False)),
        "ltxlite.quant_recipe": text(recipe.text()),
    }


def _carried(metadata: Mapping[str, Any]) -> dict[str, Key]:
    """Return what the source says of the model: version, licence, author, and the like."""
    kinds: dict[type, Callable[[Any], Key]] = {str: text, bool: boolean, float: number}
    kept: dict[str, Key] = {}
    for name, value in metadata.items():
        if _NOT_CARRIED.match(name):
            continue
        if type(value) in kinds:
            kept[name] = kinds[type(value)](value)
        elif type(value) is int and -(1 << 31) <= value < 1 << 31:
            kept[name] = integer(value)
    return kept


def _title(model: OpenModel, part: str) -> str:
    version = str(model.metadata.get("model_version", ""))
    name = model.path.name if model.path.is_dir() else model.path.stem
    return f"{name} {part} {version}".strip()


def _notes(
    networks: Networks, part: str, family: str | None, tensors: tuple[Planned, ...]
) -> list[str]:
    notes = []
    kinds = {t.source.format.name for t in tensors if t.source.format.is_quantized}
    kinds |= {t.source.format.name for t in tensors if t.source.format.name.startswith("F8_")}
    if kinds:
        notes.append(f"the source holds {', '.join(sorted(kinds))} tensors: {_LOSSY}")
    if family == "2.0":
        notes.append("LTX-2.0: the connectors stay in their own file, beside the text projection")
    if part == "transformer" and configuration(networks, part)[1]:
        notes.append(
            f"no configuration in the source: written from its shapes and what LTX-{family} has in "
            "common; to keep another one, give its JSON as INPUT.config.json"
        )
    if part == "text_encoder":
        notes.append("the text model alone: what reads pictures stays out, prompts do not need it")
    return notes


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort by numbers where there are some: block 2 before block 10."""
    return [
        (1, int(piece), "") if piece.isdecimal() else (0, 0, piece)
        for piece in re.split(r"(\d+)", name)
    ]
