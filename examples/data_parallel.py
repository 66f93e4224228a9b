"""A mixture of experts trained on several ranks that have unequally many tokens.

``torchrun --standalone --nproc-per-node=2 examples/data_parallel.py``
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import torch_routers as tr


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        losses = [tr.losses.GlobalBalanceLoss(1e-2), tr.losses.ZLoss(1e-3)]
        router = tr.TopKRouter(16, 4, 2, score="sigmoid", selection_bias=True, losses=losses)
        self.norm = nn.LayerNorm(16)
        self.moe = tr.MoE(router, tr.SwiGLUExperts(4, 16, 32))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


def shard(model: nn.Sequential) -> nn.Sequential:
    """FSDP2 in bfloat16, with routers that keep their weights in float32."""
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, tr.Router):
            fully_shard(module)
    for block in model:
        fully_shard(block, mp_policy=half)
    return fully_shard(model, mp_policy=half)


def train(model: nn.Module, steps: int) -> list[float]:
    """The mean over the tokens of all ranks, and the routers' losses likewise."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    attached, controller = tr.attach(model), tr.BalanceController(model, 1e-2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    balance = [m for m in model.modules() if isinstance(m, tr.losses.GlobalBalanceLoss)]
    generator, history = torch.Generator().manual_seed(rank), []
    for step in range(steps):
        tokens = 0 if step % 5 == 4 and rank > 0 else 32 + 16 * rank  # sometimes a rank has none
        x = torch.randn(tokens, 16, generator=generator)
        total = torch.tensor(tokens)
        dist.all_reduce(total)
        error = (model(x).float() - x.sign()).square().mean(-1)
        mean = error.sum() / max(tokens, 1)
        share = tokens * ranks / total.item()  # what the gradients' mean over ranks needs
        (attached(mean) * share).backward()
        optimizer.step()
        optimizer.zero_grad()
        for loss in balance:
            loss.reset()  # its counts are those of one step
        controller.step()  # on every rank, also on one without tokens
        mean = mean.detach() * share / ranks
        dist.all_reduce(mean)
        history.append(mean.item())
    return history


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    model = shard(nn.Sequential(Block(), Block()))
    history = train(model, 40)

    # The whole model, on rank 0, as one process knows it: to save, or to route with.
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        print(f"mean error: {history[0]:.3f} at first, {history[-1]:.3f} after 40 steps")
        assert history[-1] < 0.7 * history[0]
        single = nn.Sequential(Block(), Block()).eval()
        single.load_state_dict(state)
        with torch.no_grad(), tr.collect(single) as routings:
            single(torch.randn(256, 16))
        print("slots per expert:", [r.counts.tolist() for r in routings], flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    os._exit(0)  # threads of gloo may abort while the interpreter shuts down
