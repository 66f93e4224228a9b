"""Routers that nobody trains: they compare a token with a direction of each expert."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_routers import ops
from torch_routers.registry import check_choice
from torch_routers.routers.base import Router
from torch_routers.routing import Routing

SCORES = ("absolute", "normalized")


class PrototypeRouter(Router):
    r"""The experts whose prototypes a token is most like, with a softmax over them.

    .. math::  w = \mathrm{softmax}(z_\mathrm{top} / \tau), \qquad
               z_e = |p_e \cdot x| \quad\text{or}\quad z_e = \hat p_e \cdot \hat x

    ``"absolute"``: Arrow (arXiv 2405.11157), where :math:`p_e` is the direction of input that the
    LoRA of an expert answers to most, whatever its sign; `lora.from_adapters` computes it.
    ``"normalized"``: PHATGOOSE (arXiv 2402.05859), where :math:`p_e` is a gate that was trained
    with its expert alone, and :math:`\hat{\ }` makes the mean of a vector 0 and its variance 1
    (the LayerNorm of PyTorch without parameters, :math:`\epsilon` = 1e-5).

    Args:
        hidden_size: size of the last dimension of the input.
        num_experts: experts to choose from.
        top_k: experts per token, in ``[1, num_experts]``; the papers have 3 for ``"absolute"``, 2
            for ``"normalized"``.
        score: as above.
        temperature: :math:`\tau`. Default: 1 for ``"absolute"``, the square root of
            ``hidden_size`` for ``"normalized"``.

    ``prototypes`` ``[num_experts, hidden_size]`` is a buffer of the ``state_dict``, 0 until it is
    set. The router has no parameters and no losses. ``indices`` in a call replays them.

    Raises:
        ValueError: an argument that does not fit.

    >>> router = PrototypeRouter(hidden_size=3, num_experts=3, top_k=2)
    >>> router.prototypes.copy_(torch.eye(3))
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    >>> router(torch.tensor([[0.5, -2.0, 0.0]])).indices
    tensor([[1, 0]])
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score: Literal["absolute", "normalized"] = "absolute",
        temperature: float | None = None,
    ) -> None:
        super().__init__(num_experts)
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"{self._name}: expected top_k in [1, num_experts={num_experts}], got {top_k}"
            )
        check_choice(self._name, "score", score, SCORES)
        if temperature is not None and not temperature > 0:
            raise ValueError(f"{self._name}: expected temperature > 0, got {temperature}")
        self.hidden_size, self.top_k, self.score = hidden_size, top_k, score
        self.temperature = temperature
        self.prototypes: Tensor
        self.register_buffer("prototypes", torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.prototypes.zero_()

    def route(
        self,
        x: Tensor,
        *,
        valid_mask: Tensor | None,
        indices: Tensor | None = None,
        group_offsets: Tensor | None = None,
        **context: Any,
    ) -> Routing:
        self.check_hidden_size(x)
        x = self.full_precision(x)
        logits = self._logits(x)
        options: dict[str, Any] = {
            "renormalize": True,
            "valid_mask": valid_mask,
            "group_offsets": group_offsets,
            "statistics": False,
        }
        if indices is None:
            weights, indices, statistics = ops.topk_gate(logits, self.top_k, **options)
        else:
            if valid_mask is not None:
                indices = torch.where(valid_mask.unsqueeze(-1), indices, -1)
            weights, statistics = ops.gate(logits, indices, **options)
        counts = statistics.group_counts.sum(0)
        return Routing(weights, indices, logits, counts, statistics)

    def _logits(self, x: Tensor) -> Tensor:
        prototypes, temperature = self.prototypes.to(x.dtype), self.temperature
        if self.score == "absolute":
            return F.linear(x, prototypes).abs() / (1 if temperature is None else temperature)
        size = (self.hidden_size,)
        logits = F.linear(F.layer_norm(x, size), F.layer_norm(prototypes, size))
        return logits / (self.hidden_size**0.5 if temperature is None else temperature)
