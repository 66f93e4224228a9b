"""The top-k router: the experts of the best k logits of each token."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_routers import ops
from torch_routers.losses import LoadLoss, RouterLoss, expected_load
from torch_routers.noise import Noise, Stream
from torch_routers.registry import check_choice
from torch_routers.routers.base import Router
from torch_routers.routers.drop import DROP_POLICIES, within_capacity
from torch_routers.routing import Routing


class ZeroRouterGradientWarning(UserWarning):
    """A renormalised weight of a single expert is the constant 1, which trains no router."""


class TopKRouter(Router):
    r"""Give each token the ``top_k`` experts of its largest logits.

    .. math::  z = W x + b, \qquad w_j = c\, s_{i_j} \Big/ \sum_l s_{i_l}, \qquad
               s = \mathrm{score}(z)

    with :math:`i_1, \dots, i_k` the experts of the largest :math:`z`, largest first; without
    ``renormalize``, :math:`w_j = c\, s_{i_j}`. Equal logits: the lower index first. With
    ``selection_bias`` or groups experts are chosen as `ops.topk_select` states; weights come from
    the scores without bias.

    The renormalised softmax is Mixtral's (arXiv 2401.04088), the plain one that of Switch (top-1,
    arXiv 2101.03961) and OLMoE (arXiv 2409.02060), sigmoid with a bias and groups that of
    DeepSeek-V3 (arXiv 2412.19437); `tr.create_router` knows these and more by name. Their code
    often multiplies in the dtype of the model and takes the softmax in float32; here the logits are
    float32 already, because rounding them to bfloat16 first moves tokens to other experts. Indices
    follow from ``torch.topk`` there, whose order of ties is not specified.

    Args:
        hidden_size: size of the last dimension of the input.
        num_experts: experts to choose from.
        top_k: experts per token, in ``[1, num_experts]``.
        score: ``"softmax"``, ``"sigmoid"`` or ``"sqrt_softplus"``.
        renormalize: make the weights of each token sum to ``scale``.
        epsilon: added to the sum that renormalised weights are divided by; as in `ops.topk_gate`.
        scale: factor :math:`c` of all weights.
        gate_bias: train a bias :math:`b` of the logits, the parameter ``bias`` (GPT-OSS).
        selection_bias: have the buffer ``expert_bias``, added for the choice of experts alone: to
            the scores, or with ``"logits"`` to the logits. A `BalanceController` moves it, or, that
            of logits, a `QuantileController`.
        num_groups, topk_group, group_score: choose among the experts of the best groups, as in
            `ops.topk_select`.
        jitter: multiply each number that the router sees by noise, uniform in
            ``[1 - jitter, 1 + jitter]``, in training (Switch: 1e-2). The experts see no noise.
        noise: add to the logits, in training, ``noise_scale`` times: ``"gumbel"`` or ``"normal"``
            noise. Weights and losses come from the noisy logits.
        noise_scale: factor of ``noise``. Default: 1 for Gumbel noise, ``1 / num_experts`` for
            normal noise (V-MoE, arXiv 2106.05974).
        second_policy: ``"all"``, or ``"random"``, for ``top_k=2``: in training the second choice of
            a token is kept with probability ``min(1, 2 w_2 / scale)``, before any capacity, and the
            weight of the first stays as it is (GShard, arXiv 2006.16668).
        capacity: keep at most so many slots per expert in each group of tokens. Default: no limit.
        capacity_factor: keep at most ``ceil(tokens * top_k / num_experts * capacity_factor)`` slots
            per expert in each group of tokens. Default: no limit, nothing is dropped.
        min_capacity: the least that a capacity is.
        drop_policy: who is kept, as in `ops.limit_capacity`: ``"position"``, ``"weight"``,
            ``"priority"`` (of the token's largest score) or ``"random"`` (in training; by position
            in eval mode); or ``"batch_priority"``, first choices in the order of ``"priority"``,
            then second ones, and so on (batch prioritized routing of V-MoE, arXiv 2106.05974).
        capacity_group: ``"sequence"``, each sample of ``[batch, sequence, hidden_size]`` input for
            itself; or ``"batch"``, all tokens together, as Megatron-LM and DeepSpeed have it, by
            which sequences influence each other. Input of two dimensions is one group.
        renormalize_after_drop: divide the weights of what was kept by their sum anew (DeepSpeed),
            with a capacity or a random second choice.
        cross_batch: ``"warn"`` (once per call of ``eval()``), ``"raise"`` or ``"allow"``, where a
            capacity lets sequences of a batch influence each other in eval mode.
        losses: auxiliary losses, such as ``LoadBalanceLoss(1e-2)``. They see the choice before
            anything is dropped.

    ``weight`` is ``[num_experts, hidden_size]``, initialised from a normal distribution of standard
    deviation 0.02. It may have any dtype; the router computes in float32 (float64 for float64).

    Call it with

    - ``indices`` ``[..., slots]`` to replay earlier decisions: the weights are computed anew from
      the current logits, -1 stays an empty slot;
    - ``top_k``, an int, or ``[...]`` int64 in ``[0, top_k]``: fewer slots, of each token;
    - ``capacity``, an int, or ``capacity_factor``: another limit than that of the constructor;
    - ``group_offsets`` ``[groups + 1]`` int64, where sequences begin in the flattened tokens (as
      the ``cu_seqlens`` of packed sequences): groups of capacities and of sequence-wise losses;
    - ``seed`` and ``row_ids`` ``[...]`` int64, numbers of the tokens in the whole data set, for
      randomness that does not depend on batches and ranks. Default: a seed from torch's generator,
      and the position in the batch.

    Raises:
        ValueError: an argument that does not fit, at construction where it can be known.

    >>> router = TopKRouter(hidden_size=16, num_experts=8, top_k=2)
    >>> routing = router(torch.randn(3, 5, 16))
    >>> routing.weights.shape, routing.indices.shape, int(routing.counts.sum())
    (torch.Size([3, 5, 2]), torch.Size([3, 5, 2]), 30)
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score: str = "softmax",
        renormalize: bool = True,
        epsilon: float | None = None,
        scale: float = 1.0,
        gate_bias: bool = False,
        selection_bias: bool | str = False,
        num_groups: int = 1,
        topk_group: int = 1,
        group_score: str = "top2_sum",
        jitter: float = 0.0,
        noise: str | None = None,
        noise_scale: float | None = None,
        second_policy: str = "all",
        capacity: int | None = None,
        capacity_factor: float | None = None,
        min_capacity: int = 0,
        drop_policy: str = "position",
        capacity_group: str = "sequence",
        renormalize_after_drop: bool = False,
        cross_batch: str = "warn",
        losses: Sequence[RouterLoss] = (),
    ) -> None:
        super().__init__(num_experts, losses)
        name = self._name
        check_choice(name, "score", score, ("softmax", "sigmoid", "sqrt_softplus"))
        check_choice(name, "selection_bias", selection_bias, (False, True, "logits"))
        check_choice(name, "noise", noise, (None, "gumbel", "normal"))
        check_choice(name, "second_policy", second_policy, ("all", "random"))
        check_choice(name, "drop_policy", drop_policy, DROP_POLICIES)
        check_choice(name, "capacity_group", capacity_group, ("sequence", "batch"))
        check_choice(name, "cross_batch", cross_batch, ("warn", "raise", "allow"))
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"{name}: expected top_k in [1, num_experts={num_experts}], got {top_k}"
            )
        if second_policy == "random" and top_k != 2:
            raise ValueError(f'{name}: expected top_k=2 with second_policy="random", got {top_k}')
        if not 0 <= jitter < 1:
            raise ValueError(f"{name}: expected jitter in [0, 1), got {jitter}")
        if top_k == 1 and renormalize:
            warnings.warn(
                f"{name}: expected renormalize=False with top_k=1, got True: every weight is the "
                "same, and only the auxiliary losses train the router",
                ZeroRouterGradientWarning,
                stacklevel=2,
            )
        self.hidden_size, self.top_k = hidden_size, top_k
        self.score, self.renormalize, self.epsilon, self.scale = score, renormalize, epsilon, scale
        self.gate_bias, self.selection_bias = gate_bias, selection_bias
        self.num_groups, self.topk_group, self.group_score = num_groups, topk_group, group_score
        self.jitter, self.noise, self.noise_scale = jitter, noise, noise_scale
        self.second_policy = second_policy
        self.capacity, self.capacity_factor = capacity, capacity_factor
        self.min_capacity = min_capacity
        self.drop_policy, self.capacity_group = drop_policy, capacity_group
        self.renormalize_after_drop, self.cross_batch = renormalize_after_drop, cross_batch
        # What the operator refuses it refuses now.
        ops.topk_select(torch.zeros(0, num_experts), top_k, **self._selection())
        if capacity is not None and (capacity < 0 or capacity_factor is not None):
            raise ValueError(
                f"{name}: expected capacity >= 0, without a capacity_factor, got {capacity} and "
                f"capacity_factor={capacity_factor}"
            )
        if capacity_factor is not None:
            no_tokens = torch.zeros(0, dtype=torch.int64)
            ops.expert_capacity(
                no_tokens, top_k, num_experts, capacity_factor, min_capacity=min_capacity
            )
        limited = capacity is not None or capacity_factor is not None
        if limited:
            in_order = drop_policy == "position" and top_k == 1
            alone = "sequence_causal" if in_order else "sequence"
            self.traits = self.traits._replace(
                batch_dependency="batch" if capacity_group == "batch" else alone,
                causal=in_order,
                drops_tokens=True,
            )
        if jitter or noise is not None or "random" in (drop_policy, second_policy):
            self.traits = self.traits._replace(random=True)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if gate_bias else None
        if selection_bias:
            self.add_expert_bias()
            self.bias_of = "logits" if selection_bias == "logits" else "scores"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    def route(
        self,
        x: Tensor,
        *,
        valid_mask: Tensor | None,
        indices: Tensor | None = None,
        top_k: int | Tensor | None = None,
        capacity: int | None = None,
        capacity_factor: float | None = None,
        seed: int | Tensor | None = None,
        row_ids: Tensor | None = None,
        group_offsets: Tensor | None = None,
        **context: Any,
    ) -> Routing:
        self.check_hidden_size(x)
        x = self.full_precision(x)
        noise = Noise(x, seed, row_ids) if self.training and self.traits.random else None
        logits, clean, sigma = self.logits(x, noise)
        routing = self.choose(
            logits,
            noise,
            valid_mask=valid_mask,
            indices=indices,
            top_k=top_k,
            capacity=capacity,
            capacity_factor=capacity_factor,
            group_offsets=group_offsets,
        )
        if sigma is not None and any(isinstance(loss, LoadLoss) for loss in self.losses):
            slots = top_k if isinstance(top_k, int) else self.top_k
            load = expected_load(clean, logits, sigma, slots, valid_mask=valid_mask)
            routing = routing._replace(load=load)
        return routing

    def logits(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``[..., num_experts]`` from ``x`` in full precision, with the noise of training.

        A router whose noise is learned also returns the logits without it, and its standard
        deviation: what the load of experts is expected from.
        """
        if noise is not None and self.jitter:
            x = noise.jittered(x, self.jitter)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        logits = F.linear(x, self.weight.to(x.dtype), bias)
        if noise is not None and self.noise is not None:
            added = getattr(noise, self.noise)(Stream.LOGITS, self.num_experts)
            scale = self.noise_scale
            if scale is None:
                scale = 1 / self.num_experts if self.noise == "normal" else 1.0
            logits = logits + scale * added
        return logits, None, None

    def choose(
        self,
        logits: Tensor,
        noise: Noise | None,
        *,
        valid_mask: Tensor | None,
        indices: Tensor | None,
        top_k: int | Tensor | None,
        capacity: int | None,
        capacity_factor: float | None,
        group_offsets: Tensor | None,
    ) -> Routing:
        """Experts and weights from the logits; what may be given is that of a call."""
        if capacity is None and capacity_factor is None:
            capacity, capacity_factor = self.capacity, self.capacity_factor
        limited = capacity is not None or capacity_factor is not None
        if group_offsets is None and (self.wants_groups or limited):
            group_offsets = sample_offsets(logits)
        replayed = indices is not None
        options = {
            "score": self.score,
            "renormalize": self.renormalize,
            "epsilon": self.epsilon,
            "scale": self.scale,
            "valid_mask": valid_mask,
            "group_offsets": group_offsets,
            "statistics": self.wants_statistics,
        }
        if not replayed:
            slots = top_k if isinstance(top_k, int) else self.top_k
            selection = self._selection(logits.dtype)
            selection["token_top_k"] = top_k if isinstance(top_k, Tensor) else None
            if self.bias_of == "logits":
                indices = ops.topk_select(logits, slots, valid_mask=valid_mask, **selection)
        elif valid_mask is not None:
            indices = torch.where(valid_mask.unsqueeze(-1), indices, -1)
        if indices is None:
            weights, indices, statistics = ops.topk_gate(logits, slots, **selection, **options)
        else:
            weights, statistics = ops.gate(logits, indices, **options)
        counts = statistics.group_counts  # of one group, mostly: a view is cheaper than a sum
        counts = counts[0] if group_offsets is None else counts.sum(0)
        routing = Routing(weights, indices, logits, counts, statistics)
        if self.second_policy == "random" and noise is not None and not replayed:
            routing = self._keep(routing, self._random_second(weights, noise))
        if limited:
            if self.capacity_group == "batch":
                group_offsets = None
            if group_offsets is None and not self.training and not torch.compiler.is_compiling():
                self.mind_batch_dependency()
            if capacity is None:
                tokens = statistics.group_tokens
                capacity = ops.expert_capacity(
                    tokens.sum(0, keepdim=True) if group_offsets is None else tokens,
                    indices.shape[-1],
                    self.num_experts,
                    capacity_factor,
                    min_capacity=self.min_capacity,
                )
            kept = within_capacity(
                routing, capacity, self.drop_policy, self.score, group_offsets, noise
            )
            routing = self._keep(routing, kept)
        if self.renormalize_after_drop and (limited or self.second_policy == "random"):
            total = routing.weights.sum(-1, keepdim=True)
            total = self.scale / torch.where(total > 0, total, 1)
            routing = routing._replace(weights=routing.weights * total)
        return routing

    def _selection(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """How experts are chosen, for the operators."""
        bias = None if self.expert_bias is None else self.expert_bias.to(dtype)
        return {
            "bias": bias,
            "num_groups": self.num_groups,
            "topk_group": self.topk_group,
            "group_score": self.group_score,
        }

    def _random_second(self, weights: Tensor, noise: Noise) -> Tensor:
        """``[..., slots]`` bool: slot 0, and slot 1 as often as its weight says."""
        if weights.shape[-1] > 2:
            raise ValueError(
                f'{self._name}: expected top_k <= 2 with second_policy="random", '
                f"got {weights.shape[-1]}"
            )
        chance = 2 * weights.detach() / self.scale
        first = torch.arange(weights.shape[-1], device=weights.device) == 0
        return first | (noise.uniform(Stream.SECOND_CHOICE, 1) < chance)

    @staticmethod
    def _keep(routing: Routing, kept: Tensor) -> Routing:
        return routing._replace(
            weights=torch.where(kept, routing.weights, 0),
            indices=torch.where(kept, routing.indices, -1),
            chosen=routing.choice(),
        )


def sample_offsets(logits: Tensor) -> Tensor | None:
    """Where the samples of a batch begin in its tokens; None if they are no samples."""
    if logits.dim() < 3:
        return None
    return torch.arange(logits.shape[0] + 1, device=logits.device) * logits.shape[1:-1].numel()
