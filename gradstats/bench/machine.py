"""What numbers were measured on: hardware, versions, commit and date; and what memory and caches there are."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import gradstats

_LEAST_CACHE = 32 << 20  # bytes; also where the size is unknown


def describe() -> dict[str, Any]:
    """Hardware, versions and :func:`stamp`, for the head of a file of results."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gradstats": gradstats.__version__,
        "backends": [backend.name for backend in gradstats.backends().values() if backend.available],
    } | stamp()


def stamp() -> dict[str, Any]:
    """When, on what code and on how busy a machine something is measured."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "date": now.isoformat(timespec="seconds"),
        "commit": _commit(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def _commit() -> str | None:
    """The commit of the checkout that the package lies in, with ``-dirty``; None where it is installed."""
    root = Path(gradstats.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; on a CPU that of all its cores together."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = {}
    for cache in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        cores, size = (cache / "shared_cpu_list").read_text(), (cache / "size").read_text().strip()
        sizes[cores] = int(size.removesuffix("K")) << 10
    return max(sum(sizes.values()), _LEAST_CACHE)


def available_bytes(device: torch.device) -> int:
    """Memory that is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    available = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return int(available) << 10 if available else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
