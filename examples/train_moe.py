"""Train a small language model of bytes with a mixture-of-experts layer: ``python train_moe.py``.

The losses of the router are attached: the training loop changes by one call. The text is the source
of Python's own argparse.
"""

import argparse
import inspect

import torch
import torch.nn.functional as F
from torch import nn

import torch_routers as tr

CONTEXT, WIDTH, EXPERTS = 8, 64, 8


class Model(nn.Module):
    """Predicts the next byte from the last few."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 16)
        self.mix = nn.Linear(16 * CONTEXT, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        router = tr.TopKRouter(
            hidden_size=WIDTH,
            num_experts=EXPERTS,
            top_k=2,
            losses=[tr.losses.LoadBalanceLoss(5e-2), tr.losses.ZLoss(1e-3)],
        )
        self.moe = tr.MoE(router, tr.SwiGLUExperts(EXPERTS, WIDTH, intermediate_size=64))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.embedding(context).flatten(-2))
        return self.head(x + self.moe(self.norm(x)))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # faster at this size
    text = torch.tensor(list(inspect.getsource(argparse).encode()))
    windows = text.unfold(0, CONTEXT + 1, 1)
    model = Model()
    attached = tr.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    for step in range(401):
        batch = windows[torch.randint(len(windows), (512,))]
        with tr.collect(model) as routings:  # only to print the load
            loss = F.cross_entropy(model(batch[:, :-1]), batch[:, -1])
        attached(loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            routing = routings[0]
            load = (routing.counts / routing.counts.sum()).tolist()
            shares = " ".join(f"{share:4.0%}" for share in load)
            balance = routing.losses["load_balance"]
            print(f"step {step:3}  loss {loss:.3f}  balance loss {balance:.3f}  load {shares}")


if __name__ == "__main__":
    main()
