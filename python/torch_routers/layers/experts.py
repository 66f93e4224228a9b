"""Banks of experts: the same small network many times, applied to rows sorted by expert.

A bank is any module with ``forward(rows, offsets)``: ``rows`` ``[rows, hidden_size]``, of which
``offsets[e]:offsets[e + 1]`` are those of expert ``e``; rows behind the last offset belong to no
expert, and their result must be finite.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_routers.ops import grouped_linear


class _Experts(nn.Module):
    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        sizes = {
            "num_experts": num_experts,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{type(self).__name__}: expected {name} >= 1, got {size}")
        self.num_experts, self.hidden_size = num_experts, hidden_size
        self.intermediate_size = intermediate_size

    def reset_parameters(self) -> None:
        """Normal, of standard deviation 1 / sqrt(input features)."""
        for weight in self.parameters():
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}"
        )


class SwiGLUExperts(_Experts):
    r"""Experts with a gated hidden layer (arXiv 2002.05202), as in Mixtral and most models since.

    .. math::  y = W^{down}_e \big( \mathrm{silu}(W^{gate}_e x) \odot W^{up}_e x \big)

    ``gate_up_proj`` is ``[num_experts, 2 * intermediate_size, hidden_size]``, gate first;
    ``down_proj`` is ``[num_experts, hidden_size, intermediate_size]``.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(num_experts, hidden_size, intermediate_size)
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.reset_parameters()

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        gate, up = grouped_linear(rows, self.gate_up_proj, offsets).chunk(2, -1)
        return grouped_linear(F.silu(gate) * up, self.down_proj, offsets)


class MLPExperts(_Experts):
    r"""Experts with one hidden layer and no biases, as in Switch (arXiv 2101.03961) with ReLU.

    .. math::  y = W^{down}_e \, \phi(W^{up}_e x)

    ``up_proj`` is ``[num_experts, intermediate_size, hidden_size]``, ``down_proj``
    ``[num_experts, hidden_size, intermediate_size]``; ``activation`` is ``"gelu"`` (default),
    ``"relu"`` or ``"silu"``.
    """

    _ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}  # noqa: RUF012

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "gelu",
    ) -> None:
        super().__init__(num_experts, hidden_size, intermediate_size)
        if activation not in self._ACTIVATIONS:
            raise ValueError(
                f"MLPExperts: expected activation among {sorted(self._ACTIVATIONS)}, "
                f"got {activation!r}"
            )
        self.activation = activation
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.reset_parameters()

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        hidden = self._ACTIVATIONS[self.activation](grouped_linear(rows, self.up_proj, offsets))
        return grouped_linear(hidden, self.down_proj, offsets)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"
