"""Banks of experts: the same small network many times, applied to rows sorted by expert.

A bank is any module with ``forward(rows, offsets)``: ``rows`` ``[rows, hidden_size]``, of which
``offsets[e]:offsets[e + 1]`` are those of expert ``e``; rows behind the last offset belong to no
expert, and their result must be finite.

The banks here also take a `Merge` in the place of offsets: they then apply to the rows of each
segment one expert, merged from all.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_routers.ops import grouped_linear, merged_linear
from torch_routers.routing import Merge


class ExpertBank(nn.Module):
    """A bank of which every parameter is ``[num_experts, ...]``.

    ``sizes`` are attributes under their names.
    """

    num_experts: int
    hidden_size: int

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{type(self).__name__}: expected {name} >= 1, got {size}")
            setattr(self, name, size)
        self._sizes = tuple(sizes)

    def _add(self, name: str, out_features: int, in_features: int, bias: bool) -> None:
        """The weight ``name`` ``[num_experts, out, in]`` and, if wanted, its bias."""
        weight = torch.empty(self.num_experts, out_features, in_features)
        self.register_parameter(name, nn.Parameter(weight))
        of_rows = nn.Parameter(torch.empty(self.num_experts, out_features)) if bias else None
        self.register_parameter(f"{name}_bias", of_rows)

    def _linear(self, name: str, rows: Tensor, offsets: Tensor | Merge) -> Tensor:
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
        if isinstance(offsets, Merge):
            return merged_linear(rows, weight, *offsets, bias)
        return grouped_linear(rows, weight, offsets, bias)

    def reset_parameters(self) -> None:
        """Normal, of standard deviation 1 / sqrt(input features); biases are 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("_bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in self._sizes)


class SwiGLUExperts(ExpertBank):
    r"""Experts with a gated hidden layer (arXiv 2002.05202), as in Mixtral and most models since.

    .. math::  y = W^{down}_e \big( \mathrm{silu}(W^{gate}_e x) \odot W^{up}_e x \big)

    ``gate_up_proj`` is ``[num_experts, 2 * intermediate_size, hidden_size]``, gate first;
    ``down_proj`` is ``[num_experts, hidden_size, intermediate_size]``. With ``bias``,
    ``gate_up_proj_bias`` ``[num_experts, 2 * intermediate_size]`` and ``down_proj_bias``
    ``[num_experts, hidden_size]`` are added.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, *, bias: bool = False
    ) -> None:
        super().__init__(
            num_experts=num_experts, hidden_size=hidden_size, intermediate_size=intermediate_size
        )
        self._add("gate_up_proj", 2 * intermediate_size, hidden_size, bias)
        self._add("down_proj", hidden_size, intermediate_size, bias)
        self.reset_parameters()

    @classmethod
    def from_dense(cls, mlp: nn.Module, num_experts: int) -> "SwiGLUExperts":
        """Experts that all begin as copies of a trained dense layer (upcycling, arXiv 2212.05055).

        Args:
            mlp: has the linear layers ``gate_proj``, ``up_proj`` and ``down_proj``, as `SwiGLU` and
                those of most Transformers models. Biases are taken over where all have one.
            num_experts: number of copies.

        Raises:
            ValueError: a module without these layers.
        """
        gate, up, down = _layers_of(cls, mlp, "gate_proj", "up_proj", "down_proj")
        experts = cls(num_experts, gate.in_features, gate.out_features, bias=gate.bias is not None)
        experts.to(gate.weight)
        with torch.no_grad():
            experts.gate_up_proj.copy_(torch.cat([gate.weight, up.weight]))
            experts.down_proj.copy_(down.weight)
            if gate.bias is not None:
                experts.gate_up_proj_bias.copy_(torch.cat([gate.bias, up.bias]))
                experts.down_proj_bias.copy_(down.bias)
        return experts

    def forward(self, rows: Tensor, offsets: Tensor | Merge) -> Tensor:
        gate, up = self._linear("gate_up_proj", rows, offsets).chunk(2, -1)
        return self._linear("down_proj", self._glu(gate, up), offsets)

    def _glu(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class ClampedSwiGLUExperts(SwiGLUExperts):
    r"""The experts of GPT-OSS, whose gated layer is clamped and shifted; with biases by default.

    .. math::  y = W^{down}_e \big( (1 + \mathrm{clamp}(u, -l, l)) \; g \, \sigma(\alpha g) \big),
               \qquad g = \min(W^{gate}_e x, l), \quad u = W^{up}_e x

    with :math:`l` the ``limit``, 7, and :math:`\alpha` 1.702. Parameters are those of
    `SwiGLUExperts`; the released ones have gate and up interleaved, column by column.
    """

    alpha = 1.702

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = True,
        limit: float = 7.0,
    ) -> None:
        super().__init__(num_experts, hidden_size, intermediate_size, bias=bias)
        self.limit = limit

    def _glu(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(self.alpha * gate))


class MLPExperts(ExpertBank):
    r"""Experts with one hidden layer, as in Switch (arXiv 2101.03961) with ReLU.

    .. math::  y = W^{down}_e \, \phi(W^{up}_e x)

    ``up_proj`` is ``[num_experts, intermediate_size, hidden_size]``, ``down_proj``
    ``[num_experts, hidden_size, intermediate_size]``; ``activation`` is ``"gelu"`` (default),
    ``"relu"`` or ``"silu"``. With ``bias``, ``up_proj_bias`` and ``down_proj_bias`` are added. A
    ``scale`` ``[rows, 1]`` given to ``forward`` multiplies :math:`\phi(\cdot)`, rounded once.
    """

    _ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}  # noqa: RUF012

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "gelu",
        bias: bool = False,
    ) -> None:
        super().__init__(
            num_experts=num_experts, hidden_size=hidden_size, intermediate_size=intermediate_size
        )
        if activation not in self._ACTIVATIONS:
            raise ValueError(
                f"MLPExperts: expected activation among {sorted(self._ACTIVATIONS)}, "
                f"got {activation!r}"
            )
        self.activation = activation
        self._add("up_proj", intermediate_size, hidden_size, bias)
        self._add("down_proj", hidden_size, intermediate_size, bias)
        self.reset_parameters()

    def forward(self, rows: Tensor, offsets: Tensor | Merge, scale: Tensor | None = None) -> Tensor:
        hidden = self._ACTIVATIONS[self.activation](self._linear("up_proj", rows, offsets))
        if scale is not None:
            hidden = (hidden * scale).to(hidden.dtype)
        return self._linear("down_proj", hidden, offsets)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


class ExpertList(nn.Module):
    """Experts that are modules of their own, of any kind, as a bank.

    It asks the device how many rows each expert has, and calls one after the other: for experts
    that no bank has, such as quantised ones or those of another library. An expert without rows
    is called with none, so that its gradients are zero instead of missing. ``torch.compile`` breaks
    the graph here.

    Args:
        experts: modules from ``[rows, hidden_size]`` to ``[rows, hidden_size]``.

    >>> experts = ExpertList(nn.Linear(4, 4) for _ in range(3))
    >>> experts(torch.ones(5, 4), torch.tensor([0, 2, 2, 5])).shape
    torch.Size([5, 4])
    """

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.num_experts = len(self.experts)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return apply_each(self.experts, rows, offsets)


def apply_each(experts: Iterable[nn.Module], rows: Tensor, offsets: Tensor) -> Tensor:
    """What `ExpertList` computes, with experts that belong to another module."""
    sizes = offsets.diff().tolist()
    *parts, tail = rows.split([*sizes, rows.shape[0] - sum(sizes)])
    results = [expert(part) for expert, part in zip(experts, parts)]
    return torch.cat([*results, torch.zeros_like(tail, dtype=results[0].dtype)])


class SwiGLU(nn.Module):
    r"""A dense gated layer: one expert for all tokens, such as a shared one.

    .. math::  y = W^{down} \big( \mathrm{silu}(W^{gate} x) \odot W^{up} x \big)

    The linear layers have the names that Transformers gives them: ``gate_proj``, ``up_proj``,
    ``down_proj``.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _layers_of(cls: type, mlp: nn.Module, *names: str) -> list[nn.Linear]:
    layers = [getattr(mlp, name, None) for name in names]
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        raise ValueError(
            f"{cls.__name__}: expected mlp with the linear layers {', '.join(names)}, got "
            f"{[name for name, _ in mlp.named_children()]}"
        )
    return layers
