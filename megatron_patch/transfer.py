"""How what the host made gets to the device: from pinned memory, so that the host goes on while it is copied."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str | int) -> Tensor:
    """The tensor on ``device``; a copy to a GPU is queued behind what the GPU is at, and nobody waits for it."""
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)
