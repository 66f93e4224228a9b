"""A linear layer with a mixture of low-rank experts beside it."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_routers.lora.matching import linear_features
from torch_routers.lora.mixing import MIXES, Factors
from torch_routers.lora.scope import RoutingScope

#: The name of a factor that all experts of a mixture have in common.
SHARED = "shared"


class LowRankFactor(nn.Module):
    """One factor of one expert: a ``weight`` with two dimensions, in a module of its own.

    One parameter per expert, not a stacked one: a row that nothing trains would still follow the
    weight decay, and FSDP wants parameters with two dimensions that are named ``weight``.
    """

    def __init__(self, rows: int, columns: int, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, **factory))

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}"


class RoutedLoraLinear(nn.Module):
    r"""A linear layer, frozen or not, and what its experts add to it.

    .. math::  y = \mathrm{base}(x) + \sum_e w_e(x)\, c_e\, B_e A_e\, d(x)

    with weights :math:`w` from a router, scalings :math:`c_e`, and dropout :math:`d`, one mask for
    all experts; other kinds of mixtures than this ``"product"`` are among the options of
    `RoutedLoraConfig`. `inject` puts such layers into a model; experts belong to a *mixture*, of
    which a layer may have several by name, one of them active.

    Args:
        base_layer: any module with ``in_features`` and ``out_features``, such as ``nn.Linear`` or
            a quantised one, or a ``Conv1D`` of Transformers. It is called, never looked into.

    The parameters are ``routed_A.<mixture>.<expert>.weight`` ``[r_e, in_features]`` and
    ``routed_B.<mixture>.<expert>.weight`` ``[out_features, r_e]``, in float32 (float64 where the
    base has it) whatever the dtype of the base: they are rounded to the dtype of ``x`` for the
    product. What all experts of a mixture share is one factor named ``shared`` instead. The result
    has the dtype of the base's result. ``routed_gate.<mixture>`` is the router, where no other
    layer of the same scope has it, and ``routed_tasks.<mixture>`` the embedding of tasks that it
    looks at, if it does.

    A layer without an active mixture returns what its base returns, to the bit. So does one whose
    :math:`B` are 0, as they are at first.

    Raises:
        ValueError: a base layer of another kind.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = features_of(base_layer)
        self.routed_A, self.routed_B = nn.ModuleDict(), nn.ModuleDict()
        self.routed_gate, self.routed_tasks = nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, dict[str, float]] = {}
        self.dropout: dict[str, float] = {}
        self.kind: dict[str, str] = {}
        self.active_mix: str | None = None
        self._scopes: dict[str, RoutingScope] = {}

    def add_mix(
        self,
        mix: str,
        ranks: Mapping[str, int],
        scaling: Mapping[str, float],
        scope: RoutingScope,
        *,
        dropout: float = 0.0,
        owns_router: bool = False,
        init: bool | str = True,
        kind: str = "product",
    ) -> None:
        """Add a mixture and make it the active one.

        Args:
            mix: its name.
            ranks: of each expert, by name; 0 is an expert that does nothing here.
            scaling: :math:`c_e` of each expert.
            scope: where the routing comes from.
            dropout: probability that a number of ``x`` is 0 for the experts, in training.
            owns_router: have the router of the scope among the modules of this layer.
            init: first values of experts, as in `reset_expert`.
            kind: ``mix`` of `RoutedLoraConfig`.
        """
        if mix in self.routed_A:
            raise ValueError(f"RoutedLoraLinear: expected a new name of a mixture, got {mix!r}")
        self.routed_A[mix], self.routed_B[mix] = nn.ModuleDict(), nn.ModuleDict()
        self.scaling[mix], self.dropout[mix] = {}, dropout
        self.kind[mix] = kind
        self._scopes[mix], self.active_mix = scope, mix
        scope.layers.append(self)
        if owns_router:
            self.routed_gate[mix] = scope.router
            if scope.tasks is not None:
                self.routed_tasks[mix] = scope.tasks
        for expert, rank in ranks.items():
            self.add_expert(mix, expert, rank, scaling[expert], init)

    def add_expert(
        self, mix: str, expert: str, rank: int, scaling: float, init: bool | str = True
    ) -> None:
        """Add an expert; its router has to know it."""
        factory, kind = self._factory(), self.kind[mix]
        if kind == "ranks":  # the router has A; each expert is a column of B
            if not self.routed_B[mix]:
                ranks = self._scopes[mix].router.num_experts
                self.routed_B[mix][SHARED] = LowRankFactor(self.out_features, ranks, **factory)
                _reset_b(self.routed_B[mix][SHARED].weight, init)
            self.scaling[mix][expert] = scaling
            return
        name_of_a = SHARED if kind == "shared_a" else expert
        is_new = name_of_a not in self.routed_A[mix]
        if is_new:
            self.routed_A[mix][name_of_a] = LowRankFactor(rank, self.in_features, **factory)
        self.routed_B[mix][expert] = LowRankFactor(self.out_features, rank, **factory)
        self.scaling[mix][expert] = scaling
        self.reset_expert(mix, expert, init, with_a=is_new)

    def reset_expert(
        self, mix: str, expert: str, init: bool | str = True, *, with_a: bool = True
    ) -> None:
        """Give an expert its first values.

        Args:
            init: True: A as ``nn.Linear`` is initialised, B 0 (LoRA's code, and PEFT's); False: B
                like A, so that the expert does something; ``"normal"``: A from a normal
                distribution of standard deviation 0.02, B 0 (MoLoRA).
            with_a: A too, which other experts may share.
        """
        a, b = self.factors(mix, expert)
        if a.numel() == 0:
            return
        if with_a and init == "normal":
            nn.init.normal_(a, std=0.02)
        elif with_a:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        _reset_b(b, init)

    def remove_mix(self, mix: str) -> None:
        """Forget a mixture and its experts."""
        self._scopes[mix].layers.remove(self)
        for of_mix in (
            self.routed_A, self.routed_B, self.scaling, self.dropout, self.kind, self._scopes,
        ):  # fmt: skip
            del of_mix[mix]
        for of_owner in self.routed_gate, self.routed_tasks:
            if mix in of_owner:
                del of_owner[mix]
        if self.active_mix == mix:
            self.active_mix = None

    def set_trainable(self, mix: str, experts: Collection[str], router: bool) -> None:
        """Say which experts of a mixture are trained, and whether its router is.

        What experts share is trained where any of them is.
        """
        for part in self.routed_A, self.routed_B:
            for name, factor in part[mix].items():
                factor.requires_grad_(name in experts or (name == SHARED and bool(experts)))
        for of_owner in self.routed_gate, self.routed_tasks:
            if mix in of_owner:
                of_owner[mix].requires_grad_(router)

    def trained(self, mix: str) -> dict[str, bool]:
        """Whether each parameter of a mixture is trained, by its name without the mixture."""
        kinds = ("routed_A", "routed_B", "routed_gate", "routed_tasks")
        return {
            f"{kind}.{name}": parameter.requires_grad
            for kind in kinds
            if mix in getattr(self, kind)
            for name, parameter in getattr(self, kind)[mix].named_parameters()
        }

    def experts(self, mix: str) -> list[str]:
        """The names of a mixture's experts, in the order of the router."""
        return list(self.scaling[mix])

    def factors(self, mix: str, expert: str) -> tuple[Tensor, Tensor]:
        """A and B of an expert, which may be shared with others, or parts of what is."""
        if self.kind[mix] == "ranks":
            e = self.experts(mix).index(expert)
            stacked_a = self._scopes[mix].router.projection
            return stacked_a[e : e + 1], self.routed_B[mix][SHARED].weight[:, e : e + 1]
        name_of_a = SHARED if self.kind[mix] == "shared_a" else expert
        return self.routed_A[mix][name_of_a].weight, self.routed_B[mix][expert].weight

    def scope(self, mix: str) -> RoutingScope:
        """Where the routing of a mixture comes from."""
        return self._scopes[mix]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mix = self.active_mix
        if mix is not None and self._scopes[mix].repeats(x):  # the base is the same for all slots
            # Without the dimension of slots, whose stride of 0 would make a product of each token.
            y = self.base_layer(x[..., 0, :], *args, **kwargs).unsqueeze(-2)
        else:
            y = self.base_layer(x, *args, **kwargs)
        if mix is None:
            return y
        scope = self._scopes[mix]
        routing = scope.routing_for(x)
        if routing is None:  # the first of two passes
            return y
        factors = Factors(
            [factor.weight for factor in self.routed_A[mix].values()],
            [factor.weight for factor in self.routed_B[mix].values()],
            tuple(self.scaling[mix].values()),
        )
        x = F.dropout(x, self.dropout[mix], self.training)
        options = {
            "router_grad": "dense" if scope.dense_gradient else "selected",
            "inference": not self.training,
        }
        added = MIXES[self.kind[mix]](x, factors, routing, options)
        return y + added.to(y.dtype)

    # What models read of a layer that is linear, without calling it.
    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def get_base_layer(self) -> nn.Module:
        """The layer inside."""
        return self.base_layer

    def _factory(self) -> dict[str, Any]:
        weight = next(iter(self.base_layer.parameters()), None)
        if weight is None:
            return {"dtype": torch.float32}
        wide = weight.dtype == torch.float64
        return {"device": weight.device, "dtype": torch.float64 if wide else torch.float32}

    def extra_repr(self) -> str:
        return f"active_mix={self.active_mix!r}"


def _reset_b(b: Tensor, init: bool | str) -> None:
    if init is False:
        nn.init.kaiming_uniform_(b, a=math.sqrt(5))
    else:
        nn.init.zeros_(b)


def features_of(layer: nn.Module) -> tuple[int, int]:
    """``in_features`` and ``out_features`` of a layer that is linear, or works like one."""
    features = linear_features(layer)
    if features is None:
        raise ValueError(
            "RoutedLoraLinear: expected base_layer with in_features and out_features, or a Conv1D, "
            f"got {type(layer).__name__}"
        )
    return features
