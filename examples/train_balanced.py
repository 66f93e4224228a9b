"""Balance experts by a bias instead of a loss: ``python train_balanced.py``.

A DeepSeek-V3 layer in small, trained to undo a random rotation; the load of its experts is printed,
and the same without the bias.
"""

import torch

import torch_routers as tr

WIDTH, EXPERTS = 32, 16


def train(balanced: bool) -> None:
    torch.manual_seed(0)
    moe = tr.create_moe(
        "deepseek_v3", WIDTH, 32, num_experts=EXPERTS, top_k=2, num_groups=4, topk_group=2
    )
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q
    optimizer = torch.optim.AdamW(tr.parameter_groups(moe), lr=3e-3)
    controller = tr.BalanceController(moe, rate=0.01 if balanced else 0.0)
    for step in range(301):
        x = torch.randn(256, WIDTH) + 0.5  # not centred: some experts are liked by all tokens
        y, routing = moe(x, return_routing=True)
        loss = (y - x @ rotation).square().mean()
        loss.backward()
        optimizer.step()
        controller.step()  # once per optimiser step
        optimizer.zero_grad()
        if step % 100 == 0:
            vio = float(tr.metrics.max_vio(routing))
            print(f"{step:4d}  loss {loss.item():.3f}  largest load {1 + vio:.2f} of a fair share")


def main() -> None:
    torch.set_num_threads(1)  # faster at this size
    for balanced in False, True:
        print("with balancing" if balanced else "without")
        train(balanced)


if __name__ == "__main__":
    main()
