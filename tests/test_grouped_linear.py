"""What is true of grouped_linear alone: its engines."""

import pytest
import torch
from torch.testing import assert_close

from torch_routers.ops import grouped_linear

ENGINES = "native", "mm", "grouped_mm", None
OFFSETS = torch.tensor([0, 2, 2, 20, 21, 51])  # an empty expert; 3 rows of none


def inputs(dtype=torch.float32, rows=54, experts=5, out=8, features=16):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, features), (experts, out, features), (experts, out)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    tensors[0][-3:] = torch.nan
    return [x.requires_grad_() for x in tensors]


def derivatives(engine, dtype):
    """Result, gradients, and gradients of a function of the gradients."""
    x, weight, bias = inputs(dtype)
    y = grouped_linear(x, weight, OFFSETS, bias, engine=engine)
    first = torch.autograd.grad(y.sin().sum(), (x, weight, bias), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight, bias))
    return y, *first, *second


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_agree_in_every_derivative(engine, dtype):
    tolerance = 40 * torch.finfo(dtype).eps
    expected = derivatives("native", torch.float64) if dtype == torch.float32 else None
    expected = expected or derivatives("native", dtype)
    for actual, exact in zip(derivatives(engine, dtype), expected):
        scale = float(exact.detach().abs().max())
        assert_close(actual.to(exact.dtype), exact, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_of_no_expert_are_zero_and_without_gradient(engine):
    x, weight, bias = inputs()
    y = grouped_linear(x, weight, OFFSETS, bias, engine=engine)
    assert torch.equal(y[-3:], torch.zeros(3, 8))
    grads = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert torch.equal(grads[0][-3:], torch.zeros(3, 16))
    assert all(torch.equal(g[1], torch.zeros_like(g[1])) for g in grads[1:])  # the empty expert
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("engine", ENGINES[:3])
def test_forward_mode(engine):
    x, weight, bias = (t.detach().nan_to_num() for t in inputs())

    def function(*args):
        return grouped_linear(args[0], args[1], OFFSETS, args[2], engine=engine)

    tangents = x.cos(), weight.cos(), bias.cos()
    _, actual = torch.func.jvp(function, (x, weight, bias), tangents)
    expected = function(x, tangents[1], tangents[2]) + function(tangents[0], weight, 0 * bias)
    assert_close(actual, expected)


@pytest.mark.parametrize("x", [
    torch.randn(1, 33)[:, :32], torch.randn(65)[1:33][None], torch.randn(3, 33)[:, 1:],
    torch.randn(32, 3).t(), torch.randn(1, 32).expand(3, 32),
])  # fmt: skip
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_takes_every_layout(engine, x):
    offsets = torch.tensor([0, len(x)])
    for weight in (
        torch.randn(1, 8, 33)[..., 1:],
        torch.randn(1, 32, 8).mT,
        torch.randn(32, 8, 1).permute(2, 1, 0),
    ):
        y = grouped_linear(x, weight, offsets, engine=engine)
        assert_close(y, x @ weight[0].t(), rtol=0, atol=1e-5)


def test_every_expert_has_the_engine_for_its_rows():
    """The rows of an expert decide for it alone: those of others change no bit of it."""
    x, weight = torch.randn(404, 128), torch.randn(2, 256, 128)
    offsets = torch.tensor([0, 4, 404])
    few, many = (grouped_linear(x, weight, offsets, engine=e) for e in ("native", "mm"))
    assert torch.equal(grouped_linear(x, weight, offsets), torch.cat([few[:4], many[4:]]))


def test_native_rows_do_not_depend_on_each_other():
    x, weight, bias = torch.randn(33, 70), torch.randn(1, 19, 70), torch.randn(1, 19)

    def native(x):
        offsets = torch.tensor([0, len(x)])
        return grouped_linear(x, weight, offsets, bias, engine="native")

    assert torch.equal(native(x), torch.cat([native(row[None]) for row in x]))


def test_gradient_of_the_bias_does_not_depend_on_threads():
    grads, threads = [], torch.get_num_threads()
    x, weight, bias = torch.randn(5000, 3), torch.randn(2, 40, 3), torch.zeros(2, 40)
    try:
        for count in 1, 2, 3:
            torch.set_num_threads(count)
            bias.requires_grad_().grad = None
            y = grouped_linear(x, weight, torch.tensor([0, 3000, 5000]), bias, engine="mm")
            (y * torch.linspace(0, 1, 40)).sum().backward()
            grads.append(bias.grad)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_biases_in_autocast():
    x, weight, bias = (t.detach() for t in inputs())
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, weight, OFFSETS, bias)
    expected = [t.bfloat16() for t in (x, weight, bias)]
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, grouped_linear(*expected[:2], OFFSETS, expected[2]))
