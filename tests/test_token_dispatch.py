"""permute_tokens and combine_tokens: what is true of them beyond test_ops.py."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from cases.op_case import seeded
from cases.ops.token_dispatch import (
    combine_reference,
    order_and_inverse,
    permute_reference,
    plan_of,
    random_experts,
)
from torch_routers.ops import combine_tokens, permute_tokens

ORDER, INVERSE = order_and_inverse(random_experts(3, 2, empty=0.3, seed=3), spare=1)
PLAN = plan_of(ORDER, INVERSE)
ROWS, WEIGHTS = seeded(len(ORDER), 2), seeded(3, 2, seed=1)


def scalar(rows, weights):
    """In which every derivative of the sum counts."""
    y = combine_tokens(rows, weights, PLAN)
    return (y.sin() * torch.arange(1, y.numel() + 1).view(y.shape)).sum()


def expected_scalar(rows, weights):
    y = combine_reference(rows, weights, ORDER, INVERSE)["y"]
    return (y.sin() * torch.arange(1, y.numel() + 1).view(y.shape)).sum()


MODES = {"reverse": torch.func.jacrev, "forward": torch.func.jacfwd}


@pytest.mark.parametrize(
    "outer, inner", [("reverse", "reverse"), ("reverse", "forward"), ("forward", "reverse")]
)
def test_second_derivatives_in_rows_and_weights(outer, inner):
    outer, inner = MODES[outer], MODES[inner]
    actual = outer(inner(scalar, (0, 1)), (0, 1))(ROWS, WEIGHTS)
    expected = outer(inner(expected_scalar, (0, 1)), (0, 1))(ROWS, WEIGHTS)
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("outer", MODES.values(), ids=MODES)
def test_third_derivatives(outer):
    def third(function):
        return outer(torch.func.jacrev(torch.func.jacrev(function, (0, 1)), (0, 1)), (0, 1))

    actual, expected = third(scalar)(ROWS, WEIGHTS), third(expected_scalar)(ROWS, WEIGHTS)
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_tangents_through_a_gradient():
    """Forward mode over reverse, of one argument at a time: the others have no tangent."""
    for argument in 0, 1:
        for function in (0,), (1,), (0, 1):
            pairs = []
            for f in scalar, expected_scalar:

                def gradient(value, f=f, argument=argument, function=function):
                    inputs = [ROWS, WEIGHTS]
                    inputs[argument] = value
                    return torch.func.grad(f, function)(*inputs)

                value = (ROWS, WEIGHTS)[argument]
                pairs.append(torch.func.jvp(gradient, (value,), (value.cos(),))[1])
            assert_close(*pairs, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_a_zero_weight_is_the_inner_product():
    weights = torch.zeros_like(WEIGHTS, requires_grad=True)
    combine_tokens(ROWS, weights, PLAN).sum().backward()
    for t, j in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
        row = int(INVERSE[t, j])
        assert float(weights.grad[t, j]) == pytest.approx(float(ROWS[row].sum()) if row >= 0 else 0)


class Calls(TorchDispatchMode):
    """Names of this library's operators that are called, each with the sizes of its results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.namespace == "torch_routers":
            outputs = results if isinstance(results, tuple) else (results,)
            self.calls.append((func._schema.name, *(len(x) for x in outputs)))
        return results


@pytest.mark.parametrize(
    "of_rows, of_weights, call",
    [
        (True, False, ("torch_routers::permute_tokens", len(ORDER))),
        (False, True, ("torch_routers::_combine_backward", 0, 3)),
        (True, True, ("torch_routers::_combine_backward", len(ORDER), 3)),
    ],
)
def test_only_the_gradients_that_are_asked_for(of_rows, of_weights, call):
    rows = ROWS.clone().requires_grad_(of_rows)
    weights = WEIGHTS.clone().requires_grad_(of_weights)
    y = combine_tokens(rows, weights, PLAN).sum()
    with Calls() as mode:
        y.backward()
    assert mode.calls == [call]


def test_what_is_saved_for_backward():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        rows = permute_tokens(seeded(3, 2).requires_grad_(), PLAN)
        combine_tokens(rows, None, PLAN)
    assert all(x.dtype == torch.int64 for x in saved)


def test_a_slot_without_a_row_has_no_gradient():
    weights = WEIGHTS.where(INVERSE >= 0, torch.nan).requires_grad_()
    rows = ROWS.clone().requires_grad_()
    combine_tokens(rows, weights, PLAN).sum().backward()
    assert (weights.grad[INVERSE < 0] == 0).all()
    assert (rows.grad[ORDER < 0] == 0).all()
    assert rows.grad.isfinite().all() and weights.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_large_results(dtype):
    """More than the caches hold: written past them."""
    order, inverse = order_and_inverse(random_experts(2100, 4, empty=0.01), spare=3)
    plan, x = plan_of(order, inverse), seeded(2100, 1023).to(dtype).requires_grad_()
    weights = seeded(2100, 4, seed=1).float().requires_grad_()
    rows = permute_tokens(x, plan)
    places = torch.where(order >= 0, order // 4, 2100)
    assert torch.equal(rows, torch.cat([x, x.new_zeros(1, 1023)])[places])

    y = combine_tokens(rows, weights, plan)
    grad_rows, grad_weights = torch.autograd.grad(y.float().square().sum(), (rows, weights))
    grad = (2 * y.float()).to(dtype).float()
    live = order >= 0
    weight = torch.where(live, weights.flatten()[order.clamp(min=0)], 0)[:, None]
    assert torch.equal(grad_rows, (weight * grad[(order // 4).clamp(min=0)]).to(dtype))
    dots = (grad[(order // 4).clamp(min=0)] * rows.float()).sum(1)[live]
    assert_close(grad_weights.flatten()[order[live]], dots)


def test_permute_and_combine_are_transposed():
    x, y = seeded(3, 2), seeded(len(ORDER), 2, seed=5)
    left = (permute_tokens(x, PLAN) * y).sum()
    assert_close(left, (x * combine_tokens(y, None, PLAN)).sum())
    assert torch.equal(permute_tokens(x, PLAN), permute_reference(x, ORDER, INVERSE)["rows"])
