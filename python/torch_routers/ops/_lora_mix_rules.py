"""The two ways of `lora_mix`, and what they keep for the backward.

Each is a class with its products for a plain eager forward and backward, which keep the parameters
as they are and stack them anew, and with ``compose``, the same made of operators that have every
derivative: for compilers and transforms, and for derivatives of the backward.
"""

import itertools

import torch
from torch.autograd import Function, forward_ad

from torch_routers._autograd import is_unobserved
from torch_routers.ops._lora_products import expand, outer, shrink


class _Way:
    """``ranks``: of each expert; 0 for one to leave out, whose gradients are zeros."""

    def __init__(self, ranks, device):
        self.ranks, self.size = ranks, sum(ranks)
        self.tensor = self._ranks_for_products(device)

    def _stacked(self, factors, dim, dtype):
        """Those of all experts side by side: the ranks are rows (0) or columns (1) of a factor."""
        some = [x for x, rank in zip(factors, self.ranks) if x.shape[dim] == rank]
        return torch.cat(some or [factors[0].narrow(dim, 0, 0)], dim).to(dtype)

    def split(self, stacked, factors, dim):
        """The same backwards, for gradients."""
        for_each = zip(stacked.split(self.ranks, dim), factors, self.ranks)
        return [
            part.to(factor.dtype) if rank else torch.zeros_like(factor)
            for part, factor, rank in for_each
        ]


class Stacked(_Way):
    """``gates``: the weights of all experts, [tokens, experts]; the routing: which of them count.

    Without a routing all do. ``all_learn``: weights that do not count have gradients too.
    """

    def __init__(self, ranks, device, all_learn):
        super().__init__(ranks, device)
        self.all_learn = all_learn

    def _ranks_for_products(self, device):
        """The expert of each rank."""
        ranks = torch.tensor(self.ranks, device=device)
        return torch.repeat_interleave(ranks, output_size=self.size)

    def _of_ranks(self, of_experts):
        return of_experts.index_select(1, self.tensor)

    def _for_ranks(self, gates, routing):
        """The gate of each rank, and whether it counts; None where all do."""
        return self._of_ranks(gates), self._of_ranks(*routing) if routing else None

    def _of_chosen(self, chosen, values):
        """What is not chosen is left out: multiplied by 0 it could be NaN."""
        return values if chosen is None else torch.where(chosen, values, 0)

    def _weighed(self, u, by, chosen):
        """Products of what is chosen, or where all learn of all, as far as it is finite."""
        if not self.all_learn:
            return self._of_chosen(chosen, u * by)
        return (u if chosen is None else torch.where(chosen, u, u.nan_to_num(0, 0, 0))) * by

    def compose(self, x, gates, routing, factors_a, factors_b):
        u = (x @ self._stacked(factors_a, 0, x.dtype).T).to(gates.dtype)
        gated = self._weighed(u, *self._for_ranks(gates, routing)).to(x.dtype)
        return gated @ self._stacked(factors_b, 1, x.dtype).T

    def forward(self, x, gates, routing, factors_a, factors_b):
        u = x @ self._stacked(factors_a, 0, x.dtype).T
        gated = self._weighed(u.to(gates.dtype), *self._for_ranks(gates, routing)).to(x.dtype)
        return gated @ self._stacked(factors_b, 1, x.dtype).T, u

    def backward(self, grad, needs, x, gates, routing, u, factors_a, factors_b):
        of_ranks, chosen = self._for_ranks(gates, routing)
        u, grad_x, grad_gates, grad_a, grad_b = u.to(gates.dtype), None, None, None, None
        if needs.b:
            gated = self._weighed(u, of_ranks, chosen).to(x.dtype)
            grad_b = self.split(grad.T @ gated, factors_b, 1)
        if needs.x or needs.gates or needs.a:
            v = (grad @ self._stacked(factors_b, 1, x.dtype)).to(gates.dtype)
        if needs.gates:
            products = self._weighed(u, v, chosen)
            grad_gates = torch.zeros_like(gates).index_add(1, self.tensor, products)
        if needs.x or needs.a:
            grad_u = self._of_chosen(chosen, v * of_ranks).to(x.dtype)
            if needs.x:
                grad_x = grad_u @ self._stacked(factors_a, 0, x.dtype)
            if needs.a:
                grad_a = self.split(grad_u.T @ x, factors_a, 0)
        return grad_x, grad_gates, grad_a, grad_b


class Segmented(_Way):
    """``gates``: the weights of the slots, [tokens, slots]; the routing is that of a plan."""

    def __init__(self, ranks, device):
        super().__init__(ranks, device)
        self.max_rank = max(ranks)

    def _ranks_for_products(self, device):
        """Where the rows of each expert begin."""
        return torch.tensor([0, *itertools.accumulate(self.ranks)], device=device)

    def _transposed(self, factors_b, dtype):
        return self._stacked(factors_b, 1, dtype).t()

    def _of_rows(self, gates, order):
        """The gate of each row; of one without a slot, where all else is 0, any."""
        if gates.numel() == 0:
            return gates.new_zeros(order.shape[0], 1)
        return gates.flatten().index_select(0, order.clamp(min=0))[:, None]

    def compose(self, x, gates, routing, factors_a, factors_b):
        plan = *routing, self.tensor
        z = shrink(x, self._stacked(factors_a, 0, x.dtype), *plan, self.max_rank)
        gated = (z * self._of_rows(gates, routing[0])).to(x.dtype)
        return expand(gated, self._transposed(factors_b, x.dtype), *plan)

    def forward(self, x, gates, routing, factors_a, factors_b):
        plan = *routing, self.tensor
        z = shrink(x, self._stacked(factors_a, 0, x.dtype), *plan, self.max_rank)
        gated = (z * self._of_rows(gates, routing[0])).to(x.dtype)
        return expand(gated, self._transposed(factors_b, x.dtype), *plan), z

    def backward(self, grad, needs, x, gates, routing, z, factors_a, factors_b):
        plan, inverse = (*routing, self.tensor), routing[1]
        of_rows = self._of_rows(gates, routing[0])
        grad_x = grad_gates = grad_a = grad_b = None
        if needs.b:
            of_b = outer((z * of_rows).to(x.dtype), grad, *plan, self.size)
            grad_b = self.split(of_b.T, factors_b, 1)
        if needs.x or needs.gates or needs.a:
            b = self._transposed(factors_b, x.dtype)
            grad_gated = shrink(grad, b, *plan, self.max_rank).to(gates.dtype)
            del b
        if needs.gates:
            products = (z * grad_gated).sum(1)
            padded = torch.cat([products, products.new_zeros(1)])  # for slots without a row
            places = inverse.where(inverse >= 0, len(products)).flatten()
            grad_gates = padded.index_select(0, places).view(inverse.shape)
        if needs.x or needs.a:
            grad_z = (grad_gated * of_rows).to(x.dtype)
            if needs.x:
                grad_x = expand(grad_z, self._stacked(factors_a, 0, x.dtype), *plan)
            if needs.a:
                grad_a = self.split(outer(grad_z, x, *plan, self.size), factors_a, 0)
        return grad_x, grad_gates, grad_a, grad_b


# ---- the backward --------------------------------------------------------------------------------


class _Needs:
    def __init__(self, x, gates, *factors):
        half = len(factors) // 2
        self.x, self.gates = x, gates
        self.a, self.b = any(factors[:half]), any(factors[half:])


class _Mixture(Function):
    @staticmethod
    def forward(ctx, way, routing, x, gates, *factors):
        half = len(factors) // 2
        y, middle = way.forward(x, gates, routing, factors[:half], factors[half:])
        ctx.save_for_backward(x, gates, middle, *routing, *factors)
        ctx.way, ctx.parts = way, len(routing)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, gates, middle, *rest = ctx.saved_tensors
        routing, factors = rest[: ctx.parts], rest[ctx.parts :]
        half = len(factors) // 2
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *_composed(ctx.way, grad, needed, x, gates, routing, factors)
        grad_x, grad_gates, *grads = ctx.way.backward(
            grad, _Needs(*needed), x, gates, routing, middle, factors[:half], factors[half:]
        )
        of_factors = [
            gradient
            for of_all in grads
            for gradient in (of_all if of_all is not None else [None] * half)
        ]
        return None, None, grad_x, grad_gates, *of_factors


def _composed(way, grad, needed, x, gates, routing, factors):
    """The gradients, with derivatives of their own."""
    inputs = [value.view_as(value) for value in (x, gates, *factors)]
    half = len(factors) // 2
    y = way.compose(*inputs[:2], routing, inputs[2 : half + 2], inputs[half + 2 :])
    wanted = [value for value, need in zip(inputs, needed) if need]
    grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, materialize_grads=True))
    return [next(grads) if need else None for need in needed]


def is_plain(x, gates, factors):
    """Whether the ways' own forward and backward will do."""
    return (
        not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and is_unobserved((x, gates, *factors))
    )


def mixture(way, x, gates, routing, factors_a, factors_b):
    """By one of the two ways above."""
    factors = *factors_a, *factors_b
    if is_plain(x, gates, factors):
        if torch.is_grad_enabled() and any(value.requires_grad for value in (x, gates, *factors)):
            return _Mixture.apply(way, routing, x, gates, *factors)
        return way.forward(x, gates, routing, factors_a, factors_b)[0]
    return way.compose(x, gates, routing, factors_a, factors_b)
