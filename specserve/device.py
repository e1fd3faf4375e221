"""The one module that names torch.cuda: which device, how much memory, which dtype."""

from __future__ import annotations

import torch


def resolve_device(name: str) -> torch.device:
    """ "auto" is the first GPU where there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def free_memory(device: torch.device, utilization: float) -> int:
    """Bytes of a GPU that may still be taken if `utilization` of all its memory is ours to use."""
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(free - (1.0 - utilization) * total))
