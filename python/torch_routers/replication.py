"""Whether the routers of all ranks are equal, to the bit."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_routers.delivery import routers_of
from torch_routers.noise import hashed

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_replicated(model: nn.Module, group: "dist.ProcessGroup | None" = None) -> None:
    """Raise on every rank if the routers of the ranks differ, naming the first that does.

    Ranks that hold copies of a router must decide alike. Where their copies have drifted apart, by
    another seed, a controller that stepped on one rank alone or a state that one rank did not load,
    nothing fails, and a checkpoint, which stores one of them, hides it.

    Compared are a hash of 64 bits of every parameter and buffer of every router, and their names,
    in two ``all_reduce`` of integers; it waits for the device. Call it on every rank, for instance
    after loading and every thousand steps. Parameters that are sharded (DTensors, of FSDP2) have no
    copies, and are left out. Without initialised ``torch.distributed`` there is nothing to compare.

    Args:
        model: has routers.
        group: the ranks that hold copies. Default: all processes.

    Raises:
        ValueError: the ranks differ, or the model has no router.

    >>> assert_replicated(TopKRouter(16, 4, 2))
    """
    routers = routers_of(model, "assert_replicated")
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.tensor import DTensor  # takes a while

    tensors = {
        (name, own): tensor.detach()
        for name, router in routers.items()
        for own, tensor in [*router.named_parameters(), *router.named_buffers()]
        if not isinstance(tensor, DTensor)
    }
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    described = repr([(*key, str(t.dtype), list(t.shape)) for key, t in tensors.items()])
    names = _hash(torch.tensor(list(described.encode()), dtype=torch.uint8, device=device))
    if _differ(names[None], group).any():
        raise ValueError(
            "assert_replicated: expected routers with the same tensors on all ranks, "
            f"got other names, dtypes or shapes than {[f'{n}: {own}' for n, own in tensors]}"
        )
    if not tensors:
        return
    differ = _differ(torch.stack([_hash(t).to(device) for t in tensors.values()]), group)
    for (name, own), differs in zip(tensors, differ.tolist()):
        if differs:
            raise ValueError(
                f"assert_replicated: expected equal routers on all ranks, got different {own!r} of "
                f"{name!r}"
            )


def _hash(tensor: Tensor) -> Tensor:
    """A scalar int64 of the bits of a tensor, each with its place."""
    bits = tensor.contiguous().flatten().view(_INTEGERS[tensor.element_size()])
    place = torch.arange(len(bits), device=bits.device)
    return hashed(hashed(place) + bits).sum()


def _differ(hashes: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """Which of the numbers are not the same on all ranks."""
    both = torch.stack([hashes, ~hashes])  # the largest ~x is that of the smallest x
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    return both[0] != ~both[1]
