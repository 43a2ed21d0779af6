"""Facts about this machine, read without changing anything."""

import os
import platform
import shutil
import time
from importlib import metadata
from pathlib import Path

import torch

from ltxlite import __version__

_PACKAGES = (
    "torch",
    "triton",
    "triton-windows",
    "safetensors",
    "gguf",
    "bitsandbytes",
    "numpy",
    "av",
    "sentencepiece",
    "tokenizers",
    "rich",
    "pillow",
)
_READ_BYTES = 256 << 20


def machine_report() -> dict[str, str]:
    """Return versions, processor, memory, disk and GPUs, as texts by name."""
    report = {
        "ltxlite": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "packages": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES if _version(name)),
        "memory": _memory(),
        "disk here": f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB free",
    }
    return report | _gpus()


def disk_speed(path: Path) -> str:
    """Read up to 256 MiB of a file (or of the largest file in a folder) and tell how fast it came.

    The system may have it in memory already; a first run after a restart shows the disk.
    """
    if path.is_dir():
        files = sorted((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        if not files:
            return "nothing to read"
        path = files[-1]
    if not path.is_file():
        return "no such file"
    since, done = time.perf_counter(), 0
    with path.open("rb", buffering=0) as file:
        while done < _READ_BYTES and (piece := file.read(16 << 20)):
            done += len(piece)
    elapsed = max(time.perf_counter() - since, 1e-9)
    return f"{done / 1e6:.0f} MB of {path.name} in {elapsed:.3f} s, {done / elapsed / 1e9:.2f} GB/s"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _memory() -> str:
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return "not read on this system"
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    kib = {name: int(fields[name].split()[0]) for name in ("MemTotal", "MemAvailable")}
    total, free = (kib[name] * 1024 / 1e9 for name in ("MemTotal", "MemAvailable"))
    return f"{total:.1f} GB, {free:.1f} GB available"


def _gpus() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"gpu": f"none that torch sees (built for CUDA {torch.version.cuda})"}
    found = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found[f"gpu {index}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.multi_processor_count} SMs, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        )
    return found
