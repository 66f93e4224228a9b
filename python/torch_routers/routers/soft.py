"""The soft router: every expert, weighed by a softmax, or what is left of it."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_routers import ops
from torch_routers.losses import RouterLoss
from torch_routers.noise import Noise
from torch_routers.registry import check_choice
from torch_routers.routers.base import Router
from torch_routers.routers.dense import dense_statistics
from torch_routers.routing import Routing

MODES = ("soft", "soft_topk", "st_topk", "hard")


class SoftRouter(Router):
    r"""Weigh all experts by a softmax, in one of four modes between soft and hard.

    .. math::  z = W x, \qquad p = \mathrm{softmax}(z)

    ``"soft"``
        :math:`w = p`: every token has every expert (MoLoRA and MoV, arXiv 2309.05444).
    ``"soft_topk"``
        :math:`w_e = p_e` for the ``top_k`` largest logits, 0 for the others, divided by their sum
        where ``renormalize`` says so.
    ``"st_topk"``
        the weights of ``"soft_topk"`` with the gradient of :math:`p`, straight through: it reaches
        the logits of the experts that were left out too. A layer must then know what those would
        have done, as `lora.RoutedLoraLinear` does; others give them no gradient.
    ``"hard"``
        one expert with weight 1, by label: the expert of the number in ``task_ids``; none for
        another number. The gradient of the router is 0: this is how experts are trained, before
        their router (LoRA-Mixer, arXiv 2507.00029).

    ``mode`` is an attribute, to be changed between the phases of a training and for inference.

    The routing is dense: ``indices`` is None, ``weights`` are ``[..., num_experts]``, and an expert
    is active where its weight is not 0, or where it was chosen. ``counts`` are the tokens for which
    it is. The losses take :math:`p` as probabilities, in every mode.

    MoLoRA's code does not renormalise what top-k leaves; LoRA-Mixer has no code, and its paper does
    not say. The default is to renormalise.

    Args:
        hidden_size: size of the last dimension of the input.
        num_experts: experts to weigh.
        mode: as above.
        top_k: experts that the two modes with it leave, in ``[1, num_experts]``.
        renormalize: make what top-k leaves sum to one.
        jitter: multiply each number that the router sees by noise, uniform in
            ``[1 - jitter, 1 + jitter]``, in training.
        losses: auxiliary losses.

    ``weight`` is ``[num_experts, hidden_size]``, initialised from a normal distribution of standard
    deviation 0.02, as MoLoRA's. Call it with ``task_ids`` ``[...]`` int64 in mode ``"hard"``, and
    with ``seed`` and ``row_ids`` for noise of your own.

    Raises:
        ValueError: an argument that does not fit.

    >>> router = SoftRouter(hidden_size=16, num_experts=4)
    >>> routing = router(torch.randn(3, 5, 16))
    >>> routing.weights.shape, routing.indices
    (torch.Size([3, 5, 4]), None)
    >>> router.mode = "hard"
    >>> router(torch.randn(2, 16), task_ids=torch.tensor([3, 1])).weights.argmax(-1)
    tensor([3, 1])
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        mode: Literal["soft", "soft_topk", "st_topk", "hard"] = "soft",
        top_k: int | None = None,
        renormalize: bool = True,
        jitter: float = 0.0,
        losses: Sequence[RouterLoss] = (),
    ) -> None:
        super().__init__(num_experts, losses)
        if top_k is not None and not 1 <= top_k <= num_experts:
            raise ValueError(
                f"{self._name}: expected top_k in [1, num_experts={num_experts}], got {top_k}"
            )
        if not 0 <= jitter < 1:
            raise ValueError(f"{self._name}: expected jitter in [0, 1), got {jitter}")
        self.hidden_size, self.top_k = hidden_size, top_k
        self.renormalize, self.jitter, self.mode = renormalize, jitter, mode
        self.traits = self.traits._replace(random=jitter > 0)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        check_choice(self._name, "mode", mode, MODES)
        if mode in ("soft_topk", "st_topk") and self.top_k is None:
            raise ValueError(f'{self._name}: expected top_k with mode="{mode}", got none')
        self._mode = mode

    @property
    def dense_gradient(self) -> bool:
        """Whether weights of 0 have a gradient too, which a layer has to compute."""
        return self.mode == "st_topk"

    def route(
        self,
        x: Tensor,
        *,
        valid_mask: Tensor | None,
        task_ids: Tensor | None = None,
        seed: int | Tensor | None = None,
        row_ids: Tensor | None = None,
        group_offsets: Tensor | None = None,
        **context: Any,
    ) -> Routing:
        self.check_hidden_size(x)
        x = self.full_precision(x)
        if self.jitter and self.training:
            x = Noise(x, seed, row_ids).jittered(x, self.jitter)
        logits = F.linear(x, self.weight.to(x.dtype))
        probs = logits.softmax(-1)
        if valid_mask is not None:
            probs = torch.where(valid_mask.unsqueeze(-1), probs, 0)
        weights, active = self._weigh(logits, probs, task_ids, valid_mask)
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

    def _weigh(
        self, logits: Tensor, probs: Tensor, task_ids: Tensor | None, valid_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The weights, and which experts they are of."""
        valid = torch.ones_like(probs, dtype=torch.bool)
        if valid_mask is not None:
            valid = valid & valid_mask.unsqueeze(-1)
        if self.mode == "soft":
            return probs, valid
        experts = torch.arange(self.num_experts, device=logits.device)
        if self.mode == "hard":
            active = (self._labels(task_ids, probs).unsqueeze(-1) == experts) & valid
            # No probability is negative: the router has a gradient, and it is 0.
            return torch.where(probs < 0, probs, active.to(probs.dtype)), active
        chosen = ops.topk_select(logits.detach(), self.top_k, valid_mask=valid_mask)
        active = (chosen.unsqueeze(-1) == experts).any(-2)
        weights = torch.where(active, probs, 0)
        if self.renormalize:
            total = weights.sum(-1, keepdim=True)
            weights = weights / torch.where(total > 0, total, 1)
        if self.mode == "st_topk":  # the second term is 0, to the bit
            weights = weights.detach() + (probs - probs.detach())
        return weights, active

    def _labels(self, task_ids: Tensor | None, probs: Tensor) -> Tensor:
        shape = probs.shape[:-1]
        if task_ids is None:
            raise ValueError(
                f'{self._name}: expected task_ids with mode="hard", got none. Pass them by '
                "keyword, or use tr.follow_inputs and routing_task_ids"
            )
        if task_ids.dtype != torch.int64 or task_ids.shape != shape:
            raise ValueError(
                f"{self._name}: expected task_ids in int64 of shape {list(shape)}, "
                f"got {task_ids.dtype} of shape {list(task_ids.shape)}"
            )
        return task_ids
