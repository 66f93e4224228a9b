"""Balancing without a loss: a bias of the selection that follows the load of the experts."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from torch_routers.delivery import routers_of
from torch_routers.routers import Router


class BalanceController:
    r"""Moves the ``expert_bias`` of a model's routers after each optimiser step.

    .. math::  b_e \leftarrow b_e + u \, \mathrm{sign}(\bar c - c_e)

    with :math:`c_e` the slots that expert :math:`e` was given since the last step, over all
    micro-batches and ranks, and :math:`\bar c` their mean over the experts (auxiliary-loss-free
    load balancing, arXiv 2408.15664, as used for DeepSeek-V3). The bias takes part in the choice of
    experts alone, never in their weights, so nothing disturbs the gradient of the task.

    Padding, evaluation and the repeated forward of activation checkpointing are not counted: counts
    are taken in backward.

    Args:
        model: has routers with an ``expert_bias``, such as ``TopKRouter(selection_bias=True)``. It
            is on its device already.
        rate: :math:`u`, or one per router by the name of its module; 0 leaves a bias as it is.
            1e-3 in both papers. Attribute ``rate`` may be changed at any time.
        update: ``"sign"``, or ``"proportional"``: :math:`u (\bar c - c_e)`.
        recenter: subtract the mean of the bias afterwards, which changes no decision (torchtitan
            does, Megatron-LM and the paper do not).
        group: the process group to add counts up over. Default: all processes, where
            ``torch.distributed`` is initialised.

    Raises:
        ValueError: an argument that does not fit, or no router with an ``expert_bias``.

    >>> from torch_routers import TopKRouter
    >>> router = TopKRouter(16, 4, 2, selection_bias=True)
    >>> controller = BalanceController(router)
    >>> router(torch.randn(9, 16)).weights.sum().backward()
    >>> controller.step()  # once per optimiser step
    >>> sorted({round(b, 4) for b in router.expert_bias.tolist()} - {0.0})
    [-0.001, 0.001]
    """

    def __init__(
        self,
        model: nn.Module,
        rate: float | Mapping[str, float] = 1e-3,
        *,
        update: Literal["sign", "proportional"] = "sign",
        recenter: bool = False,
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        if update not in ("sign", "proportional"):
            raise ValueError(
                f"BalanceController: expected update among ['sign', 'proportional'], got {update!r}"
            )
        self._routers = {
            name: module
            for name, module in sorted(routers_of(model, "BalanceController").items())
            if module.expert_bias is not None
        }
        if not self._routers:
            raise ValueError(
                "BalanceController: expected a model with routers that have an expert_bias, "
                f"got {type(model).__name__}. Build them with selection_bias=True"
            )
        if any(router._load is not None for router in self._routers.values()):
            raise ValueError(
                "BalanceController: expected a model without a controller, got one that has one. "
                "Call remove() on the first"
            )
        if isinstance(rate, Mapping) and rate.keys() != self._routers.keys():
            raise ValueError(
                f"BalanceController: expected rate for each of {list(self._routers)}, "
                f"got {sorted(rate)}"
            )
        self.rate, self.update, self.recenter, self.group = rate, update, recenter, group
        for router in self._routers.values():
            router._load = torch.zeros_like(router.expert_bias, dtype=torch.int64)

    @torch.no_grad()
    def step(self) -> None:
        """Move each bias by the counts so far, and begin to count anew.

        Once per optimiser step, on every rank, also on one that saw no tokens. Routers in eval mode
        keep their bias.
        """
        loads = [router._load for router in self._routers.values()]
        sizes = [load.numel() for load in loads]
        counts = torch.cat(loads)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts, group=self.group)
        for (name, router), c in zip(self._routers.items(), counts.split(sizes)):
            router._load.zero_()
            if not router.training:
                continue
            excess = c * c.numel() - c.sum()  # exact in integers
            step = excess.sign() if self.update == "sign" else excess / c.numel()
            rate = self.rate[name] if isinstance(self.rate, Mapping) else self.rate
            router.expert_bias.sub_(rate * step.float())
            if self.recenter:
                router.expert_bias.sub_(router.expert_bias.mean())

    def remove(self) -> None:
        """Stop counting. The biases stay."""
        for router in self._routers.values():
            router._load = None


def parameter_groups(model: nn.Module, **router_options: float) -> list[dict]:
    """Parameters of the routers and all others, as two groups for an optimiser.

    Routers are often trained without weight decay, or at a rate of their own.

    Args:
        model: any model; the group of routers is empty if it has none.
        router_options: options of the routers' group. Default: ``weight_decay=0``.

    >>> model = nn.Sequential(nn.Linear(8, 8), TopKRouter(8, 4, 2))
    >>> groups = parameter_groups(model, weight_decay=0.0, lr=1e-4)
    >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    >>> [group["lr"] for group in optimizer.param_groups]
    [0.001, 0.0001]
    """
    of_routers = {
        parameter: None
        for module in model.modules()
        if isinstance(module, Router)
        for parameter in module.parameters()
    }
    others = [p for p in model.parameters() if p not in of_routers]
    options = router_options or {"weight_decay": 0.0}
    return [{"params": others}, {"params": list(of_routers), **options}]
