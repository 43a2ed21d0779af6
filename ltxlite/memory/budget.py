"""How much memory a run may take: what the user says, or what is free."""

import ctypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from ltxlite.errors import BudgetError, RequestError

GIB = 1 << 30
# CUDA's context with its kernels takes 0.3 to 0.6 GiB, a desktop with a browser the rest.
DEFAULT_RESERVE = GIB
# Python, torch and CUDA's host side before any weight is there.
HOST_BASE = 3 * GIB // 2
_UNITS = {"": GIB, "gib": GIB, "gb": 10**9, "g": GIB, "mib": 1 << 20, "mb": 10**6, "m": 1 << 20}


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes a run may take.

    vram: of the device, with what is reserved.  reserve: of it, what is not for weights and
    activations.  ram: of the process, page-locked memory included.
    """

    vram: int
    ram: int
    reserve: int = DEFAULT_RESERVE

    @property
    def usable(self) -> int:
        """Device bytes for weights and activations."""
        return self.vram - self.reserve


def parse_bytes(text: str, flag: str) -> int:
    """Read "8GiB", "8 GB", "900MiB" or "8" (GiB) as bytes. Raises RequestError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise RequestError(f"{flag} {text!r}: wanted a size such as 8GiB, 7.5GB or 900MiB")
    return int(float(match[1]) * _UNITS[match[2]])


def free_budget(device: torch.device, ram: int | None = None) -> Budget:
    """Return what is free now, less a margin for others; ram: where it is known, it is not read.

    On a device without memory of its own all of it is RAM, and `vram` without a bound.
    """
    ram = available_ram() if ram is None else ram
    if device.type != "cuda":
        return Budget(vram=1 << 62, ram=ram, reserve=0)
    free, total = torch.cuda.mem_get_info(device)
    # What others hold already is not free: of the reserve only our own context is to come.
    return Budget(vram=min(free + DEFAULT_RESERVE // 2, total), ram=ram)


def available_ram() -> int:
    """Return the bytes of RAM that can be had without swapping, less a tenth."""
    found = _from_windows() if sys.platform == "win32" else _from_meminfo()
    return found * 9 // 10


def _from_meminfo() -> int:
    path = Path("/proc/meminfo")
    if path.is_file():
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    raise BudgetError("the free memory cannot be read on this system; say it with --ram 16GiB")


class _MemoryStatus(ctypes.Structure):
    # MEMORYSTATUSEX of the Windows API
    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "available", "pages", "free_pages")),
        *((name, ctypes.c_uint64) for name in ("virtual", "free_virtual", "extended")),
    )


def _from_windows() -> int:
    status = _MemoryStatus()
    status.length = ctypes.sizeof(status)
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009 - absent elsewhere
    if not kernel.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise BudgetError("the free memory cannot be read; say it with --ram 16GiB")
    return int(status.available)
