"""The recurrent router: what earlier layers decided about a token reaches the next one."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_routers import ops
from torch_routers.losses import RouterLoss
from torch_routers.registry import Configurable, check_choice
from torch_routers.routers.topk import TopKRouter
from torch_routers.routing import Routing

GATES = {"gru": 3, "rnn": 1}


class RecurrentCell(Configurable, nn.Module):
    r"""What takes the state of a token from one layer to the next; layers share it.

    ``"gru"`` is :func:`ops.gru_cell` between two products with weights, equal to
    `torch.nn.GRUCell`; ``"rnn"`` is :math:`h' = \tanh(W_i u + \beta_i + W_h h + \beta_h)`, equal to
    `torch.nn.RNNCell`. The parameters have the names of theirs, so that state dicts fit.

    Args:
        size: of input and state, 128 in the paper.
        kind: ``"gru"`` or ``"rnn"``.

    Raises:
        ValueError: an argument that does not fit.

    >>> RecurrentCell(4)(torch.randn(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(self, size: int = 128, kind: str = "gru") -> None:
        super().__init__()
        check_choice("RecurrentCell", "kind", kind, tuple(GATES))
        if size < 1:
            raise ValueError(f"RecurrentCell: expected size >= 1, got {size}")
        self.size, self.kind = size, kind
        for name, shape in {
            "weight_ih": (GATES[kind] * size, size),
            "weight_hh": (GATES[kind] * size, size),
            "bias_ih": (GATES[kind] * size,),
            "bias_hh": (GATES[kind] * size,),
        }.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ``[-1, 1] / sqrt(size)``, as in PyTorch's cells."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(self.size**-0.5), self.size**-0.5)

    def forward(
        self, u: Tensor, state: Tensor | None = None, valid_mask: Tensor | None = None
    ) -> Tensor:
        """The next state ``[..., size]``.

        Args:
            u: ``[..., size]`` in float32 or float64.
            state: of the same shape and dtype; None stands for zeros.
            valid_mask: ``[...]`` bool; a masked token keeps its state.
        """
        if state is None:
            state = torch.zeros_like(u)
        gates = F.linear(u, self.weight_ih.to(u.dtype), self.bias_ih.to(u.dtype))
        hidden = F.linear(state, self.weight_hh.to(u.dtype), self.bias_hh.to(u.dtype))
        if self.kind == "gru":
            return ops.gru_cell(gates, hidden, state, valid_mask=valid_mask)
        after = torch.tanh(gates + hidden)
        return after if valid_mask is None else torch.where(valid_mask.unsqueeze(-1), after, state)

    def extra_repr(self) -> str:
        return f"{self.size}, kind={self.kind!r}"


class RecurrentRouter(TopKRouter):
    r"""A top-k router that carries a state from layer to layer (RMoE, arXiv 2408.06793).

    .. math::  u = W_1 x, \qquad h' = \mathrm{cell}(u, h), \qquad z = W_2 h'

    for each token by itself; experts and weights follow from :math:`z` as in `TopKRouter` with the
    renormalised softmax. :math:`h` is the state that the router of the layer before returned,
    zeros in the first one. ``projector`` :math:`W_1` and ``weight`` :math:`W_2` belong to the
    layer, the cell is shared by all layers: build one, and give it to each router.

    The authors' code (qiuzh20/RMoE) cannot be run: its cell fails to be constructed and its weights
    are not initialised. We follow the paper, with the biases that the code has and the paper's
    formulas leave out; masked tokens keep their state, which the code does not treat.

    Args:
        hidden_size: size of the last dimension of the input.
        num_experts: experts to choose from.
        top_k: experts per token, in ``[1, num_experts]``.
        cell: shared by the routers of a model. Default: one of its own, ``RecurrentCell(128)``.
        detach_state: stop the gradient between layers. The paper finds that it is the gradient
            that helps: without it the results are worse than without a state.
        renormalize: make the weights of each token sum to 1.
        losses: auxiliary losses; in the paper ``LoadBalanceLoss(1e-2)``.

    ``routing.state`` is ``[..., cell.size]``, float32 (float64 for float64). It is a result and, as
    ``state=``, an argument, so that it survives activation checkpointing and travels between
    pipeline stages; `RecurrentStack` hands it on. Nothing is kept between calls: in generation each
    new token starts at the first layer. A call otherwise takes what that of a `TopKRouter` does.

    Raises:
        ValueError: an argument that does not fit.

    >>> cell = RecurrentCell(8)
    >>> first, second = (RecurrentRouter(16, 4, 2, cell=cell) for _ in range(2))
    >>> routing = first(torch.randn(3, 16))
    >>> second(torch.randn(3, 16), state=routing.state).state.shape
    torch.Size([3, 8])
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        cell: RecurrentCell | None = None,
        detach_state: bool = False,
        renormalize: bool = True,
        losses: Sequence[RouterLoss] = (),
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, renormalize=renormalize, losses=losses)
        self.cell = RecurrentCell() if cell is None else cell
        self.detach_state = detach_state
        self.weight = nn.Parameter(torch.empty(num_experts, self.cell.size))  # of the state, not x
        self.projector = nn.Parameter(torch.empty(self.cell.size, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        projector, cell = getattr(self, "projector", None), getattr(self, "cell", None)
        if projector is not None:
            nn.init.normal_(projector, std=0.02)
        if cell is not None:
            cell.reset_parameters()

    def route(
        self,
        x: Tensor,
        *,
        valid_mask: Tensor | None,
        state: Tensor | None = None,
        indices: Tensor | None = None,
        top_k: int | Tensor | None = None,
        capacity: int | None = None,
        capacity_factor: float | None = None,
        group_offsets: Tensor | None = None,
        **context: Any,
    ) -> Routing:
        self.check_hidden_size(x)
        x = self.full_precision(x)
        if state is not None:
            expected = [*x.shape[:-1], self.cell.size]
            if list(state.shape) != expected or not state.is_floating_point():
                raise ValueError(
                    f"{self._name}: expected state in a floating dtype of shape {expected}, "
                    f"got {state.dtype} of shape {list(state.shape)}"
                )
            state = state.to(x.dtype)
            state = state.detach() if self.detach_state else state
        state = self.cell(F.linear(x, self.projector.to(x.dtype)), state, valid_mask)
        routing = self.choose(
            F.linear(state, self.weight.to(x.dtype)),
            None,
            valid_mask=valid_mask,
            indices=indices,
            top_k=top_k,
            capacity=capacity,
            capacity_factor=capacity_factor,
            group_offsets=group_offsets,
        )
        return routing._replace(state=state)


class RecurrentStack(nn.Module):
    """Layers one after the other, between which the state of recurrent routers is handed on.

    Args:
        layers: modules. One that takes part is called ``layer(x, state=state, **context)`` and
            returns the pair of its output and the next state; it has the attribute
            ``passes_state = True``. Any other is called ``layer(x, **context)``, and the state
            passes by.

    The cells of all recurrent routers in the layers are made one: that of the first. Called with
    ``state``, it begins with that one instead of zeros, and always returns the output alone; the
    state ends with the last layer.

    Raises:
        ValueError: no recurrent router, or cells of different size or kind.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        share_cell(self.layers)

    def forward(self, x: Tensor, *, state: Tensor | None = None, **context: Any) -> Tensor:
        for layer in self.layers:
            if getattr(layer, "passes_state", False):
                x, state = layer(x, state=state, **context)
            else:
                x = layer(x, **context)
        return x


def share_cell(model: nn.Module) -> RecurrentCell:
    """Give all recurrent routers in ``model`` the cell of the first, and return it.

    Raises:
        ValueError: no recurrent router, or cells of different size or kind.
    """
    routers = [module for module in model.modules() if isinstance(module, RecurrentRouter)]
    if not routers:
        raise ValueError("share_cell: expected a model with a RecurrentRouter, got none")
    cell = routers[0].cell
    for router in routers:
        if (router.cell.size, router.cell.kind) != (cell.size, cell.kind):
            raise ValueError(f"share_cell: expected cells like {cell}, got {router.cell}")
        router.cell = cell
    return cell
