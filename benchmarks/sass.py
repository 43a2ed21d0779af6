"""What a compiled kernel asks of a card, read from its machine code.

Instruction names differ between generations: HMMA, IMMA and QMMA work in a warp's registers,
HGMMA, IGMMA and QGMMA (Hopper) in a group of four warps on shared memory.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# The first name a kernel's matrix products have in machine code, by the kind of their inputs.
TENSOR_CORE: Mapping[str, tuple[str, ...]] = {
    "int8": ("IMMA", "IGMMA"),
    "fp16": ("HMMA", "HGMMA"),
    "bf16": ("HMMA", "HGMMA"),
    "fp8": ("QMMA", "QGMMA", "OMMA"),
}
_TENSOR = ("HMMA", "IMMA", "QMMA", "OMMA", "HGMMA", "IGMMA", "QGMMA")
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)")
_PTX_TENSOR = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async)[\w.:]*")
_ACCESS = re.compile(r"\b(ld|st|cp\.async)\.(?:[\w:]*\.)*?(?:shared\.)?global[\w.:]*[^;]*")


@dataclass(frozen=True, slots=True)
class Instruction:
    """A machine instruction: where, what, and where a branch leads."""

    address: int
    name: str
    target: int | None

    @property
    def stem(self) -> str:
        """Its name without modifiers: HMMA of HMMA.16816.F32."""
        return self.name.split(".")[0]


def instructions(listing: str) -> list[Instruction]:
    """Return the instructions of a `cuobjdump -sass` listing, in order."""
    found = []
    for address, name, rest in _LINE.findall(listing):
        target = _TARGET.search(rest) if name.startswith("BRA") else None
        found.append(Instruction(int(address, 16), name, int(target[1], 16) if target else None))
    return found


def spills(code: Sequence[Instruction]) -> int:
    """Count loads and stores of local memory: registers that did not fit."""
    return sum(one.stem in ("LDL", "STL") for one in code)


def tensor_names(code: Sequence[Instruction]) -> dict[str, int]:
    """Count tensor-core instructions by name."""
    return dict(Counter(one.stem for one in code if one.stem in _TENSOR))


def hot_loop(code: Sequence[Instruction]) -> tuple[int, int]:
    """Return instructions and tensor-core instructions of the innermost loop that has most of them.

    (0, 0) without a loop of matrix products.
    """
    best = (0, 0)
    for end, one in enumerate(code):
        if one.target is None or one.target >= one.address:
            continue
        body = [other for other in code[: end + 1] if other.address >= one.target]
        tensor = sum(other.stem in _TENSOR for other in body)
        if tensor > best[1] or (tensor == best[1] and tensor and len(body) < best[0]):
            best = (len(body), tensor)
    return best


def ptx_tensor(ptx: str) -> list[str]:
    """Return the distinct matrix instructions of a PTX text."""
    return sorted(set(_PTX_TENSOR.findall(ptx)))


def accesses(ptx: str) -> tuple[dict[int, int], dict[int, int]]:
    """Count global loads (asynchronous copies too) and stores of a thread by their bytes."""
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for found in _ACCESS.finditer(ptx):
        kind, text = found[1], found[0]
        (stores if kind == "st" else loads)[_bytes(kind, text)] += 1
    return dict(sorted(loads.items())), dict(sorted(stores.items()))


def _bytes(kind: str, text: str) -> int:
    if kind == "cp.async":  # cp.async.cg.shared.global [ to ], [ from ], bytes, ...
        size = re.search(r"\],\s*\[[^\]]*\],\s*(?:0x)?(\d+)", text)
        return int(size[1], 16 if "0x" in size[0] else 10) if size else 0
    opcode = text.split()[0]
    bits = re.search(r"\.[bfus](\d+)$", opcode)
    vector = re.search(r"\.v(\d)", opcode)
    return (int(bits[1]) // 8 if bits else 0) * (int(vector[1]) if vector else 1)
