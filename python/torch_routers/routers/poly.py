"""The router of a table: which skills a task has."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_routers.losses import RouterLoss
from torch_routers.noise import Noise, Stream
from torch_routers.routers.base import Router, RouterTraits
from torch_routers.routers.dense import dense_statistics
from torch_routers.routing import Routing

_EPSILON = 1e-12


class PolyRouter(Router):
    r"""Weigh experts by a table of tasks, relaxed Bernoulli in training (Poly, arXiv 2202.13914).

    .. math::  w = \frac{s}{\sum_e s_e + 10^{-12}}, \qquad
               s = \sigma(Z_\mathrm{task}), \quad
               \text{in training } s = \sigma(Z_\mathrm{task} + \ln u - \ln(1 - u))

    with :math:`u` uniform in (0, 1): each expert is a skill that a task has or has not. With
    ``num_splits`` the features are cut in so many parts, each with weights of its own (MHR,
    arXiv 2211.03831); the experts of one part sum to one.

    That is PEFT's form. The authors' code (microsoft/mttl) takes the sigmoid in training too, which
    is ``noise=False``.

    Args:
        num_experts: weights of a token: skills times ``num_splits``, those of one split together.
        num_tasks: rows of the table.
        num_splits: parts of the features; a divisor of ``num_experts``.
        noise: draw in training.
        losses: auxiliary losses. They take the weights, divided by ``num_splits``, as
            probabilities; each expert counts as chosen.

    ``weight`` is ``[num_tasks, num_experts]``, uniform in [-1e-3, 1e-3] at first. Call it with
    ``task_ids`` ``[...]`` int64; `follow_inputs` brings them. A number that is not in
    ``[0, num_tasks)`` gets equal weights. Tokens of one call are drawn for each by itself, with
    ``seed`` and ``row_ids`` of your own if you like; in a mixture of LoRAs with ``mix="factors"``,
    it is called once per sequence.

    ``routing.indices`` is None and ``routing.weights`` ``[..., num_experts]``.

    Raises:
        ValueError: an argument that does not fit.

    >>> router = PolyRouter(num_experts=4, num_tasks=3).eval()
    >>> _ = nn.init.constant_(router.weight, 0.0)
    >>> router(torch.randn(2, 8), task_ids=torch.tensor([0, 2])).weights.tolist()
    [[0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25]]
    """

    traits = RouterTraits(needs=("task_ids",), random=True)

    def __init__(
        self,
        num_experts: int,
        num_tasks: int,
        *,
        num_splits: int = 1,
        noise: bool = True,
        losses: Sequence[RouterLoss] = (),
    ) -> None:
        super().__init__(num_experts, losses)
        if num_tasks < 1:
            raise ValueError(f"{self._name}: expected num_tasks >= 1, got {num_tasks}")
        if num_splits < 1 or num_experts % num_splits:
            raise ValueError(
                f"{self._name}: expected num_splits that divides num_experts={num_experts}, "
                f"got {num_splits}"
            )
        self.num_tasks, self.num_splits, self.noise = num_tasks, num_splits, noise
        self.traits = self.traits._replace(random=noise)
        self.weight = nn.Parameter(torch.empty(num_tasks, num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -1e-3, 1e-3)

    def route(
        self,
        x: Tensor,
        *,
        valid_mask: Tensor | None,
        task_ids: Tensor,
        seed: int | Tensor | None = None,
        row_ids: Tensor | None = None,
        group_offsets: Tensor | None = None,
        **context: Any,
    ) -> Routing:
        if task_ids.dtype != torch.int64 or task_ids.shape != x.shape[:-1]:
            raise ValueError(
                f"{self._name}: expected task_ids in int64 of shape {list(x.shape[:-1])}, "
                f"got {task_ids.dtype} of shape {list(task_ids.shape)}"
            )
        known = ((task_ids >= 0) & (task_ids < self.num_tasks)).unsqueeze(-1)
        table = self.weight.to(self.full_precision(x[:0]).dtype)
        logits = table[torch.where(known.squeeze(-1), task_ids, 0)]
        if self.noise and self.training:
            u = Noise(logits, seed, row_ids).uniform(Stream.LOGITS, self.num_experts)
            logits = logits + u.log() - (-u).log1p()
        skills = logits.sigmoid().unflatten(-1, (self.num_splits, -1))
        skills = torch.where(known.unsqueeze(-1), skills, 1)
        weights = (skills / (skills.sum(-1, keepdim=True) + _EPSILON)).flatten(-2)
        probs = weights / self.num_splits
        logits = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
        active = torch.ones_like(weights, dtype=torch.bool)
        if valid_mask is not None:
            active = active & valid_mask.unsqueeze(-1)
            weights, probs = (torch.where(active, value, 0) for value in (weights, probs))
        counts = active.reshape(-1, self.num_experts).sum(0)
        statistics = dense_statistics(
            logits,
            probs if self.wants_statistics else None,
            counts,
            lambda: active,
            valid_mask=valid_mask,
            group_offsets=group_offsets,
            per_sample=self.wants_groups,
        )
        return Routing(weights, None, logits, counts, statistics, active=active)
