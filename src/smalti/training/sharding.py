"""A model in pieces: each process holds a part of its weights, gradients and moments (FSDP2).

A block is put together right before it computes and taken apart behind it. What stays outside of the pieces, such as
the projectors of alignment terms, is small and whole on every process; its gradients are averaged here. Checkpoints
hold whole tensors, so a run goes on with any number of processes, in pieces or not.

Source: ZeRO (arXiv 1910.02054), stage 3; PyTorch FSDP (arXiv 2304.11277), in its second form, `fully_shard`.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm

from smalti.core.errors import UserError


def shard(model: nn.Module) -> None:
    """Leaves this process its part of the weights: those of each block, and of all that lies outside of blocks.

    Args:
        model: its blocks are the members of its `ModuleList`s; it is changed in place and must be called as a whole.

    Raises:
        UserError: no processes were launched together.
    """
    if not distributed.is_initialized():
        raise UserError(
            "shard is on, but this process is alone; launch several (accelerate launch -m smalti.cli train ...), or "
            "leave shard off"
        )
    for tensor in (*model.parameters(), *model.buffers()):
        distributed.broadcast(tensor.data, 0)  # as DDP does: all processes begin with the first one's weights
    mesh = init_device_mesh(next(model.parameters()).device.type, (distributed.get_world_size(),))
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList):
            for block in stack:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def put_away(model: nn.Module) -> None:
    """Takes apart what a call without a backward pass has left together; else the next one would meet old weights."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may lie in pieces; all processes must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's piece of a tensor, which shares its memory; all of it where it is not in pieces."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, that every process has, in such pieces as another of its shape."""
    if isinstance(tensor, DTensor) or not isinstance(model, DTensor) or tensor.shape != model.shape:
        return tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of whole gradients, some of which may lie in pieces."""
    cut = [one for one in gradients if isinstance(one, DTensor)]
    rest = get_total_norm([one for one in gradients if not isinstance(one, DTensor)], foreach=True)
    return torch.hypot(rest, whole(get_total_norm(cut, foreach=True))) if cut else rest


def average(gradients: Iterable[Tensor]) -> None:
    """Averages gradients of what is whole on every process; those in pieces are averaged already."""
    for gradient in gradients:
        if not isinstance(gradient, DTensor):
            distributed.all_reduce(gradient)
            gradient /= distributed.get_world_size()


@torch.no_grad()
def gather(model: nn.Module, plain: nn.Module) -> None:
    """Fills a plain copy of a model that lies in pieces; all processes must ask together."""
    stored = model.state_dict()
    for name, tensor in plain.state_dict().items():
        tensor.copy_(whole(stored[name]))
