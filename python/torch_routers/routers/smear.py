"""SMEAR: one decision per sequence, by which the parameters of the experts are merged."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_routers.noise import Noise, Stream
from torch_routers.routers.base import Router
from torch_routers.routing import Merge, Routing


class SMEARRouter(Router):
    r"""Weigh the experts of each sequence, for merging them (SMEAR, arXiv 2306.03745).

    .. math::  m_b = \frac{1}{S_b} \sum_s x_{bs}, \qquad
               p_b = \mathrm{softmax}\big(\mathrm{LN}_w(V)\, \mathrm{LN}(m_b)\big)

    with the mean over the :math:`S_b` tokens of sequence :math:`b` that are not masked. `MoE` with
    `SoftMergedExperts` then runs one expert with the parameters :math:`\sum_e p_{be} W_e`: all
    experts learn from every sequence, by exact gradients, for the work of one.

    In training each expert of each sequence is left out with probability ``expert_dropout``, and
    :math:`p` becomes :math:`(p + 10^{-10}) / \sum (p + 10^{-10})`; where all are left out, it is
    uniform. There is no balance loss.

    We follow the authors' code (r-three/smear), except that padding is not pooled: there, how much
    of it a batch has changes the routing.

    **Whole sequences are not for causal language models**: the mean of a sequence tells its first
    token about its last one. With ``segment``, the routing of a segment comes from the mean of the
    segment before (Lory, arXiv 2405.03133), and that of the first one from no token, as if the mean
    were 0. (Lory takes the mean of the first segment itself, without gradient.)

    Args:
        hidden_size: size of the last dimension of the input.
        num_experts: experts to merge.
        router_norm: layer norm of :math:`m`, with gain and bias, and of each expert's row of
            :math:`V`, with gains that begin at 1e-2; both trained.
        weight_norm_gain: the gains of the latter at first.
        expert_dropout: in ``[0, 1)``; 0.1 in the experiments of the paper.
        jitter: multiply each number of :math:`m` by noise, uniform in
            ``[1 - jitter, 1 + jitter]``, in training.
        segment: tokens per segment. Default: a segment is the whole sequence.
        causal: refuse arguments by which tokens would see later ones.

    The input is ``[..., sequence, hidden_size]``. ``routing.weights`` is
    ``[..., sequence, num_experts]``, the same for all tokens of a segment; ``routing.merge`` has it
    once per segment. ``weight`` :math:`V` is ``[num_experts, hidden_size]``, initialised from a
    normal distribution of standard deviation 0.01. Call it with ``seed`` for noise of your own.

    Raises:
        ValueError: an argument that does not fit.

    >>> router = SMEARRouter(hidden_size=16, num_experts=4)
    >>> routing = router(torch.randn(3, 5, 16))
    >>> routing.weights.shape, routing.merge.weights.shape
    (torch.Size([3, 5, 4]), torch.Size([3, 4]))
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        router_norm: bool = True,
        weight_norm_gain: float = 1e-2,
        expert_dropout: float = 0.1,
        jitter: float = 0.0,
        segment: int | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__(num_experts)
        if not 0 <= expert_dropout < 1:
            raise ValueError(
                f"{self._name}: expected expert_dropout in [0, 1), got {expert_dropout}"
            )
        if not 0 <= jitter < 1:
            raise ValueError(f"{self._name}: expected jitter in [0, 1), got {jitter}")
        if segment is not None and segment < 1:
            raise ValueError(f"{self._name}: expected segment >= 1, got {segment}")
        if causal and segment is None:
            raise ValueError(
                f"{self._name}: expected a segment with causal=True, got none: the mean of a whole "
                "sequence tells its first token about its last one. Pass segment, such as 256"
            )
        self.hidden_size, self.router_norm = hidden_size, router_norm
        self.weight_norm_gain, self.jitter = weight_norm_gain, jitter
        self.expert_dropout, self.segment, self.causal = expert_dropout, segment, causal
        self.traits = self.traits._replace(
            batch_dependency="sequence" if segment is None else "sequence_causal",
            causal=segment is not None,
            random=expert_dropout > 0 or jitter > 0,
        )
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        for name in "norm_weight", "norm_bias", "weight_norm_weight", "weight_norm_bias":
            parameter = nn.Parameter(torch.empty(hidden_size)) if router_norm else None
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        if self.router_norm:
            nn.init.ones_(self.norm_weight)
            nn.init.constant_(self.weight_norm_weight, self.weight_norm_gain)
            nn.init.zeros_(self.norm_bias)
            nn.init.zeros_(self.weight_norm_bias)

    def route(
        self,
        x: Tensor,
        *,
        valid_mask: Tensor | None,
        seed: int | Tensor | None = None,
        group_offsets: Tensor | None = None,
        **context: Any,
    ) -> Routing:
        self.check_hidden_size(x)
        if group_offsets is not None:
            raise ValueError(
                f"{self._name}: expected one sequence per sample, got group_offsets. Packed "
                "sequences would share a mean"
            )
        sequences = self.full_precision(x)
        if x.dim() < 3:
            sequences = sequences.reshape(1, -1 if x.dim() == 1 else len(x), self.hidden_size)
        sequences = sequences.flatten(0, -3)
        sequence = sequences.shape[1]
        if valid_mask is None:
            valid = x.new_ones(sequences.shape[:2], dtype=torch.bool)
        else:
            valid = valid_mask.reshape(sequences.shape[:2])
        size = max(1, sequence) if self.segment is None else self.segment
        means = _means(sequences, valid, size)
        if self.segment is not None:  # of the segment before
            means = F.pad(means[:, :-1], (0, 0, 1, 0))
        noise = Noise(means, seed) if self.training and self.traits.random else None
        if noise is not None and self.jitter:
            means = noise.jittered(means, self.jitter)
        logits = self._logits(means)
        weights = logits.softmax(-1)
        if noise is not None and self.expert_dropout:
            kept = noise.uniform(Stream.EXPERTS, self.num_experts)
            weights = torch.where(kept >= self.expert_dropout, weights, 0) + 1e-10
            weights = weights / weights.sum(-1, keepdim=True)

        def of_tokens(of_segments: Tensor) -> Tensor:
            each = of_segments.unsqueeze(2).expand(-1, -1, size, -1).flatten(1, 2)
            return each[:, :sequence].reshape(*x.shape[:-1], self.num_experts)

        token_weights = of_tokens(weights)
        if valid_mask is not None:
            token_weights = torch.where(valid_mask.unsqueeze(-1), token_weights, 0)
        offsets = _offsets(sequences, size, weights.shape[1])
        return Routing(
            token_weights,
            logits=of_tokens(logits),
            counts=valid.sum().expand(self.num_experts).clone(),
            merge=Merge(weights.flatten(0, 1), offsets),
        )

    def _logits(self, means: Tensor) -> Tensor:
        weight, shape = self.weight.to(means.dtype), (self.hidden_size,)
        if self.router_norm:
            gains = (
                (self.norm_weight, self.norm_bias),
                (
                    self.weight_norm_weight,
                    self.weight_norm_bias,
                ),
            )
            means, weight = (
                F.layer_norm(v, shape, *(p.to(v.dtype) for p in pair))
                for v, pair in zip((means, weight), gains, strict=True)
            )
        return F.linear(means, weight)


def _means(sequences: Tensor, valid: Tensor, size: int) -> Tensor:
    """``[batch, segments, hidden_size]``, of tokens that are not masked; 0 where there is none."""
    tokens = sequences.shape[1]
    segments = max(1, -(-tokens // size))
    missing = segments * size - tokens
    sums = F.pad(sequences, (0, 0, 0, missing)).unflatten(1, (segments, size)).sum(2)
    counts = F.pad(valid, (0, missing)).unflatten(1, (segments, size)).sum(2)
    return sums / counts.clamp(min=1).unsqueeze(-1)


def _offsets(sequences: Tensor, size: int, segments: int) -> Tensor:
    """``[batch * segments + 1]``: where segments begin in the flattened tokens."""
    batch, tokens = sequences.shape[:2]
    ends = (torch.arange(1, segments + 1, device=sequences.device) * size).clamp(max=tokens)
    starts = torch.arange(batch, device=sequences.device).unsqueeze(1) * tokens
    return F.pad((starts + ends).flatten(), (1, 0))
