"""What a LoRA file says of itself before anything of it is read: ranks, targets, generation.

Source: features.md N2 (signs of the generation), formats.md 1.9.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ltxlite.checkpoint.config import parse_json
from ltxlite.checkpoint.files import OpenModel
from ltxlite.checkpoint.generation import Told, Version, spoken, stated
from ltxlite.checkpoint.lora_names import LoraName, read_name
from ltxlite.errors import CheckpointError
from ltxlite.strength import stream_of

_BLOCK = re.compile(r"transformer_blocks[._](\d+)[._]")
_OLD_CONNECTOR = 3840

Factor = Literal["downscale", "temporal"]
_FACTOR_KEYS: dict[Factor, tuple[str, ...]] = {
    "downscale": ("reference_downscale_factor", "reference_spatial_scale_factor"),
    "temporal": ("reference_temporal_scale_factor",),
}
_FACTOR_IN_NAME = re.compile(r"-ref(0\.5|0\.25)(?!\d)")


@dataclass(frozen=True, slots=True)
class LoraFacts:
    """What a LoRA file is, from its header.

    spellings: whose names it uses.  modules: how many layers it changes.  ranks: those found,
    ascending.  targets: (kind of layer, how many), most frequent first.  streams: (stream, how
    many).  blocks: of the transformer, by number.  version: its generation, () if nothing tells;
    evidence: what told.  reference_downscale, reference_temporal: of an IC-LoRA's reference.
    """

    path: Path
    nbytes: int
    spellings: tuple[str, ...]
    modules: int
    ranks: tuple[int, ...]
    targets: tuple[tuple[str, int], ...]
    streams: tuple[tuple[str, int], ...]
    blocks: tuple[int, ...]
    version: Version = ()
    evidence: str = ""
    reference_downscale: int = 1
    reference_temporal: int = 1

    @property
    def generation(self) -> str:
        """The base model it was made for, in words."""
        return f"LTX-{'.'.join(map(str, self.version[:2]))}" if self.version else "unknown base"

    def lines(self) -> tuple[str, ...]:
        """Return the facts as text for `inspect`."""
        told = f" ({self.evidence})" if self.evidence else ""
        ranks = f"{self.ranks[0]}" if len(self.ranks) == 1 else f"{self.ranks[0]}-{self.ranks[-1]}"
        blocks = f" in {len(self.blocks)} blocks" if self.blocks else ""
        counts = ", ".join(f"{stream} {count}" for stream, count in self.streams)
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.targets)
        lines = [
            f"LoRA for {self.generation}{told}, rank {ranks}, {self.modules} modules{blocks}, "
            f"{'/'.join(self.spellings)} names",
            f"changes {counts}: {kinds}",
        ]
        factors = (self.reference_downscale, self.reference_temporal)
        if factors != (1, 1):
            lines.append(f"reference at 1/{factors[0]} size, 1/{factors[1]} of the frames")
        return tuple(lines)


def lora_facts(model: OpenModel) -> LoraFacts:
    """Describe a LoRA file from its header.

    Raises CheckpointError for a kind that ltxlite does not apply and for damaged metadata.
    """
    where = str(model.path)
    names = {name: read_name(name, where) for name in model.tensors}
    ranks = {n.module: model.tensors[name].shape[0] for name, n in names.items() if n.role == "a"}
    if not ranks:
        raise CheckpointError(f"{where}: no LoRA factors in this file")
    version, evidence = _version(model, names)
    kinds = Counter(_kind(module) for module in ranks)
    return LoraFacts(
        model.path,
        sum(stored.nbytes for stored in model.tensors.values()),
        tuple(sorted({n.spelling for n in names.values()})),
        len(ranks),
        tuple(sorted(set(ranks.values()))),
        tuple(kinds.most_common()),
        tuple(Counter(stream_of(_dotted(module)) for module in ranks).most_common()),
        tuple(sorted({int(m[1]) for module in ranks if (m := _BLOCK.search(module))})),
        version,
        evidence,
        factor_said(model, "downscale") or 1,
        factor_said(model, "temporal") or 1,
    )


@dataclass(frozen=True, slots=True)
class Scaling:
    """The factor of terms without an alpha tensor, as PEFT keeps it in the header."""

    alpha: float | None = None
    by_root: bool = False

    def of(self, rank: int) -> float:
        """Return the factor for a rank: alpha / r, or alpha / √r if rank-stabilized; else 1."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(rank) if self.by_root else rank)


def header_scaling(metadata: Mapping[str, Any], where: str) -> Scaling:
    """Read what diffusers writes as `lora_adapter_metadata`: `transformer.lora_alpha` and so on.

    Raises CheckpointError for alphas that differ by layer, and for damaged JSON.
    """
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return Scaling()
    values = {
        name.removeprefix("transformer."): value
        for name, value in parse_json(str(text), f"{where}: lora_adapter_metadata").items()
    }
    alpha = values.get("lora_alpha")
    if values.get("alpha_pattern"):
        raise CheckpointError(f"{where}: lora_adapter_metadata has alphas by layer (alpha_pattern)")
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
        raise CheckpointError(f"{where}: lora_adapter_metadata has lora_alpha {alpha!r:.40}")
    return Scaling(alpha, values.get("use_rslora") is True)


def _version(model: OpenModel, names: Mapping[str, LoraName]) -> Told:
    """Return the generation and what tells it: the header, layers only one has, or a name."""
    if told := stated(model):
        return told
    words = spoken(model)
    if shown := _shown_by_layers(model, names):
        # 2.5 has the layers of 2.3: only words tell them apart.
        return next((item for item in words if item[0] > shown[0] >= (2, 3)), shown)
    return words[0] if words else ((), "")


def _shown_by_layers(model: OpenModel, names: Mapping[str, LoraName]) -> Told | None:
    for name, read in names.items():
        shape = model.tensors[name].shape
        if "caption_projection" in read.module:
            return (2, 0), "it changes the caption projection"
        if "connector" in read.module and _OLD_CONNECTOR in shape:
            return (2, 0), f"it changes connectors {_OLD_CONNECTOR} wide"
        if "to_gate_logits" in read.module or "prompt_adaln" in read.module:
            return (2, 3), "it changes gates or prompt modulation"
    return None


def _kind(module: str) -> str:
    """Return a layer's name without its block: attn1.to_q."""
    dotted = _dotted(module)
    return dotted.partition(".")[2] if dotted.startswith("N.") else dotted


def _dotted(module: str) -> str:
    """Put a dot behind the block, also where names have underscores."""
    return re.sub(r"^transformer_blocks[._]\d+[._]", "N.", module)


def factor_said(model: OpenModel, kind: Factor) -> int | None:
    """Return the "downscale" or "temporal" factor of references that a file states, if it does.

    Raises CheckpointError for a damaged number.
    Source: LTX-2 400fd31 (metadata keys), the file names of Lightricks' releases; features.md F1.
    """
    for key, value in model.metadata.items():
        if key.endswith(_FACTOR_KEYS[kind]):  # behind any prefix
            text = str(value).removesuffix(".0")
            if not text.isdecimal() or not 1 <= int(text) <= 64:
                raise CheckpointError(
                    f"{model.path}: {key} is {value!r}, wanted a whole number from 1 to 64"
                )
            return int(text)
    found = _FACTOR_IN_NAME.search(model.path.name) if kind == "downscale" else None
    return round(1 / float(found[1])) if found else None
