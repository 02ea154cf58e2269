"""What a run computes on, alone or as one of the processes that torchrun started."""

from __future__ import annotations

import os

import torch
from torch import distributed


def has_bf16(device: torch.device) -> bool:
    """Whether products of bf16 have instructions there. Without them torch gives the same, many times slower than
    fp32: 13 to 18 times on a processor with AVX2 alone (4,096 rows of width 128).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def start_processes() -> torch.device:
    """The device of this process; joins the group if torchrun started it."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device
