"""How much memory this process has taken, and how much there is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vtwcli.machine import distributed

if TYPE_CHECKING:
    import torch


def peak_resident() -> int:
    """Peak resident memory of this process in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory() -> dict[str, int]:
    """Peak memory of this process in bytes: ``rss`` resident, and ``cuda`` allocated by torch where CUDA was used."""
    import torch

    memory = {"rss": peak_resident()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        memory["cuda"] = torch.cuda.max_memory_allocated()
    return memory


def memory_available(device: torch.device, spread: bool = False) -> int:
    """Free bytes on a device, or with ``spread`` on all CUDA devices together.

    On a CPU: what the machine has left within the limit of the container, divided among the processes of a
    distributed run on this machine.
    """
    if device.type == "cuda":
        import torch

        devices = range(torch.cuda.device_count()) if spread else [device.index or 0]
        return sum(int(torch.cuda.mem_get_info(index)[0]) for index in devices)
    import psutil

    free = min(int(psutil.virtual_memory().available), cgroup_available())
    return free // distributed.local_size()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or ONNX Runtime says that memory was refused."""
    words = (
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "Failed to allocate memory",
        "bad_alloc",
    )
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def cgroup_available(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes left under a control group's memory limit (cgroup v2); huge where there is no limit."""
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit == "max":
            return 2**63
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return 2**63
