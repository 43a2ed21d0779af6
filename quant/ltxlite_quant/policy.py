"""Which tensor gets which format: ordered name patterns, of which the first that matches holds.

A recipe is a base format and its exceptions. The named ones follow city96's rules for LTX-Video,
which most published GGUF files were made with, and add what their sizes pay for: connectors in
Q8_0, gates in BF16, the sound stream's feed-forward treated as the picture's.
Source: formats.md 4.4 and 4.5.
"""

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ltxlite_quant.formats import FORMATS, BlockFormat, FormatError

_FILE_LIMIT = 1 << 20  # bytes of a recipe file
_RULE_KEYS = {"match", "format", "first"}
_OWN_FILE_TYPE = 1024  # GGUF's number for a mixture without a name


@dataclass(frozen=True, slots=True)
class Rule:
    """An exception from a recipe's base.

    pattern: a regular expression, searched for in a tensor's name.  format: of the tensors it
    finds.  reason: for the report.  first: only so many tensors, in the order of the file.
    """

    pattern: str
    format: str
    reason: str
    first: int | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is quantized.

    base: format of what no rule finds.  file_type: GGUF's number for the whole.
    """

    name: str
    base: str
    file_type: int
    rules: tuple[Rule, ...] = ()

    def text(self) -> str:
        """Return everything that decides formats, as one line of JSON."""
        rules = [[rule.pattern, rule.format, rule.first] for rule in self.rules]
        return json.dumps({"name": self.name, "base": self.base, "rules": rules})


@dataclass(frozen=True, slots=True)
class Decision:
    """What a tensor becomes, and why."""

    name: str
    shape: tuple[int, ...]
    format: BlockFormat
    reason: str


@dataclass(frozen=True, slots=True)
class _Mix:
    """A named recipe: values are (first, format) of attention values, down of feed-forwards."""

    base: str
    file_type: int
    values: tuple[tuple[int | None, str], ...] = ()
    down: str | None = None


# No recipe changes these: ComfyUI decodes the weights of layers only, and these are none.
_RAW = r"scale_shift_table|learnable_registers$|keyframes_abs_pos_embedding$"
_SENSITIVE = (
    Rule(r"adaln_single\.", "BF16", "modulation, its error meets every token"),
    Rule(r"caption_projection\.", "BF16", "where text enters"),
    Rule(r"patchify_proj\.|proj_out\.", "BF16", "where latents enter and leave"),
    Rule(r"\.to_gate_logits\.", "BF16", "gates of whole heads, 57 MB of them all"),
)
_CONNECTORS = Rule(r"embeddings_connector\.", "Q8_0", "connector, runs once a prompt")
_EMBEDDINGS = Rule(r"^token_embd\.", "Q6_K", "embeddings, of which few rows are read")
# As LTX names them, and llama.cpp in text encoders.
_VALUES = r"\.(to_v|attn_v)\.weight$"
_DOWN = r"(ff\.net\.2|ffn_down)\.weight$"

_MIXES = {
    "Q2_K": _Mix("Q2_K", 10, ((None, "Q3_K"),)),
    "Q3_K_S": _Mix("Q3_K", 11),
    "Q3_K_M": _Mix("Q3_K", 12, ((2, "Q5_K"), (None, "Q4_K")), "Q4_K"),
    "Q3_K_L": _Mix("Q3_K", 13, ((None, "Q5_K"),), "Q5_K"),
    "IQ4_XS": _Mix("IQ4_XS", 30),
    "IQ4_NL": _Mix("IQ4_NL", 25),
    "MXFP4": _Mix("MXFP4", 38),
    "Q4_0": _Mix("Q4_0", 2, down="Q4_1"),
    "Q4_1": _Mix("Q4_1", 3),
    "Q4_K_S": _Mix("Q4_K", 14, ((4, "Q5_K"),), "Q5_K"),
    "Q4_K_M": _Mix("Q4_K", 15, ((None, "Q6_K"),), "Q6_K"),
    "Q5_0": _Mix("Q5_0", 8, down="Q5_1"),
    "Q5_1": _Mix("Q5_1", 9),
    "Q5_K_S": _Mix("Q5_K", 16),
    "Q5_K_M": _Mix("Q5_K", 17, ((None, "Q6_K"),), "Q6_K"),
    "Q6_K": _Mix("Q6_K", 18),
    "Q8_0": _Mix("Q8_0", 7),
    "F16": _Mix("F16", 1),
    "BF16": _Mix("BF16", 32),
}
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # as llama-quantize reads them
_USABLE = tuple(
    name
    for name, row in FORMATS.items()
    if row.ggml_type is not None and (row.is_quantized or name in ("F32", "F16", "BF16"))
)


def _named(name: str, mix: _Mix) -> Recipe:
    rules = list(_SENSITIVE)
    for special in (_CONNECTORS, _EMBEDDINGS):
        if FORMATS[mix.base].bits_per_element < FORMATS[special.format].bits_per_element:
            rules.append(special)
    rules += [Rule(_VALUES, kind, f"attention values, {name}", n) for n, kind in mix.values]
    if mix.down:
        rules.append(Rule(_DOWN, mix.down, f"feed-forward output, {name}"))
    return Recipe(name, mix.base, mix.file_type, tuple(rules))


RECIPES: Mapping[str, Recipe] = MappingProxyType({n: _named(n, mix) for n, mix in _MIXES.items()})


def recipe_named(name: str) -> Recipe:
    """Return a named recipe, in any case; FormatError lists them all."""
    known = _ALIASES.get(name.upper(), name.upper())
    if known not in RECIPES:
        raise FormatError(f"no recipe is called {name!r}; choose {', '.join(RECIPES)}")
    return RECIPES[known]


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from a TOML file, or a JSON one if it is called so.

    `base` names a recipe, whose rules then come after the file's own, or a bare format; each of
    `rules` has `match` (a regular expression), `format` and maybe `first`.  Raises FormatError
    naming file and rule.
    """
    content = _parse(path)
    if surplus := content.keys() - {"name", "base", "rules"}:
        raise FormatError(f"{path}: unknown key {min(surplus)!r}; it has name, base and rules")
    base, name = content.get("base"), content.get("name", path.stem)
    if not isinstance(base, str) or not isinstance(name, str):
        raise FormatError(f'{path}: wanted base = "Q4_K_M" and maybe a name, got {base!r:.40}')
    listed = content.get("rules", [])
    if not isinstance(listed, list):
        raise FormatError(f"{path}: rules must be a list, got {listed!r:.40}")
    own = [_read_rule(rule, f"{path}: rule {number}") for number, rule in enumerate(listed, 1)]
    start = _starting(base, path)
    return Recipe(name, start.base, _OWN_FILE_TYPE, (*own, *start.rules))


def decide(recipe: Recipe, shapes: Mapping[str, Sequence[int]]) -> list[Decision]:
    """Choose a format for every tensor, in the order given, which is that of the file.

    Vectors and tensors that no layer owns are F32 and those of more than two dimensions BF16,
    whatever the recipe says; where rows are no whole number of blocks, Q8_0 or BF16 takes over.
    """
    used = [0] * len(recipe.rules)
    decisions = []
    for name, sizes in shapes.items():
        shape = tuple(sizes)
        kind, reason = _wanted(recipe, name, shape, used)
        chosen = _fitting(FORMATS[kind], shape)
        if chosen.name != kind:
            reason = f"rows of {shape[-1]} are no whole {kind} blocks ({reason})"
        decisions.append(Decision(name, shape, chosen, reason))
    return decisions


def decision_lines(decisions: Iterable[Decision]) -> list[str]:
    """Summarise decisions: for each format and reason, how many tensors and bytes."""
    sums: dict[tuple[str, str], list[int]] = {}
    for item in decisions:
        count = sums.setdefault((item.format.name, item.reason), [0, 0])
        count[0] += 1
        count[1] += _nbytes(item)
    rows = sorted(sums.items(), key=lambda row: -row[1][1])
    return [
        f"{kind:6} {count:5} tensors {size / 1e9:8.3f} GB  {reason}"
        for (kind, reason), (count, size) in rows
    ]


def total_bytes(decisions: Iterable[Decision]) -> int:
    """Return the bytes of all tensors, without header and padding."""
    return sum(_nbytes(item) for item in decisions)


def _nbytes(item: Decision) -> int:
    elements = 1
    for size in item.shape:
        elements *= size
    return elements // item.format.block_size * item.format.block_bytes


def _wanted(recipe: Recipe, name: str, shape: tuple[int, ...], used: list[int]) -> tuple[str, str]:
    """Return a format's name and the reason; counts in `used` how often each rule held."""
    if len(shape) < 2:
        return "F32", "vector"
    if re.search(_RAW, name):
        return "F32", "belongs to no layer, so no program decodes it"
    if len(shape) > 2:
        return "BF16", "more than two dimensions"
    for index, rule in enumerate(recipe.rules):
        if (rule.first is None or used[index] < rule.first) and re.search(rule.pattern, name):
            used[index] += 1
            return rule.format, rule.reason
    return recipe.base, f"base of {recipe.name}"


def _fitting(wanted: BlockFormat, shape: tuple[int, ...]) -> BlockFormat:
    if not shape or shape[-1] % wanted.block_size == 0:
        return wanted
    fallback = FORMATS["Q8_0"]
    return FORMATS["BF16"] if shape[-1] % fallback.block_size else fallback


def _starting(base: str, path: Path) -> Recipe:
    if base in RECIPES:
        return RECIPES[base]
    if base in _USABLE:  # bare: the caller's rules are all there are, but for the sensitive ones
        return Recipe(base, base, _OWN_FILE_TYPE, _SENSITIVE)
    raise FormatError(f"{path}: base is {base!r}; choose {', '.join((*RECIPES, *_USABLE))}")


def _read_rule(rule: object, where: str) -> Rule:
    if not isinstance(rule, dict) or not {"match", "format"} <= rule.keys() <= _RULE_KEYS:
        raise FormatError(f"{where} must have match, format and maybe first, got {rule!r:.80}")
    pattern, kind, first = rule["match"], rule["format"], rule.get("first")
    if kind not in _USABLE:
        raise FormatError(f"{where}: format is {kind!r}; choose {', '.join(_USABLE)}")
    if first is not None and (type(first) is not int or first < 0):
        raise FormatError(f"{where}: first is {first!r}, wanted a number of tensors")
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise FormatError(f"{where}: {pattern!r:.80} is no regular expression ({error})") from None
    return Rule(pattern, kind, f"own rule {pattern!r}", first)


def _parse(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _FILE_LIMIT:
        raise FormatError(f"{path}: {path.stat().st_size} bytes are too many for a recipe")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # both parsers' errors, and broken UTF-8
        raise FormatError(f"{path}: the recipe cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path}: wanted an object with base and rules, got {content!r:.40}")
    return content
