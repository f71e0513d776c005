"""What depends on the kind of device, and nothing else does: every other file treats a GPU's tensors like the CPU's."""

from __future__ import annotations

import torch

from samestep.core.memory import available_bytes


def is_cuda(device: str) -> bool:
    """Return whether `device` ("cpu", "cuda:0") names a CUDA device."""
    return torch.device(device).type == "cuda"


def make_current(device: str) -> None:
    """Make `device` the one that this process computes on. NCCL needs it; on the CPU it does nothing."""
    if is_cuda(device):
        torch.cuda.set_device(device)


def synchronize(device: str) -> None:
    """Wait until `device` has done all work given to it, as clocks and readers of its results need."""
    if is_cuda(device):
        torch.cuda.synchronize(device)


def free_bytes(device: str) -> int | None:
    """Return how many bytes can still be allocated on `device`; None where nobody tells."""
    if not is_cuda(device):
        return available_bytes()
    # What torch has reserved and does not use is free, too.
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def backend_for(device: str, *, staged: bool = False) -> str:
    """Return the `torch.distributed` backend for workers on `device`.

    Args:
        device: a torch device string.
        staged: tensors cross through the host's memory. Needed where several workers share one GPU, which NCCL
            refuses.

    Returns:
        A backend that carries CPU tensors (control messages) in every case, and tensors of `device` unless staged.
    """
    return "cpu:gloo,cuda:nccl" if is_cuda(device) and not staged else "gloo"


def host_room(tensor: torch.Tensor) -> torch.Tensor:
    """Return uninitialised CPU memory of `tensor`'s shape and dtype, pinned if `tensor` is on a GPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of `tensor` on the CPU; its bytes are there when the call returns."""
    room = host_room(tensor)
    room.copy_(tensor)
    return room
