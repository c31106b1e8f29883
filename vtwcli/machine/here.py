"""What this machine is, for a bug report: processors, memory, caches, and the switches that keep libraries offline."""

from __future__ import annotations

import os
from typing import Any

from vtwcli.machine.memory import cgroup_available

_SWITCHES = (
    "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VTW_RELEASES",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """Devices, memory, caches and switches of this process.

    Returns:
        ``cpus``: that it may use; ``memory``: ``total`` and ``available`` bytes, a container's limit respected;
        ``devices``: name and ``memory`` (bytes) of each CUDA device; ``caches``: where models (``hub``) and data
        (``datasets``) are kept; ``switches``: variables that are set.
    """
    import psutil

    held = psutil.virtual_memory()
    available = getattr(os, "sched_getaffinity", None)
    return {
        "cpus": len(available(0)) if available else os.cpu_count(),
        "memory": {"total": int(held.total), "available": min(int(held.available), cgroup_available())},
        "devices": _devices(),
        "caches": _caches(),
        "switches": {name: os.environ[name] for name in _SWITCHES if name in os.environ},
    }


def _devices() -> list[dict[str, Any]]:
    try:
        import torch
    except (ImportError, OSError):  # a build that does not fit is what the report is for
        return []
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": one.name, "memory": int(one.total_memory)} for one in found]


def _caches() -> dict[str, str]:
    from huggingface_hub import constants

    data = os.environ.get("HF_DATASETS_CACHE", os.path.join(constants.HF_HOME, "datasets"))  # noqa: PTH118
    return {"hub": constants.HF_HUB_CACHE, "datasets": data}
