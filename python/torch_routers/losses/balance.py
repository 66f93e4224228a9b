"""Load balance: experts that see more tokens become less likely."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from torch_routers import ops
from torch_routers.losses.base import RouterLoss, StatisticsLoss, statistics_of
from torch_routers.routing import Routing

TERMS = ("megatron", "switch")  # of ops.router_losses
CONVENTIONS = (*TERMS, "gshard", "deepspeed")


def load_balance(
    score_sums: Tensor,
    counts: Tensor,
    num_tokens: Tensor,
    *,
    convention: Literal["megatron", "switch"] = "megatron",
) -> Tensor:
    r"""How far the experts are from seeing equally many tokens; 1 when all do.

    .. math::  L = E \sum_e f_e P_e, \qquad f_e = c_e \Big/ \sum_i c_i, \qquad
               P_e = \frac{1}{T} \sum_t p_{te}

    The gradient goes through :math:`P` alone; :math:`f` is a count, thus constant. This is the form
    of Switch (arXiv 2101.03961) with :math:`f` over all slots, as in Megatron-LM: per layer,
    divided by k. With ``convention="switch"``, :math:`f_e = c_e / T`, so that the value at balance
    is the number of slots per token.

    Args:
        score_sums: ``[num_experts]``, the sum of :math:`p_t` over the tokens.
        counts: ``[num_experts]`` int64, slots given to each expert.
        num_tokens: scalar int64, the number of tokens; 0 gives the loss 0.
        convention: ``"megatron"`` or ``"switch"``.

    Returns:
        A scalar in the dtype of ``score_sums``.

    >>> import torch
    >>> load_balance(torch.tensor([1.5, 0.5]), torch.tensor([2, 0]), torch.tensor(2))
    tensor(1.5000)
    """
    statistics = ops.Statistics(None, score_sums[None], counts[None], num_tokens[None])
    return ops.router_losses(statistics, balance=1.0, convention=convention).total


def transformers_load_balance(routings: Iterable[Routing]) -> Tensor:
    r"""One balance loss of several layers, as in Transformers (Mixtral, OLMoE, Qwen-MoE).

    .. math::  L = E \sum_e f_e P_e, \qquad f_e = \frac{\sum_l c_{le}}{\sum_l T_l}, \qquad
               P_e = \frac{\sum_l \sum_t p_{lte}}{\sum_l T_l}

    The layers are concatenated before the product, and :math:`f` is not divided by k: the value at
    balance is the number of slots per token, and opposite imbalances of two layers cancel. Of one
    layer it is `load_balance` of the convention ``"switch"``: k times that of ``"megatron"``.

    Args:
        routings: of routers with statistics and equally many experts, such as what `collect` gives.
            Routers compute statistics in training, when they have losses: give them one of weight
            0 if this is to be the only one.

    Returns:
        A scalar in the dtype of the statistics.

    Raises:
        ValueError: no routings, some without statistics, or with different numbers of experts.
    """
    caller = "transformers_load_balance"
    statistics = [statistics_of(routing, caller) for routing in routings]
    num_experts = {s.score_sums.shape[-1] for s in statistics}
    if len(num_experts) != 1:
        raise ValueError(
            f"{caller}: expected routings with the same number of experts, "
            f"got {sorted(num_experts) or 'none'}"
        )
    of_layers = [torch.cat(field).sum(0) for field in list(zip(*statistics))[1:]]
    return load_balance(*of_layers, convention="switch")


class LoadBalanceLoss(StatisticsLoss):
    r"""`load_balance` of one router, over all tokens of the call.

    Args:
        weight: the factor in the objective; papers use 1e-2 (Switch, OLMoE) to 1e-3.
        convention: what :math:`f_e` is. ``"megatron"``: :math:`c_e / \sum_i c_i`, 1 at balance.
            ``"switch"``: :math:`c_e / T`, k at balance. ``"gshard"`` (arXiv 2006.16668):
            :math:`c_e / T` of first choices alone, slot 0, whatever k is; 1 at balance.
            ``"deepspeed"``: :math:`c_e / (T k)` with k the slots of a token, empty ones included.
    """

    name, term = "load_balance", "balance"

    def __init__(
        self,
        weight: float,
        convention: Literal["megatron", "switch", "gshard", "deepspeed"] = "megatron",
    ) -> None:
        super().__init__(weight)
        if convention not in CONVENTIONS:
            raise ValueError(
                f"LoadBalanceLoss: expected convention in {list(CONVENTIONS)}, got {convention!r}"
            )
        self.convention = convention

    def options(self) -> dict[str, Any]:
        return {"convention": self.convention}

    @property
    def is_term(self) -> bool:
        return type(self).forward is LoadBalanceLoss.forward and self.convention in TERMS

    def forward(self, routing: Routing) -> Tensor:
        if self.convention in TERMS:
            return super().forward(routing)
        _, score_sums, counts, tokens = self.statistics(routing)
        score_sums, counts, tokens = score_sums.sum(0), counts.sum(0), tokens.sum()
        if self.convention == "gshard":
            counts = first_choices(routing.choice(), counts.shape[0])
        loss = load_balance(score_sums, counts, tokens, convention="switch")
        return loss / routing.indices.shape[-1] if self.convention == "deepspeed" else loss


class SequenceBalanceLoss(StatisticsLoss):
    r"""The balance loss of each sequence alone, and the mean over them (DeepSeek-V2 and V3).

    .. math::  L = \frac{1}{B} \sum_b E \sum_e f_{be} P_{be}, \qquad
               f_{be} = c_{be} \Big/ \sum_i c_{bi}, \qquad
               P_{be} = \frac{1}{S_b} \sum_s p_{bse}

    over the :math:`B` sequences that have tokens, of which :math:`S_b` in sequence :math:`b`
    (arXiv 2405.04434, arXiv 2412.19437). 1 where the experts of every sequence share alike; one
    imbalance does not make up for that of another sequence.

    A sequence is a group of the statistics. Routers make a group of each sample of an input of
    shape ``[samples, tokens, hidden_size]``; without a dimension of samples, all tokens are one.

    Args:
        weight: the factor in the objective; 1e-4 in the report of DeepSeek-V3, 1e-3 in the released
            configurations of V2 and V3.

    Raises:
        ValueError: the router made one group of several samples.
    """

    name, term = "sequence_balance", "balance"
    per_sequence = True

    def options(self) -> dict[str, Any]:
        return {"per_group": True}

    def statistics(self, routing: Routing) -> ops.Statistics:
        statistics = super().statistics(routing)
        samples, groups = statistics.lse.shape[:-1].numel(), len(statistics.group_tokens)
        if groups == 1 and samples > 1:
            raise ValueError(
                f"SequenceBalanceLoss: expected a routing with a group per sequence, got one group "
                f"of {samples} samples. Its router must honour wants_groups"
            )
        return statistics


class SoftBalanceLoss(RouterLoss):
    r"""Balance of the weights instead of counts, differentiable in both factors (DynMoLE).

    .. math::  L = E \sum_e t_e P_e, \qquad t_e = \frac{1}{T} \sum_t w_{te}, \qquad
               P_e = \frac{1}{T} \sum_t p_{te}

    For routers with a weight for every expert, :math:`w = p` of those kept and 0 of others. In
    plain PyTorch.

    Args:
        weight: the factor in the objective; 1e-3 in arXiv 2504.00661.

    Raises:
        ValueError: a routing with slots, or without statistics.
    """

    name = "soft_balance"

    def forward(self, routing: Routing) -> Tensor:
        if routing.indices is not None:
            raise ValueError(
                "SoftBalanceLoss: expected a routing with a weight for every expert, got one with "
                "slots. Use LoadBalanceLoss"
            )
        statistics = self.statistics(routing)
        tokens = statistics.group_tokens.sum().clamp(min=1)
        weights = routing.weights.reshape(-1, routing.num_experts).sum(0)
        product = weights * statistics.score_sums.sum(0)
        return routing.num_experts * product.sum() / tokens.square()


def first_choices(indices: Tensor, num_experts: int) -> Tensor:
    """``[num_experts]`` int64: how often each expert is in slot 0. In plain PyTorch."""
    first = indices[..., 0].flatten() + 1  # an empty slot is counted at 0, and left out
    counts = first.new_zeros(num_experts + 1).scatter_add(0, first, torch.ones_like(first))
    return counts[1:]
