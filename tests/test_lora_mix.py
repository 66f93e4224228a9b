"""What is true of lora_mix alone: its ways, what it keeps, and who learns."""

import itertools
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from cases.op_case import seeded
from torch_routers.ops import lora_mix

WAYS = "stacked", "segmented"
RANKS = [3, 0, 2, 5, 1]
IN, OUT, TOKENS, SLOTS = 7, 6, 12, 2
F64 = torch.float64


def problem(dtype=F64, ranks=RANKS, tokens=TOKENS, slots=SLOTS):
    """x, factors, weights and indices; experts 0 and 3 alone, and some empty slots."""
    x = seeded(tokens, IN, seed=1).to(dtype).requires_grad_()
    a = [seeded(r, IN, seed=10 + e).to(dtype).requires_grad_() for e, r in enumerate(ranks)]
    b = [seeded(OUT, r, seed=30 + e).to(dtype).requires_grad_() for e, r in enumerate(ranks)]
    weights = seeded(tokens, slots, seed=2).sigmoid().to(dtype).requires_grad_()
    indices = torch.tensor([[0, 3], [3, -1], [3, 0], [-1, -1]]).repeat(tokens // 4 + 1, 1)
    return x, a, b, weights, indices[:tokens, :slots]


def loop(x, a, b, weights, indices):
    """Expert by expert, as a `ModuleList` of LoRAs would."""
    y = 0
    for e in range(len(a)):
        gate = (weights * (indices == e)).sum(-1, keepdim=True)
        y = y + gate * (x @ a[e].T @ b[e].T)
    return y


def of_all_experts(weights, indices):
    experts = len(RANKS)
    places = indices.where(indices >= 0, experts)
    return weights.new_zeros(len(weights), experts + 1).scatter_add(1, places, weights)[:, :-1]


@pytest.mark.parametrize("way", [*WAYS, None])
@pytest.mark.parametrize("dense", [False, True])
def test_is_the_loop_over_experts(way, dense):
    x, a, b, weights, indices = problem()
    inputs = [x, weights, *a, *b]
    routing = (of_all_experts(weights, indices), None) if dense else (weights, indices)
    y = lora_mix(x, a, b, *routing, strategy=way)
    expected = loop(x, a, b, weights, indices)
    assert_close(y, expected)
    actual = torch.autograd.grad(y.sin().sum(), inputs)
    of_loop = torch.autograd.grad(expected.sin().sum(), inputs)
    assert_close(actual, of_loop)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_gradients(way):
    x, a, b, weights, indices = problem()
    inputs = [x, weights, *a, *b]

    def second(function):
        y = function(x, a, b, weights, indices)
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    assert_close(second(lambda *args: lora_mix(*args, strategy=way)), second(loop))


@pytest.mark.parametrize("way", WAYS)
def test_a_factor_of_several_experts_learns_from_each(way):
    """Shared factors, of which there is one parameter."""
    x, _, b, weights, indices = problem(ranks=[2] * 5)
    shared = seeded(2, IN, seed=9).requires_grad_()

    def gradients(function):
        y = function(x, [shared] * 5, b, weights, indices)
        (first,) = torch.autograd.grad(y.sin().sum(), shared, create_graph=True)
        return first, *torch.autograd.grad(first.square().sum(), (shared, x))

    expected = gradients(loop)
    assert_close(gradients(lambda *args: lora_mix(*args, strategy=way)), expected)


@pytest.mark.parametrize("way", [*WAYS, None])
@pytest.mark.parametrize("tokens", [0, 1, TOKENS])
@pytest.mark.parametrize("again", [False, True])
def test_experts_without_tokens_have_zero_gradients_not_none(way, tokens, again):
    x, a, b, weights, indices = problem(tokens=tokens)
    y = lora_mix(x, a, b, weights, indices, strategy=way)
    grads = torch.autograd.grad(y.sum(), (*a, *b), create_graph=again)  # raises for a None
    for e, (of_a, of_b) in enumerate(zip(grads, grads[len(a) :])):
        has_tokens = bool((indices == e).any())
        assert bool(of_a.any()) == bool(of_b.any()) == has_tokens


# ---- what is not selected ------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_expert_without_tokens_may_be_anything(way, bad):
    x, a, b, weights, indices = problem()
    expected = lora_mix(x, a, b, weights, indices, strategy=way)
    inputs = [x, weights, a[0], b[0], a[3], b[3]]
    of_expected = torch.autograd.grad(expected.sum(), inputs)
    with torch.no_grad():
        a[2].fill_(bad)
        b[4].fill_(bad)
    y = lora_mix(x, a, b, weights, indices, strategy=way)
    assert_close(y, expected)
    assert_close(torch.autograd.grad(y.sum(), inputs), of_expected)


@pytest.mark.parametrize("way", WAYS)
def test_what_overflows_for_one_token_is_not_seen_by_others(way):
    """Expert 3 has every token but token 0, for which alone its first map would overflow."""
    x, a, b, weights, _ = problem(torch.float32)
    indices = torch.full((TOKENS, SLOTS), 3)
    indices[0] = 0
    with torch.no_grad():
        x[0] = 1e20
        a[3].fill_(1e20)
        x[1:] *= 1e-20
        a[0] *= 1e-20
    y = lora_mix(x, a, b, weights, indices, strategy=way)
    assert y.isfinite().all()
    grads = torch.autograd.grad(y.sum(), (weights, *b))
    assert all(g.isfinite().all() for g in grads)


def test_what_overflows_without_a_weight_is_not_seen_where_all_learn():
    x, a, b, weights, indices = problem(torch.float32)
    dense = of_all_experts(weights, indices).detach().requires_grad_()
    with torch.no_grad():
        x.mul_(1e20)
        a[2].fill_(1e20)  # no token has expert 2
    assert lora_mix(x, a, b, dense, router_grad="dense").isfinite().all()


# ---- whose weights learn -------------------------------------------------------------------------


def test_dense_router_gradient_is_of_every_weight():
    x, a, b, weights, indices = problem()
    dense = of_all_experts(weights, indices).detach().requires_grad_()
    inputs = [dense, x, *a, *b]
    y = lora_mix(x, a, b, dense, router_grad="dense")
    expected = sum(dense[:, e, None] * (x @ a[e].T @ b[e].T) for e in range(len(RANKS)))
    assert_close(y, expected)
    actual = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
    of_loop = torch.autograd.grad(expected.sin().sum(), inputs, create_graph=True)
    assert_close(actual, of_loop)
    assert actual[0][dense == 0].any()
    second, of_loop = (
        torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        for first in (actual, of_loop)
    )
    assert_close(second, of_loop)


@pytest.mark.parametrize("way", WAYS)
def test_selected_router_gradient_is_of_selected_weights(way):
    x, a, b, weights, indices = problem()
    dense = of_all_experts(weights, indices).detach().requires_grad_()
    (grad,) = torch.autograd.grad(lora_mix(x, a, b, dense, strategy=way).sum(), dense)
    assert not grad[dense == 0].any()
    # A slot that has an expert is selected, also where its weight is 0.
    zeros = torch.zeros_like(weights).requires_grad_()
    (grad,) = torch.autograd.grad(lora_mix(x, a, b, zeros, indices, strategy=way).sum(), zeros)
    assert grad[indices >= 0].all() and not grad[indices < 0].any()


# ---- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("autocast", [False, True])
def test_parameters_stay_in_full_precision(way, autocast):
    x, a, b, weights, indices = problem(torch.float32)
    rounded = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = lora_mix(x if autocast else rounded, a, b, weights, indices, strategy=way)
    assert y.dtype == torch.bfloat16
    expected = loop(x, a, b, weights, indices)
    assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    actual = torch.autograd.grad(y.sum(), (weights, *a, *b))
    of_loop = torch.autograd.grad(expected.sum(), (weights, *a, *b))
    for g, exact in zip(actual, of_loop):
        assert g.dtype == torch.float32
        size = float(exact.abs().max()) if exact.numel() else 0
        assert_close(g, exact, rtol=0, atol=0.05 * size + 1e-6)


# ---- what is kept --------------------------------------------------------------------------------


def saved_bytes(function, inputs):
    """Of storages that the backward keeps, without those of the inputs."""
    known = {x.untyped_storage().data_ptr() for x in inputs}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = function()
    del y
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype, autocast", [(torch.float32, False), (torch.float32, True)])
@pytest.mark.parametrize("way", WAYS)
def test_keeps_no_more_than_a_rank_per_token(way, dtype, autocast):
    tokens, ranks, features = 64, [4, 8, 2, 6], 96
    x = seeded(tokens, features).to(dtype).requires_grad_()
    a = [seeded(r, features, seed=r).to(dtype).requires_grad_() for r in ranks]
    b = [seeded(features, r, seed=r).to(dtype).requires_grad_() for r in ranks]
    weights = seeded(tokens, 2).sigmoid().float().requires_grad_()
    indices = seeded(tokens, 4).topk(2).indices

    def function():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return lora_mix(x, a, b, weights, indices, strategy=way, scaling=[2.0, 1.0, 1.0, 0.5])

    itemsize = 2 if autocast else 4
    rows = tokens * 2
    scaled = 4 * rows if way == "segmented" else 4 * tokens * 5
    if way == "segmented":
        routing = 8 * (rows + rows + len(ranks) + 1)  # order, inverse, offsets
        middle = itemsize * rows * max(ranks)
    else:
        routing = tokens * 5
        middle = itemsize * tokens * sum(ranks)
    # x where autocast has rounded it; the scaling of a slot, and where it was looked up.
    cast = itemsize * x.numel() if autocast else 0
    chain = 4 * tokens * 5 + 2 * 8 * rows
    inputs = [x, *a, *b, weights, indices]
    assert saved_bytes(function, inputs) <= middle + routing + scaled + cast + chain


# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [*WAYS, None])
def test_leading_dimensions_and_strides(way):
    x, a, b, weights, indices = (problem()[i] for i in range(5))
    expected = lora_mix(x, a, b, weights, indices, strategy=way)
    shaped = lora_mix(
        x.view(3, 4, IN).transpose(0, 1), a, b, weights.view(3, 4, SLOTS).transpose(0, 1),
        indices.reshape(3, 4, SLOTS).transpose(0, 1), strategy=way,
    )  # fmt: skip
    assert_close(shaped.transpose(0, 1).reshape(TOKENS, OUT), expected)
    one = lora_mix(x[0], a, b, weights[0], indices[0], strategy=way)
    assert_close(one, expected[0])
    columns = [factor.detach().T.contiguous().T for factor in a]
    assert_close(lora_mix(x, columns, b, weights, indices, strategy=way), expected)


@pytest.mark.parametrize("way", [*WAYS, None])
def test_no_tokens_and_no_slots(way):
    for tokens, slots in itertools.product((0, 3), (0, 2)):
        x, a, b, weights, indices = problem(tokens=tokens, slots=slots)
        y = lora_mix(x, a, b, weights, indices, strategy=way)
        assert y.shape == (tokens, OUT)
        grads = torch.autograd.grad(y.sum(), (x, weights, *a, *b))
        assert all(g.shape == p.shape for g, p in zip(grads, (x, weights, *a, *b)))


@pytest.mark.parametrize("way", [*WAYS, None])
def test_compiles_whole_with_and_without_gradients(way):
    x, a, b, weights, indices = problem()
    compiled = torch.compile(lora_mix, fullgraph=True, backend="aot_eager")
    inputs = [x, weights, *a, *b]
    y, expected = (f(x, a, b, weights, indices, strategy=way) for f in (compiled, lora_mix))
    assert_close(y, expected)
    actual, of_eager = (torch.autograd.grad(z.sin().sum(), inputs) for z in (y, expected))
    assert_close(actual, of_eager)


# ---- inference -----------------------------------------------------------------------------------

infer = partial(lora_mix, inference=True)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [RANKS, [2] * 5, [16] * 5])
@pytest.mark.parametrize("tokens", [1, TOKENS, 1030])
@pytest.mark.parametrize("dense", [False, True])
def test_inference_has_the_same_result(dtype, ranks, tokens, dense):
    """In one call, of many tokens in several parts; with parameters in another dtype too."""
    x, _, _, weights, indices = problem(dtype, tokens=tokens)
    _, a, b, *_ = problem(torch.float32, ranks)
    weights = weights * (1 - 2 * (torch.arange(tokens)[:, None] % 3 == 0)).to(dtype)
    scaling = (1.0, 2.0, 3.0, 4.0, 5.0)
    routing = weights.double() if dtype == F64 else weights.float(), indices
    if dense:
        routing = of_all_experts(*routing), None
    expected = lora_mix(x, a, b, *routing, scaling=scaling, strategy="segmented").detach()
    with torch.no_grad():
        y = infer(x, a, b, *routing, scaling=scaling)
        folded = [None if v is None else v.unflatten(0, (1, -1, 1)) for v in (x, *routing)]
        of_samples = infer(folded[0], a, b, *folded[1:], scaling=scaling)
    assert y.dtype == dtype and torch.equal(y, of_samples.flatten(0, 2))
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(
        dtype, 1e-5 if dtype != F64 else 1e-7
    )
    assert_close(y, expected, atol=tolerance * expected.abs().max(), rtol=0)


@torch.no_grad()
def test_inference_of_a_token_does_not_depend_on_the_others():
    """However many they are, and how threads share the work."""
    x, a, b, weights, _ = problem(torch.float32, [16, 0, 12, 8, 3], tokens=600)
    indices = seeded(600, 5, seed=5).topk(SLOTS).indices
    threads, some = torch.get_num_threads(), [0, 300, 599]
    try:
        torch.set_num_threads(1)
        y = infer(x, a, b, weights, indices)
        alone = [infer(x[t : t + 1], a, b, weights[t : t + 1], indices[t : t + 1]) for t in some]
        torch.set_num_threads(3)
        assert torch.equal(infer(x, a, b, weights, indices), y)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(alone), y[some])


@torch.no_grad()
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_inference_does_not_see_what_was_not_selected(bad):
    x, a, b, weights, indices = problem()
    expected = infer(x, a, b, weights, indices)
    a[2].fill_(bad)
    b[4].fill_(bad)
    x[3] = bad  # has no expert
    assert_close(infer(x, a, b, weights, indices), expected)


@torch.no_grad()
def test_inference_reads_factors_wherever_they_lie():
    x, a, b, weights, indices = problem(ranks=[4] * 5)
    expected = infer(x, a, b, weights, indices)
    a, b = [v.T.contiguous().T for v in a], list(torch.cat(b, 1).split(4, 1))
    wide = torch.stack([x, x], -1)[..., 0]
    assert_close(infer(wide, a, b, weights, indices.T.contiguous().T), expected)


@torch.no_grad()
@pytest.mark.parametrize("wrong", [5, -2])
def test_inference_looks_at_indices(wrong):
    x, a, b, weights, _ = problem(tokens=1)
    with pytest.raises(ValueError, match=rf"lora_mix: expected indices in .*, got {wrong}"):
        infer(x, a, b, weights, torch.tensor([[0, wrong]]))


def test_what_may_be_computed_again_has_the_same_bits():
    """Under ``no_grad`` alone: a reentrant checkpoint runs it first so, and then with gradients."""
    x, a, b, weights, indices = problem(torch.float32, [16, 0, 12, 8, 3])
    learning = lora_mix(x, a, b, weights, indices)
    with torch.no_grad():
        assert torch.equal(lora_mix(x, a, b, weights, indices), learning)
        told = infer(x, a, b, weights, indices)
        assert torch.equal(lora_mix(x, a, b, weights, indices, inference=False), learning)
    with torch.inference_mode():
        assert torch.equal(lora_mix(x, a, b, weights, indices), told)
    frozen = [[v.detach() for v in factors] for factors in (a, b)]
    call = partial(lora_mix, x.detach(), *frozen, weights.detach(), indices)
    assert torch.equal(call(), told) and torch.equal(call(inference=False), learning)
    assert not torch.equal(told, learning)  # or this test says nothing


def test_the_operator_has_derivatives_of_its_own():
    """For who calls it directly."""
    x, a, b, weights, indices = problem(ranks=[2, 1], tokens=4)
    indices = indices.clamp(max=1)

    def call(x, weights, *factors):
        op = torch.ops.torch_routers._lora_infer
        return op(x, factors[:2], factors[2:], weights, indices, [0.5, 2.0])

    assert torch.autograd.gradcheck(call, (x, weights, *a, *b))
    assert torch.autograd.gradgradcheck(call, (x, weights, *a, *b))
