"""`differentiable()`: one set of formulas, right on every route to the operator.

The operator here has all that an operator may have: several results, of which one has no
derivative, an optional tensor, arguments that are no tensors. Its kernels are written in Python, so
that only the routes are tested. What the real operators compute is in test_ops.py.
"""

import weakref
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from torch_routers._autograd import differentiable, jvp
from torch_routers.ops import topk_gate

# ---- the operator --------------------------------------------------------------------------------

library = torch.library.Library("test_differentiable", "FRAGMENT")
library.define(
    "gate(Tensor x, Tensor? bias, int slots, str kind, float scale) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "_gate_backward(Tensor grad_weights, Tensor grad_lse, Tensor x, Tensor? bias,"
    " Tensor indices, float scale) -> (Tensor, Tensor)"
)
op, backward_op = (
    getattr(torch.ops.test_differentiable, name).default for name in ("gate", "_gate_backward")
)
needed = []  # by the last backward


def biased(x, bias):
    return x if bias is None else x + bias


def plain(x, bias, indices, scale):
    z = biased(x, bias)
    return scale * z.gather(1, indices).softmax(1), z.logsumexp(1)


def plain_backward(grad_weights, grad_lse, x, bias, indices, scale):
    bias = torch.zeros_like(x[0]) if bias is None else bias
    _, vjp = torch.func.vjp(lambda x, bias: plain(x, bias, indices, scale), x, bias)
    return vjp((grad_weights, grad_lse))


@torch.library.impl(library, "gate", "CPU")
def gate_kernel(x, bias, slots, kind, scale):
    assert kind == "softmax"
    indices = biased(x, bias).topk(slots).indices
    return *plain(x, bias, indices, scale), indices


@torch.library.impl(library, "_gate_backward", "CPU")
def gate_backward_kernel(grad_weights, grad_lse, x, bias, indices, scale):
    z = biased(x, bias)
    q = z.gather(1, indices).softmax(1)
    grad = scale * q * (grad_weights - (q * grad_weights).sum(1, keepdim=True))
    grad = grad_lse[:, None] * z.softmax(1) + torch.zeros_like(z).scatter(1, indices, grad)
    return grad, grad.sum(0)


@torch.library.register_fake(op)
def gate_fake(x, bias, slots, kind, scale):
    weights = x.new_empty(x.shape[0], slots)
    return weights, x.new_empty(x.shape[0]), torch.empty_like(weights, dtype=torch.int64)


@torch.library.register_fake(backward_op)
def gate_backward_fake(grad_weights, grad_lse, x, bias, indices, scale):
    return torch.empty_like(x), torch.empty_like(x[0])


def one_by_one(function):
    def vmap(info, in_dims, *inputs):
        outputs = zip(
            *(
                function(*(x if d is None else x.select(d, i) for x, d in zip(inputs, in_dims)))
                for i in range(info.batch_size)
            )
        )
        stacked = tuple(map(torch.stack, outputs))
        return stacked, (0,) * len(stacked)

    return vmap


def setup_backward(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def double_backward(ctx, *grads):
    *inputs, indices = ctx.saved_tensors
    optional = inputs[3] is None
    inputs = inputs[:3] if optional else inputs
    _, vjp = torch.func.vjp(
        lambda gw, gl, x, bias=None: plain_backward(gw, gl, x, bias, indices, ctx.scale), *inputs
    )
    return *vjp(grads), *[None] * (2 + optional)


def setup(ctx, inputs, output):
    x, bias, _, _, ctx.scale = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, bias, output[2])


def backward(ctx, grad_weights, grad_lse, _):
    needed[:] = ctx.needs_input_grad
    grad_x, grad_bias = gate_backward(grad_weights, grad_lse, *ctx.saved_tensors, ctx.scale)
    return grad_x, grad_bias if ctx.needs_input_grad[1] else None, None, None, None


def gate_jvp(ctx, *tangents):
    *inputs, indices = ctx.saved_tensors
    pairs = [(x, t) for x, t in zip(inputs, tangents) if x is not None]
    return *jvp(lambda x, bias=None: plain(x, bias, indices, ctx.scale), *zip(*pairs)), None


def gate_backward_jvp(ctx, *tangents):
    *inputs, indices = ctx.saved_tensors
    pairs = [(x, t) for x, t in zip(inputs, tangents) if x is not None]
    return jvp(
        lambda gw, gl, x, bias=None: plain_backward(gw, gl, x, bias, indices, ctx.scale),
        *zip(*pairs),
    )


gate_backward = differentiable(
    backward_op,
    setup_context=setup_backward,
    backward=double_backward,
    jvp=gate_backward_jvp,
    vmap=one_by_one(lambda *inputs: gate_backward(*inputs)),
)
gate = differentiable(
    op,
    setup_context=setup,
    backward=backward,
    jvp=gate_jvp,
    vmap=one_by_one(lambda *inputs: gate(*inputs)),
    autocast=torch.float32,
)

# ---- the cases: a function of the op's differentiable results, and the same in PyTorch -----------


def gate_reference(x, bias):
    z = biased(x, bias)
    return (0.5 * z.topk(3).values.softmax(1)).sin().sum(1) * z.logsumexp(1)


def of_gate(x, bias):
    weights, lse, _ = gate(x, bias, 3, "softmax", 0.5)
    return weights.sin().sum(1) * lse


CASES = {
    "topk_gate": (lambda x: topk_gate(x, 3)[0], lambda x: x.topk(3).values.softmax(1)),
    "gate": (lambda x: of_gate(x, x[0].cos()), lambda x: gate_reference(x, x[0].cos())),
    "gate_without_bias": (lambda x: of_gate(x, None), lambda x: gate_reference(x, None)),
}
cases = pytest.mark.parametrize("actual, expected", CASES.values(), ids=CASES)


def sample(seed=0, dtype=torch.float64):
    return torch.randn(4, 7, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def grad(f, x):
    x = x.detach().requires_grad_()
    f(x).sin().sum().backward()
    return x.grad


def route(x):
    """The route that a call takes, by the class of the node it leaves in the graph."""
    node = topk_gate(x, 2)[0].grad_fn
    while node is not None and node.name().startswith("ViewBackward"):
        node = node.next_functions[0][0]
    if node is None:
        return "none"
    return "registered" if node.name().startswith("GeneratedBackwardFor") else "short"


# ---- eager ---------------------------------------------------------------------------------------


@cases
def test_derivatives(actual, expected):
    x = sample().requires_grad_()
    assert_close(actual(x), expected(x))
    assert torch.autograd.gradcheck(actual, x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(actual, x)
    assert torch.autograd.gradcheck(actual, x, check_forward_ad=True)


TANGENT = sample(1)
TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x.flip(1)])),
    "vmap-last": lambda f, x: torch.func.vmap(f, in_dims=-1)(torch.stack([x, x.flip(1)], -1)),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sin().sum())(x),
    "grad-grad": lambda f, x: torch.func.grad(
        lambda x: torch.func.grad(lambda x: f(x).sin().sum())(x).sin().sum()
    )(x),
    "vmap-grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sin().sum()))(
        torch.stack([x, x.flip(1)])
    ),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (TANGENT,))[1],
    "jvp-grad": lambda f, x: torch.func.jvp(
        torch.func.grad(lambda x: f(x).sin().sum()), (x,), (TANGENT,)
    )[1],
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sin().sum())(x),
}


@cases
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(actual, expected, transform):
    assert_close(transform(actual, sample()), transform(expected, sample()))


@cases
def test_dual_level(actual, expected):
    def tangent(f):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(sample(), TANGENT))).tangent

    assert_close(tangent(actual), tangent(expected))


@cases
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(actual, expected, use_reentrant):
    def recomputed(x):
        return checkpoint(actual, x, use_reentrant=use_reentrant)

    assert_close(grad(recomputed, sample()), grad(actual, sample()), rtol=0, atol=0)


def gate_of(x, bias):
    return of_gate(x, bias).sum()


@pytest.mark.parametrize(
    "first_derivative",
    [
        lambda x, bias: gate_of(x, bias).backward(),
        lambda x, bias: torch.compile(gate_of, backend="aot_eager")(x, bias).backward(),
        lambda x, bias: torch.func.grad(gate_of, argnums=1)(x.detach(), bias.detach()),
    ],
    ids=["eager", "compile", "func"],
)
def test_only_what_is_needed(first_derivative):
    first_derivative(sample(), sample()[0].requires_grad_())
    assert needed == [False, True, False, False, False]


@pytest.mark.parametrize(
    "call",
    [gate, op, torch.compile(gate, backend="aot_eager")],
    ids=["short", "registered", "compile"],
)
def test_some_results_have_no_derivative(call):
    results = call(sample().requires_grad_(), None, 3, "softmax", 0.5)
    assert [result.requires_grad for result in results] == [True, True, False]


def test_saved_tensors_are_freed():
    x = sample().requires_grad_()
    y = x * 2
    saved = weakref.ref(y)
    weights, *_ = topk_gate(y, 2)
    del y
    loss = weights.sum()
    assert saved() is not None
    loss.backward()
    assert saved() is None
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad(mode):
    with mode():
        weights, indices, _ = topk_gate(sample().requires_grad_(), 2)
    assert not weights.requires_grad
    assert weights.is_inference() == (mode is torch.inference_mode)
    assert_close(indices, sample().topk(2).indices)


# ---- the routes ----------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def test_route():
    x = sample().requires_grad_()
    assert route(x) == route(torch.nn.Parameter(x)) == "short"
    assert route(sample()) == "none"
    fake = torch._subclasses.FakeTensorMode()
    assert route(fake.from_tensor(x)) == "registered"
    with fake, torch.utils.flop_counter.FlopCounterMode(display=False):
        assert route(torch.empty(4, 7, requires_grad=True)) == "registered"
    with torch.device("cpu"):  # a mode for functions
        assert route(x) == "registered"
    graph = torch.jit.trace(lambda x: topk_gate(x, 2)[:2], (x,)).graph
    assert "torch_routers::topk_gate" in {node.kind() for node in graph.nodes()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: TwoTensor(x, x.clone()),
        lambda x: x.clone().as_subclass(Subclass),
    ],
    ids=["dispatch", "function"],
)
@cases
def test_subclass(actual, expected, wrap):
    x = wrap(sample()).requires_grad_()
    y = actual(x)
    assert type(y) is type(x)
    y.sin().sum().backward()
    inner = x.grad.b if isinstance(x, TwoTensor) else x.grad
    assert_close(inner, grad(expected, sample()))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="a build without distributed")
def test_dtensor_says_that_there_is_no_sharding_rule():
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        for x in sample(), sample().requires_grad_():
            with pytest.raises(NotImplementedError, match="sharding strategy"):
                topk_gate(DTensor.from_local(x, mesh, [Shard(0)]), 2)
    finally:
        torch.distributed.destroy_process_group()


def test_meta():
    weights, indices, _ = topk_gate(torch.empty(4, 7, device="meta", requires_grad=True), 2)
    assert weights.is_meta and weights.shape == indices.shape == (4, 2) and weights.requires_grad
    with pytest.raises(ValueError, match=r"expected top_k in \[1, num_experts=7\], got 8"):
        topk_gate(torch.empty(4, 7, device="meta"), 8)


# ---- autocast: the float32 rule, and no cast that a derivative misses ----------------------------


def low(x):
    """The loss in autocast of a half-precision input."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, lse, _ = gate(x, None, 3, "softmax", 0.5)
        assert weights.dtype == lse.dtype == torch.float32
        return (weights.sin().sum(1) * lse).sin().sum()


AUTOCAST = {
    "eager": lambda x: torch.autograd.grad(low(x), x)[0],
    "compile": lambda x: torch.autograd.grad(torch.compile(low, backend="aot_eager")(x), x)[0],
    "grad": lambda x: torch.func.grad(low)(x.detach()),
    "vmap-grad": lambda x: torch.func.vmap(torch.func.grad(low))(x.detach()[None])[0],
    "jacfwd": lambda x: torch.func.jacfwd(low)(x.detach()),
}


@pytest.mark.parametrize("derivative", AUTOCAST.values(), ids=AUTOCAST)
def test_autocast(derivative):
    x = sample(dtype=torch.bfloat16).requires_grad_()
    assert_close(derivative(x).bfloat16(), grad(lambda x: gate_reference(x.float(), None), x))
    with torch.no_grad():
        low(x)


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert topk_gate(sample(), 2)[0].dtype == torch.float64


# ---- torch.compile, torch.export, opcheck --------------------------------------------------------


@cases
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(actual, expected, dynamic):
    compiled = torch.compile(actual, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for x in sample(), torch.cat([sample(1), sample(2)]):
        assert_close(grad(compiled, x), grad(expected, x))
    with torch.no_grad():
        assert_close(compiled(x), expected(x))


def test_transforms_in_compile():
    """What torch.compile cannot trace it says, or leaves to eager; never a zero derivative."""
    actual, expected = CASES["topk_gate"]
    compiled = torch.compile(torch.func.vmap(actual), fullgraph=True, backend="aot_eager")
    assert_close(compiled(sample()[None]), expected(sample())[None])

    derivative = TRANSFORMS["jvp"]
    assert_close(
        torch.compile(lambda x: derivative(actual, x), backend="aot_eager")(sample()),
        derivative(expected, sample()),
    )
    for derivative in TRANSFORMS["jvp"], TRANSFORMS["grad"]:
        compiled = torch.compile(partial(derivative, actual), fullgraph=True, backend="aot_eager")
        with pytest.raises(RuntimeError):
            compiled(sample())
        torch.compiler.reset()


@cases
@pytest.mark.parametrize("strict", [False, True])
def test_export(actual, expected, strict):
    class Module(torch.nn.Module):
        def forward(self, x):
            return actual(x)

    shapes = {"x": {0: torch.export.Dim("tokens", min=2)}}
    program = torch.export.export(Module(), (sample(),), dynamic_shapes=shapes, strict=strict)
    assert any("gate" in str(node.target) for node in program.graph.nodes)
    x = torch.cat([sample(1), sample(2)])
    assert_close(program.module()(x), expected(x))
    assert_close(grad(program.module(), x), grad(expected, x))


@pytest.mark.parametrize("bias", [None, sample()[0]])
def test_opcheck(bias):
    x = sample().requires_grad_()
    torch.library.opcheck(op, (x, bias, 3, "softmax", 0.5))
    weights, lse, indices = op(x.detach(), bias, 3, "softmax", 0.5)
    torch.library.opcheck(backward_op, (weights.requires_grad_(), lse, x, bias, indices, 0.5))
