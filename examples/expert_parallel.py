"""Experts spread over ranks: tokens travel to the rank of their expert, and back.

``torchrun --standalone --nproc-per-node=2 examples/expert_parallel.py`` compares it with one rank.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import torch_routers as tr

HIDDEN, INTERMEDIATE, EXPERTS = 32, 64, 8


class AllToAll(torch.autograd.Function):
    """Rows to other ranks: ``sent[r]`` to rank r, ``received[r]`` from it; gradients go back."""

    @staticmethod
    def forward(ctx, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sent, ctx.received = sent, received
        if sum(sent) != rows.shape[0]:  # the collective would wait for ever
            raise ValueError(f"AllToAll: expected {sum(sent)} rows, got {rows.shape[0]}")
        result = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(result, rows.contiguous(), received, sent)
        return result

    @staticmethod
    def backward(ctx, grad: Tensor):
        return AllToAll.apply(grad, ctx.received, ctx.sent), None, None


class ParallelExperts(nn.Module):
    """A bank of ``num_experts`` for `MoE`, of which this rank holds the bank ``local``."""

    def __init__(self, local: nn.Module) -> None:
        super().__init__()
        self.local, self.num_experts = local, local.num_experts * dist.get_world_size()

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        # Rows come sorted by expert, hence by rank. First everyone learns what to expect.
        counts = offsets.diff().view(-1, self.local.num_experts)  # [ranks, experts of each]
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts)
        sent, received = counts.sum(1).tolist(), arriving.sum(1).tolist()
        mine = AllToAll.apply(rows[: sum(sent)], sent, received)

        # They arrive sorted by rank, then by expert: a plan of one slot per row sorts by expert.
        experts = torch.arange(self.local.num_experts).repeat(len(received))
        experts = experts.repeat_interleave(arriving.flatten()).unsqueeze(1)
        plan = tr.ops.expert_plan(experts, self.local.num_experts)
        y = self.local(tr.ops.permute_tokens(mine, plan), plan.offsets)
        y = AllToAll.apply(tr.ops.combine_tokens(y, None, plan), received, sent)
        return F.pad(y, (0, 0, 0, rows.shape[0] - y.shape[0]))  # rows of no expert: masked tokens


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # everyone builds the whole layer, and keeps a share of it
    router = tr.TopKRouter(HIDDEN, EXPERTS, top_k=2)
    whole = tr.MoE(router, tr.SwiGLUExperts(EXPERTS, HIDDEN, INTERMEDIATE)).double()
    local = tr.SwiGLUExperts(EXPERTS // ranks, HIDDEN, INTERMEDIATE).double()
    for mine, all_of_them in zip(local.parameters(), whole.experts.parameters()):
        mine.data.copy_(all_of_them.data.chunk(ranks)[rank])
    tokens = [5 + 7 * r for r in range(ranks)]  # of each rank
    x = torch.randn(sum(tokens), HIDDEN, dtype=torch.float64)
    valid = torch.arange(len(x)) % 5 > 0

    expected = whole(x, valid_mask=valid)
    wanted = torch.autograd.grad(expected.square().mean(), list(whole.parameters()))

    moe = tr.MoE(router, ParallelExperts(local))
    y = moe(x.split(tokens)[rank], valid_mask=valid.split(tokens)[rank])
    loss = y.square().sum() / expected.numel()  # this rank's part of the mean
    of_router, *of_experts = torch.autograd.grad(loss, [router.weight, *local.parameters()])
    dist.all_reduce(of_router)  # all ranks have the router; an expert's gradient is whole already

    errors = {
        "output": relative_error(y, expected.split(tokens)[rank]),
        "router": relative_error(of_router, wanted[0]),
    }
    for (name, _), gradient, of_all in zip(local.named_parameters(), of_experts, wanted[1:]):
        errors[name] = relative_error(gradient, of_all.chunk(ranks)[rank])
    print(f"rank {rank}: relative errors", {k: f"{e:.1e}" for k, e in errors.items()}, flush=True)
    assert max(errors.values()) < 1e-12
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    os._exit(0)  # threads of gloo may abort while the interpreter shuts down
