"""Peak memory of a process that serves many trials."""

from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")


def peak(device: torch.device) -> int:
    """Bytes at the highest since the last call: of the GPU, or of the process (where the system
    does not let the mark be reset, since its start)."""
    if device.type == "cuda":
        value = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return value
    try:
        status = Path("/proc/self/status").read_text()
        value = int(status.split("VmHWM:")[1].split()[0]) * 1024
        _CLEAR.write_text("5")
    except (OSError, IndexError):
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return value
