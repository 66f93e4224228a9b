"""Every property of a router, for every router. A case is all that a new one adds."""

import copy
import io
import json
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import cases.routers
import torch_routers as tr
from cases.router_case import EXPERTS, HIDDEN, inputs, padding

CASES = cases.collect(cases.routers)
every_router = pytest.mark.parametrize("case", CASES, ids=str)


def _first_of_each_class():
    seen = set()
    for case in CASES:
        kind = type(case.router())
        yield case if kind not in seen else pytest.param(case, marks=pytest.mark.slow)
        seen.add(kind)


#: Variants of a router compile in `test_layer_compiles_in_training`; more of it takes minutes.
every_class = pytest.mark.parametrize("case", list(_first_of_each_class()), ids=str)


def floats(routing):
    tensors = routing.tensors()
    return {name: x for name, x in tensors.items() if x.is_floating_point()}


def assert_same_bits(actual, expected):
    actual, expected = actual.tensors(), expected.tensors()
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(actual[name].nan_to_num(7), x.nan_to_num(7)), name


def experts_of(routing):
    """Each token's experts, one list after the other."""
    if routing.indices is not None:
        rows = routing.indices.reshape(-1, routing.indices.shape[-1]).tolist()
        return [[e for e in row if e >= 0] for row in rows]
    active = (routing.weights != 0).view(-1, routing.num_experts)
    return [row.nonzero().flatten().tolist() for row in active]


def weights_of(routing):
    """The weights of `experts_of`."""
    weights = routing.weights.reshape(-1, routing.weights.shape[-1])
    if routing.indices is not None:
        used = routing.indices.reshape(weights.shape) >= 0
        assert not weights[~used].any()
        return [row[slots] for row, slots in zip(weights, used)]
    return [row[experts] for row, experts in zip(weights, experts_of(routing))]


def parameter_gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


def train(moe, x, context, **options):
    """One backward of a task loss and the losses of the router."""
    y, routing = moe(x, return_routing=True, **context, **options)
    loss = tr.Router.full_precision(y).square().sum()
    (loss if routing.aux_loss is None else loss + routing.aux_loss).backward()
    return y, routing


# ---- decisions -----------------------------------------------------------------------------------


@every_router
def test_equals_a_loop_over_tokens(case):
    router, x = case.router(torch.float64), inputs(2, 9, dtype=torch.float64)
    context = case.context((2, 9))
    routing = router(x, **context)
    counts = torch.zeros(EXPERTS, dtype=torch.int64)
    for t, actual in enumerate(zip(experts_of(routing), weights_of(routing))):
        b, s = divmod(t, 9)
        of_token = {name: value[b, s] for name, value in context.items()}
        experts, weights = case.of_token(x[b, s], of_token, router)
        assert actual[0] == experts
        assert_close(actual[1], weights)
        counts[experts] += 1
    assert torch.equal(routing.counts, counts)


@every_router
def test_layer_equals_a_loop_over_tokens(case):
    moe, x = case.moe(torch.float64), inputs(2, 4, dtype=torch.float64)
    context = case.context((2, 4))
    y, routing = moe(x, return_routing=True, **context)
    for token in range(8):
        expected, row = torch.zeros_like(y[0, 0]), x.view(8, -1)[token]
        for weight, expert in zip(weights_of(routing)[token], experts_of(routing)[token]):
            expected = expected + weight * case.expert(moe.experts, expert, row)
        assert_close(y.view(8, -1)[token], expected)


@every_router
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0, 1e30])
def test_indices_are_always_distinct_and_in_range(case, value):
    x = inputs(7)
    clean = case.router()(x, **case.context((7,)))
    x[3, 5] = value
    routing = case.router()(x, **case.context((7,)))
    other = torch.arange(7) != 3
    if routing.indices is not None:
        assert ((routing.indices >= -1) & (routing.indices < EXPERTS)).all()
        assert all(len(set(row)) == len(row) > 0 for row in experts_of(routing))
        assert torch.equal(routing.indices[other], clean.indices[other])
    assert torch.equal(routing.weights[other], clean.weights[other])


@every_router
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (2, 0), (2, 3, 4)])
def test_leading_dimensions_are_kept(case, shape):
    moe, x = case.moe(), inputs(*shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, routing = train(moe, x, case.context(shape))
    assert y.shape == x.shape and y.dtype == x.dtype
    slots = EXPERTS if routing.indices is None else moe.router.top_k
    assert routing.weights.shape == (*shape, slots) and routing.weights.dtype == torch.float32
    if routing.indices is not None:
        assert routing.indices.shape == (*shape, slots) and routing.indices.dtype == torch.int64
    assert routing.counts.shape == (EXPERTS,) and routing.num_experts == EXPERTS
    assert routing.counts.sum() == sum(map(len, experts_of(routing)))
    for parameter in moe.parameters():
        assert parameter.grad.isfinite().all()


@every_router
def test_batch_dependency_is_as_declared(case):
    """In eval a router that declares none routes a token alone as it does in any batch."""
    router = case.router().eval()
    assert router.traits.batch_dependency == "none", (
        "a router that depends needs a test that it does"
    )
    x, context = inputs(257), case.context((257,))
    together = router(x, **context)
    order = torch.randperm(257)
    for rows in [order, *(order[:n] for n in (1, 2, 3, 7, 8, 31, 64, 65))]:
        alone = router(x[rows], **{name: value[rows] for name, value in context.items()})
        if alone.indices is not None:
            assert torch.equal(alone.indices, together.indices[rows])
        # To rounding only: the product with the weight is torch's.
        assert_close(alone.weights, together.weights[rows], rtol=1e-5, atol=1e-6)


# ---- masks ---------------------------------------------------------------------------------------


@every_router
def test_padding_content_changes_nothing(case):
    """Not a bit of a result or a gradient, NaN included."""
    mask, results = padding(3, 7), []
    for content in 0.0, 1e4, torch.nan, torch.inf:
        moe, x = case.moe(), inputs(3, 7)
        x[~mask] = content
        context = case.context((3, 7))
        context = {
            name: value.where(mask.view(3, 7, *[1] * (value.dim() - 2)), 5)
            for name, value in context.items()
        }
        y, routing = train(moe, x, context, valid_mask=mask)
        assert (y[~mask] == 0).all() and (routing.weights[~mask] == 0).all()
        assert routing.indices is None or (routing.indices[~mask] == -1).all()
        results.append((y, routing, parameter_gradients(moe)))
    y, routing, gradients = results[0]
    for other_y, other, other_gradients in results[1:]:
        assert torch.equal(y, other_y)
        assert torch.equal(routing.weights, other.weights)
        assert experts_of(routing) == experts_of(other)
        assert torch.equal(routing.counts, other.counts)
        assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)
        if routing.aux_loss is not None:
            assert torch.equal(routing.aux_loss, other.aux_loss)
            assert routing.losses == other.losses


@every_router
def test_masked_equals_compacted(case):
    mask, x, context = padding(3, 7), inputs(3, 7), case.context((3, 7))
    masked, compacted = case.moe(), case.moe()
    y, routing = train(masked, x, context, valid_mask=mask)
    rows = {name: value[mask] for name, value in context.items()}
    y_rows, routing_rows = train(compacted, x[mask], rows)
    assert_close(y[mask], y_rows, rtol=1e-5, atol=1e-6)
    if routing.indices is not None:
        assert torch.equal(routing.indices[mask], routing_rows.indices)
    assert torch.equal(routing.counts, routing_rows.counts)
    assert_close(routing.aux_loss, routing_rows.aux_loss, rtol=1e-6, atol=1e-6)
    assert_close(parameter_gradients(masked), parameter_gradients(compacted), rtol=1e-4, atol=1e-5)


@every_router
def test_everything_masked(case):
    moe, mask = case.moe(), torch.zeros(2, 3, dtype=torch.bool)
    y, routing = train(moe, inputs(2, 3), case.context((2, 3)), valid_mask=mask)
    assert (y == 0).all() and routing.counts.sum() == 0
    assert all(float(value) == 0 for value in routing.losses.values())
    assert all((p.grad == 0).all() for p in moe.parameters())


# ---- precision -----------------------------------------------------------------------------------


@every_router
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_a_decision(case, dtype):
    router, x, context = case.router(), inputs(512).to(dtype), case.context((512,))
    expected = router(x.float(), **context)
    with torch.autocast("cpu", dtype=dtype):
        actual = router(x, **context)
    assert_same_bits(actual, expected)
    assert all(value.dtype == torch.float32 for value in floats(actual).values())


@every_router
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_any_dtype(case, dtype):
    moe, x = case.moe().to(dtype), inputs(5).to(dtype)
    y, routing = train(moe, x, case.context((5,)))
    assert y.dtype == dtype
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(value.dtype == expected for value in floats(routing).values())
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in moe.parameters())


@every_router
def test_layer_under_autocast(case):
    moe, x, context = case.moe(), inputs(64), case.context((64,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = train(moe, x, context)
    assert_same_bits(
        routing._replace(aux_loss=None), case.router()(x, **context)._replace(aux_loss=None)
    )
    assert_close(y, case.moe()(x, return_routing=True, **context)[0], rtol=0.05, atol=0.05)


# ---- training ------------------------------------------------------------------------------------


@every_router
def test_every_trainable_tensor_gets_a_gradient(case):
    moe = case.moe()
    x = inputs(64).requires_grad_()
    y, _ = moe(x, return_routing=True, **case.context((64,)))
    y.square().sum().backward()
    for name, parameter in [("x", x), *moe.named_parameters()]:
        learns = case.learns_from_task or not name.startswith("router")
        assert parameter.grad is not None and bool(parameter.grad.any()) == learns, name


@every_router
def test_losses_alone_train_the_router(case):
    moe = case.moe()
    if not moe.router.losses:
        assert not list(moe.router.parameters()), "a router that learns takes losses"
        return
    attached = tr.attach(moe)
    attached(moe(inputs(64), **case.context((64,))).square().sum() * 0).backward()
    for name, parameter in moe.router.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == (name not in case.beyond_losses), name


@every_router
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_nothing(case, use_reentrant):
    results = []
    for run in (lambda f, x: f(x)), partial(checkpoint, use_reentrant=use_reentrant):
        moe, x = case.moe(), inputs(64).requires_grad_()
        attached = tr.attach(moe)
        y = run(partial(moe, **case.context((64,))), x)
        attached(y.square().sum()).backward()
        results.append((y, x.grad, *parameter_gradients(moe).values()))
    for plain, checkpointed in zip(*results):
        assert torch.equal(plain, checkpointed)


@every_router
def test_repeats_itself(case):
    context = case.context((300,))
    first, second = (train(case.moe(), inputs(300), context)[1] for _ in range(2))
    assert_same_bits(first, second)


# ---- compilation and transforms ------------------------------------------------------------------


@every_class
def test_compiles_for_any_number_of_tokens(case):
    router = case.router()
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(inputs(5), **case.context((5,)))
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in 7, 64, 130:
            x, context = inputs(tokens), case.context((tokens,))
            routing = compiled(x, **context)
            assert isinstance(routing, tr.Routing)
            assert_same_bits(routing, router(x, **context))


@every_class
def test_recompiles_once_at_most_when_tokens_change(case):
    router = case.router()
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    for tokens in 5, 7:
        compiled(inputs(tokens), **case.context((tokens,)))
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(inputs(64), **case.context((64,)))


@every_router
def test_layer_compiles_in_training(case):
    x, context, mask = inputs(3, 7), case.context((3, 7)), padding(3, 7)
    eager, to_compile = case.moe(), case.moe()
    compiled = torch.compile(to_compile, fullgraph=True, backend="aot_eager")
    y, routing = train(compiled, x, context, valid_mask=mask)
    expected_y, expected = train(eager, x, context, valid_mask=mask)
    assert torch.equal(y, expected_y)
    assert_same_bits(routing, expected)
    assert_close(parameter_gradients(to_compile), parameter_gradients(eager))


@every_class
def test_layer_compiles_with_inductor(case):
    moe, x, context = case.moe().eval(), inputs(64), case.context((64,))
    assert_close(torch.compile(moe, fullgraph=True)(x, **context), moe(x, **context))


class ByPosition(nn.Module):
    """Context by position: torch.export cannot name dynamic shapes of further keywords."""

    def __init__(self, moe, names):
        super().__init__()
        self.moe, self.names = moe, names

    def forward(self, x, *values):
        return self.moe(x, **dict(zip(self.names, values)))


@every_class
def test_exports(case):
    context = case.context((6,))
    module = ByPosition(case.moe(), list(context)).eval()
    tokens = {0: torch.export.Dim("tokens", min=2)}
    shapes = {"x": tokens, "values": (tokens,) * len(context)} if context else {"x": tokens}
    args = (inputs(6), *context.values())
    program = torch.export.export(module, args, dynamic_shapes=shapes)
    args = (inputs(9), *case.context((9,)).values())
    assert_close(program.module()(*args), module(*args))


def test_compiles_ahead_of_time(tmp_path):
    """The operators are called by name from a program that inductor wrote."""
    case = next(case for case in CASES if case.name == "top-2")
    moe, tokens = case.moe().eval(), torch.export.Dim("tokens", min=2)
    program = torch.export.export(moe, (inputs(6),), dynamic_shapes={"x": {0: tokens}})
    path = str(tmp_path / "moe.pt2")
    loaded = torch._inductor.aoti_load_package(
        torch._inductor.aoti_compile_and_package(program, package_path=path)
    )
    for count in 6, 17:
        assert_close(loaded(inputs(count)), moe(inputs(count)))


@every_router
def test_maps_over_a_batch(case):
    moe, x, context = case.moe(), inputs(3, 6), case.context((3, 6))
    names, values = list(context), list(context.values())

    def tensors(x, *values):
        y, routing = moe(x, return_routing=True, **dict(zip(names, values)))
        return {"y": y, **routing.tensors()}

    batched = torch.func.vmap(tensors)(x, *values)
    for b in range(3):
        alone = tensors(x[b], *(value[b] for value in values))
        assert_close({name: value[b] for name, value in batched.items()}, alone)


@every_router
def test_functional_call_differentiates(case):
    moe, x, context = case.moe(torch.float64), inputs(6, dtype=torch.float64), case.context((6,))
    parameters = {name: p.detach() for name, p in moe.named_parameters()}

    def loss(parameters):
        options = {"return_routing": True, **context}
        y, routing = torch.func.functional_call(moe, parameters, (x,), options)
        return y.square().sum() + (0 if routing.aux_loss is None else routing.aux_loss)

    actual = torch.func.grad(loss)(parameters)
    train(moe, x, context)
    expected = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in moe.named_parameters()
    }
    assert_close(actual, expected)


# ---- state and configuration ---------------------------------------------------------------------


@every_router
def test_state_is_plain_data(case):
    buffer = io.BytesIO()
    router, other = case.router(), case.router()
    for tensor in other.state_dict().values():
        tensor.zero_()
    torch.save(router.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x, context = inputs(9), case.context((9,))
    assert_same_bits(other(x, **context), router(x, **context))


@every_router
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_decide_alike(case, copied):
    router, x, context = case.router(), inputs(9), case.context((9,))
    assert_same_bits(copied(router)(x, **context), router(x, **context))


@every_router
def test_meta_then_empty(case):
    with torch.device("meta"):
        router = case.make()
    router = router.to_empty(device="cpu")
    router.reset_parameters()
    routing = router(inputs(9), **case.context((9,)))
    assert routing.weights.isfinite().all()


@every_router
def test_configuration_makes_the_round_trip_through_json(case):
    router = case.router()
    config = json.loads(json.dumps(router.config()))
    again = tr.from_config(config)
    assert type(again) is type(router) and again.config() == router.config()
    again.load_state_dict(router.state_dict())
    x, context = inputs(9), case.context((9,))
    assert_same_bits(again(x, **context), router(x, **context))
    assert config["class"] in tr.list_routers()
    assert config["class"] in repr(router)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, arguments, message",
    [pytest.param(case, *error, id=error[1][:60]) for case in CASES for error in case.errors],
)
def test_constructor_says_what_is_wrong(case, arguments, message):
    with pytest.raises(ValueError) as info:
        type(case.router())(**arguments)
    assert str(info.value) == message


@pytest.mark.parametrize(
    "case, arguments, message",
    [pytest.param(case, *error, id=error[1][:60]) for case in CASES for error in case.call_errors],
)
def test_call_says_what_is_wrong(case, arguments, message):
    with pytest.raises(ValueError) as info:
        case.router()(inputs(2, 3), **case.context((2, 3)) | arguments)
    assert str(info.value) == message


@every_router
def test_refuses_what_no_router_knows(case):
    router, context, name = case.router(), case.context((2, 3)), type(case.router()).__name__
    with pytest.raises(ValueError, match=f"{name}: expected context among .*, got 'token_idx'"):
        router(inputs(2, 3), **context, token_idx=torch.zeros(2, 3))
    facts = {"row_ids": torch.arange(6), "task_ids": torch.zeros(2)} | context
    assert_same_bits(router(inputs(2, 3), **facts), router(inputs(2, 3), **context))
    for x in torch.zeros(()), torch.zeros(2, 3, HIDDEN, dtype=torch.int64):
        with pytest.raises(ValueError, match=f"{name}: expected x in a floating dtype of shape"):
            router(x, **context)
    for mask in torch.ones(2, 3), torch.ones(3, dtype=torch.bool):
        with pytest.raises(
            ValueError, match=rf"{name}: expected valid_mask in bool of shape \[2, 3\]"
        ):
            router(inputs(2, 3), **context, valid_mask=mask)


def test_every_router_has_a_case():
    tested = {type(case.router()).__name__ for case in CASES}
    shipped = {name for name in tr.list_routers() if hasattr(tr, name)}
    # Who always draws random numbers in training, or looks at whole sequences, is not as the
    # others: test_noisy_topk.py, test_smear.py.
    apart = {"NoisyTopKRouter", "SMEARRouter"}
    assert tested == shipped - apart


def test_hidden_size_is_checked():
    with pytest.raises(
        ValueError, match=rf"expected x of shape \[..., hidden_size={HIDDEN}\], got"
    ):
        tr.TopKRouter(HIDDEN, 4, 2)(torch.zeros(3, HIDDEN + 1))
