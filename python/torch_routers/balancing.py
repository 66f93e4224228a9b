"""Balancing without a loss: a bias of the selection that follows the load of the experts."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_routers.delivery import routers_of
from torch_routers.ops import quantile_dual
from torch_routers.routers import Router
from torch_routers.routing import Routing


class _Controller:
    """Moves the ``expert_bias`` of routers by what they measure in training.

    What is measured is added up in backward, over the micro-batches of a step and all ranks. A
    subclass says what that is, and how a bias follows from it.
    """

    _remedy: str

    def __init__(self, model: nn.Module, group: "dist.ProcessGroup | None") -> None:
        self.group = group
        self._routers = {
            name: module
            for name, module in sorted(routers_of(model, self._name).items())
            if module.expert_bias is not None
        }
        if not self._routers:
            raise ValueError(
                f"{self._name}: expected a model with routers that have an expert_bias, "
                f"got {type(model).__name__}. Build them with {self._remedy}"
            )
        if any(router._load is not None for router in self._routers.values()):
            raise ValueError(
                f"{self._name}: expected a model without a controller, got one that has one. "
                "Call remove() on the first"
            )

    def _begin(self) -> None:
        """Measure from now on."""
        for router in self._routers.values():
            router._load, router._measure = self._nothing(router), self._measure

    @staticmethod
    def _nothing(router: Router) -> Tensor:
        """The zeros to which measurements are added."""
        raise NotImplementedError

    @staticmethod
    def _measure(router: Router, routing: Routing) -> Tensor:
        raise NotImplementedError

    def _move(self, name: str, router: Router, total: Tensor) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self) -> None:
        """Move each bias by the training since the last step, and begin to measure anew.

        Once per optimiser step, on every rank, also on one that saw no tokens. Routers in eval mode
        keep their bias.
        """
        loads = [router._load for router in self._routers.values()]
        totals = torch.cat(loads)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals, group=self.group)
        parts = totals.split([load.numel() for load in loads])
        for (name, router), total in zip(self._routers.items(), parts):
            router._load.zero_()
            if router.training:
                self._move(name, router, total)

    def remove(self) -> None:
        """Stop measuring. The biases stay."""
        for router in self._routers.values():
            router._load = router._measure = None

    @property
    def _name(self) -> str:
        return type(self).__name__


class BalanceController(_Controller):
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

    _remedy = "selection_bias=True"

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
        super().__init__(model, group)
        if isinstance(rate, Mapping) and rate.keys() != self._routers.keys():
            raise ValueError(
                f"BalanceController: expected rate for each of {list(self._routers)}, "
                f"got {sorted(rate)}"
            )
        self.rate, self.update, self.recenter = rate, update, recenter
        self._begin()

    @staticmethod
    def _nothing(router: Router) -> Tensor:
        return torch.zeros_like(router.expert_bias, dtype=torch.int64)

    @staticmethod
    def _measure(router: Router, routing: Routing) -> Tensor:
        return routing.counts

    def _move(self, name: str, router: Router, counts: Tensor) -> None:
        excess = counts * counts.numel() - counts.sum()  # exact in integers
        step = excess.sign() if self.update == "sign" else excess / counts.numel()
        rate = self.rate[name] if isinstance(self.rate, Mapping) else self.rate
        router.expert_bias.sub_(rate * step.float())
        if self.recenter:
            router.expert_bias.sub_(router.expert_bias.mean())


class QuantileController(_Controller):
    r"""Sets the ``expert_bias`` of a model's routers to what balances the tokens of a step.

    .. math::  \beta \leftarrow \mu \beta + (1 - \mu)\, \overline{\beta'}, \qquad
               \beta \leftarrow \beta - \tfrac1E \textstyle\sum_e \beta_e

    where the bias is :math:`-\beta`, and :math:`\overline{\beta'}` the mean over micro-batches and
    ranks, weighted by their tokens, of what `ops.quantile_dual` makes of :math:`\beta` and the
    logits (quantile balancing: J. Su, spaces.ac.cn/archives/11619; Megatron-LM
    ``quantile_balancing``). Where a `BalanceController` feels its way by small steps, this one
    computes how far to go: it has no rate, and balances after a few steps.

    Tokens are routed by the bias of earlier steps alone, so that a routing depends on no other
    token. Padding, evaluation and the repeated forward of activation checkpointing are in no
    quantile. In Megatron-LM micro-batches weigh the same, and padding is not supported.

    Args:
        model: has routers with a bias of logits, ``TopKRouter(selection_bias="logits")``, and
            without groups of experts. It is on its device already.
        ema: :math:`\mu` in ``[0, 1)``, the part of the old bias that stays; 0.9 in Megatron-LM.
            Attribute ``ema`` may be changed at any time.
        group: the process group to average over. Default: all processes, where
            ``torch.distributed`` is initialised.

    Raises:
        ValueError: an argument that does not fit, or no router that does.

    >>> from torch_routers import TopKRouter
    >>> router = TopKRouter(16, 4, 1, renormalize=False, selection_bias="logits")
    >>> controller = QuantileController(router, ema=0.0)
    >>> x = torch.randn(100, 16) + 10 * router.weight[0].sign().detach()  # all prefer expert 0
    >>> for _ in range(5):
    ...     routing = router(x)
    ...     routing.weights.sum().backward()
    ...     controller.step()  # once per optimiser step
    >>> int(routing.counts.max()) < 40
    True
    """

    _remedy = 'selection_bias="logits"'

    def __init__(
        self, model: nn.Module, *, ema: float = 0.9, group: "dist.ProcessGroup | None" = None
    ) -> None:
        if not 0 <= ema < 1:
            raise ValueError(f"QuantileController: expected ema in [0, 1), got {ema}")
        super().__init__(model, group)
        for name, router in self._routers.items():
            if router.bias_of != "logits":
                raise ValueError(
                    "QuantileController: expected routers whose expert_bias is added to the "
                    f"logits, got one to the {router.bias_of} in {name!r}. Build them with "
                    f"{self._remedy}"
                )
            groups = getattr(router, "num_groups", 1)
            if groups > 1:
                raise ValueError(
                    "QuantileController: expected routers without groups of experts, "
                    f"got num_groups={groups} in {name!r}"
                )
        self.ema = ema
        self._begin()

    @staticmethod
    def _nothing(router: Router) -> Tensor:
        bias = router.expert_bias
        return torch.zeros(bias.numel() + 1, dtype=torch.float64, device=bias.device)

    @staticmethod
    def _measure(router: Router, routing: Routing) -> Tensor:
        """``[num_experts + 1]``: the dual times the tokens, and the tokens."""
        choice = routing.choice()
        slots = (choice >= 0).sum(-1)
        dual = quantile_dual(
            routing.logits, -router.expert_bias, choice.shape[-1], token_top_k=slots
        )
        tokens = (slots > 0).sum().double().view(1)
        return torch.cat([dual.double() * tokens, tokens])

    def _move(self, name: str, router: Router, total: Tensor) -> None:
        tokens, bias = total[-1], router.expert_bias
        average = total[:-1] / tokens.clamp(min=1)
        moved = self.ema * bias.double() - (1 - self.ema) * average
        bias.copy_(torch.where(tokens > 0, moved - moved.mean(), bias))


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
