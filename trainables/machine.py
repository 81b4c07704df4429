"""How busy a worker's machine is, under the names that MLflow has for it."""

import contextlib

import psutil
import torch


def usage(device: torch.device) -> dict[str, float]:
    """Of the processor since the last call, of memory now, and of the GPU where there is one: in
    percent and megabytes."""
    memory = psutil.virtual_memory()
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        gpu = f"gpu_{device.index or 0}"
        found[f"{gpu}_memory_usage_megabytes"] = (total - free) / 1e6
        found[f"{gpu}_memory_usage_percentage"] = 100 * (1 - free / total)
        with contextlib.suppress(Exception):  # without NVIDIA's own library nobody knows
            found[f"{gpu}_utilization_percentage"] = float(torch.cuda.utilization(device))
    return found
