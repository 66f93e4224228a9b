"""The base of all routers."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from torch_routers._autograd import autocast_dtype
from torch_routers.delivery import Count, Deliver, Inputs, in_backward
from torch_routers.losses import RouterLoss
from torch_routers.losses.base import evaluate, full_precision
from torch_routers.registry import Configurable
from torch_routers.routing import Routing


class RouterTraits(NamedTuple):
    """What a caller may rely on, or must provide."""

    batch_dependency: Literal[
        "none", "sequence", "sequence_causal", "batch_train_only", "batch"
    ] = "none"
    """Whether the routing of a token depends on other tokens, and on which."""
    causal: bool = True
    """Whether it depends on the past alone."""
    drops_tokens: bool = False
    """Whether slots can stay empty because an expert is full."""
    random: bool = False
    """Whether it draws random numbers, in training alone."""
    needs: tuple[str, ...] = ()
    """Context that a call must bring, such as ``token_ids``."""


#: Context that tells about tokens: given to every router, whether it looks or not. Any other
#: context asks for something, and a router that does not know it says so.
FACTS = ("token_ids", "row_ids", "group_offsets", "task_ids", "state")


class CrossBatchRoutingWarning(UserWarning):
    """In eval mode, tokens of one sequence would change the routing of another.

    With capacities whoever shares a batch with a victim can push its tokens out of their experts
    (arXiv 2402.05526).
    """


class Router(Configurable, nn.Module):
    """Decides, in `route`, which expert sees which token; what all routers share is around it.

    A subclass calls ``super().__init__(num_experts, losses)``, keeps its constructor's arguments
    under their own names, and writes ``route``. Defining it registers it under its name.

    ``route`` gets ``x`` with masked rows set to zero, outside autocast. A masked token must come
    out with indices -1 and weights 0, and be in no count and no statistic; `ops.topk_gate` and
    `ops.gate` see to that when they get ``valid_mask``.
    """

    #: Of the class; an instance whose arguments change them has its own.
    traits: RouterTraits = RouterTraits()

    #: What to do where the routing of one sequence would depend on others in eval mode: "warn",
    #: "raise" or "allow".
    cross_batch: Literal["warn", "raise", "allow"] = "warn"

    #: Whether no gradient ever comes back to its weights: what a controller measures is then added
    #: up in the forward.
    has_fixed_weights: ClassVar[bool] = False

    #: What the ``expert_bias`` is added to for the choice of experts: "scores" or "logits".
    bias_of: Literal["scores", "logits"] = "scores"

    def __init__(self, num_experts: int, losses: Sequence[RouterLoss] = ()) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"{self._name}: expected num_experts >= 1, got {num_experts}")
        names = [loss.name for loss in losses]
        if len(set(names)) < len(names):
            raise ValueError(f"{self._name}: expected losses with distinct names, got {names}")
        self.num_experts = num_experts
        self.losses = nn.ModuleList(losses)
        for loss in losses:
            loss.bind(self)
        # Plain attributes, set here, and a list of lists: what torch.compile can guard and append
        # to, and what DDP does not broadcast.
        self._sinks: list[list[Routing]] = []
        self._observers: list[list[Routing]] = []
        self._aux_scale: Tensor | None = None
        self._inputs: Inputs | None = None
        self._load: Tensor | None = None  # where a controller adds up what it measures
        self._measure: Callable[[Router, Routing], Tensor] | None = None
        self.expert_bias: Tensor | None
        self.register_buffer("expert_bias", None)

    def route(self, x: Tensor, *, valid_mask: Tensor | None, **context: Any) -> Routing:
        """Decide. ``x`` is ``[..., hidden_size]``, ``valid_mask`` ``[...]`` bool or None."""
        raise NotImplementedError

    def forward(self, x: Tensor, *, valid_mask: Tensor | None = None, **context: Any) -> Routing:
        """Route each token of ``x``.

        Args:
            x: ``[..., hidden_size]``, any floating dtype.
            valid_mask: ``[...]`` bool, True = real token. The content of masked rows, NaN included,
                changes nothing anywhere.
            context: more about the tokens (``token_ids``, ``row_ids``, ``group_offsets``,
                ``task_ids``, ``state``; ignored by routers that do not need it), or what this
                router can be asked for (such as ``indices``, to replay a routing).
                ``group_offsets`` also stand in the result, for losses that look at neighbours.

        Raises:
            ValueError: an argument that does not fit.
        """
        if self._inputs is not None:
            context = self.with_followed(x, {"valid_mask": valid_mask, **context})
            valid_mask = context.pop("valid_mask", None)
        self._check(x, valid_mask, context)
        if valid_mask is not None:
            x = torch.where(valid_mask.unsqueeze(-1), x, 0)  # before any arithmetic: it may be NaN
        routing = self._route_in_full_precision(x, valid_mask, context)
        if context.get("group_offsets") is not None:
            routing = routing._replace(group_offsets=context["group_offsets"])
        if self.training and self.losses:
            routing = self._deliver(routing, {**context, "valid_mask": valid_mask})
        if self.training and self._measure is not None:
            measured = self._measure(self, routing)
            if not self.has_fixed_weights:
                weights = Count.apply(routing.weights, measured, self._load)
                routing = routing._replace(weights=weights)
            elif not in_backward():
                self._load.add_(measured)
        if (self._sinks or self._observers) and not in_backward():
            for sink in [*self._sinks, *self._observers]:
                sink.append(routing)
        return routing

    def train(self, mode: bool = True) -> "Router":
        if not mode and self.traits.batch_dependency == "batch":
            self.mind_batch_dependency()
        return super().train(mode)

    def with_followed(self, x: Tensor, context: dict[str, Any]) -> dict[str, Any]:
        """The context of a call, and what `follow_inputs` brings besides."""
        if self._inputs is None:
            return context
        given = {name: value for name, value in context.items() if value is not None}
        return {**self._inputs.of_tokens(x.shape[:-1]), **given}

    # ---- for subclasses --------------------------------------------------------------------------

    def add_expert_bias(self) -> None:
        """Adds the buffer ``expert_bias`` ``[num_experts]``, which a controller moves.

        A router that adds it to logits for its choice, not to scores, has ``bias_of = "logits"``.

        It is float32 whatever the module is cast to: its steps, 1e-3, are below the resolution of
        the half types.
        """
        self.expert_bias = torch.zeros(self.num_experts)

    def mind_batch_dependency(self) -> None:
        """Say, as ``cross_batch`` wants it, that sequences of a batch influence each other."""
        message = (
            f"{self._name}: expected routing that does not depend on other sequences of the batch "
            "in eval mode, got capacities over the whole batch. Use capacities per sequence, none, "
            'or cross_batch="allow"'
        )
        if self.cross_batch == "raise":
            raise ValueError(message)
        if self.cross_batch == "warn":
            warnings.warn(message, CrossBatchRoutingWarning, stacklevel=3)

    def check_hidden_size(self, x: Tensor) -> None:
        """An error for an ``x`` that is not ``[..., self.hidden_size]``."""
        if x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"{self._name}: expected x of shape [..., hidden_size={self.hidden_size}], "
                f"got {list(x.shape)}"
            )

    @property
    def wants_statistics(self) -> bool:
        """Whether losses will read ``lse`` and ``score_sums`` of the statistics."""
        return self.training and len(self.losses) > 0

    @property
    def wants_groups(self) -> bool:
        """Whether losses will read the statistics of each sequence: one group per sample."""
        return self.training and any(loss.per_sequence for loss in self.losses)

    #: ``x`` in the dtype in which routers compute: float32, or float64 where ``x`` is.
    full_precision = staticmethod(full_precision)

    # ----------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check(self, x: Tensor, valid_mask: Tensor | None, context: dict[str, Any]) -> None:
        if x.dim() < 1 or not x.is_floating_point():
            raise ValueError(
                f"{self._name}: expected x in a floating dtype of shape [..., hidden_size], "
                f"got {x.dtype} of shape {list(x.shape)}"
            )
        for name in self.traits.needs:
            if context.get(name) is None:
                raise ValueError(
                    f"{self._name}: expected {name}, got none. Pass it by keyword, or use "
                    "tr.follow_inputs"
                )
        for name in context:
            if name not in FACTS and name not in self._asked_for:
                raise ValueError(
                    f"{self._name}: expected context among {[*FACTS, *self._asked_for]}, "
                    f"got {name!r}"
                )
        if valid_mask is not None and (
            valid_mask.dtype != torch.bool or valid_mask.shape != x.shape[:-1]
        ):
            raise ValueError(
                f"{self._name}: expected valid_mask in bool of shape {list(x.shape[:-1])}, "
                f"got {valid_mask.dtype} of shape {list(valid_mask.shape)}"
            )

    _asked_for: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        parameters = list(inspect.signature(cls.route).parameters.values())[2:]
        cls._asked_for = tuple(
            p.name
            for p in parameters
            if p.kind is not p.VAR_KEYWORD and p.name != "valid_mask" and p.name not in FACTS
        )

    def _route_in_full_precision(
        self, x: Tensor, valid_mask: Tensor | None, context: dict[str, Any]
    ) -> Routing:
        if autocast_dtype(x) is None:  # entering the context costs more than the test
            return self.route(x, valid_mask=valid_mask, **context)
        with torch.autocast(x.device.type, enabled=False):
            return self.route(x, valid_mask=valid_mask, **context)

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias.dtype != torch.float32:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.expert_bias is not None:  # assign=True takes any dtype
            self.expert_bias = self.expert_bias.float()

    def _deliver(self, routing: Routing, context: dict[str, Any]) -> Routing:
        aux_loss, values = evaluate(self.losses, routing, {**context, "router": self})
        weights, attached = routing.weights, self._aux_scale is not None
        if attached:
            weights = Deliver.apply(weights, aux_loss, self._aux_scale)
        return routing._replace(
            weights=weights,
            aux_loss=None if attached else aux_loss,
            losses=values,
        )

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={value!r}"
            for name, value in self.config().items()
            if name not in ("class", "losses")
        )
