"""Experts of low rank: two layers that are called their mixture."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import torch_routers as tr

H, OUT, E, RANK, ALPHA = 6, 5, 4, 2, 3.0
MIXES = ["factors", "product"]
every_mix = pytest.mark.parametrize("mix", MIXES)


def inputs(*shape, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, H, dtype=torch.float64, generator=generator).to(dtype)


def bank(mix, dtype=torch.float64, **options):
    torch.manual_seed(0)
    experts = tr.LoraExperts(E, H, RANK, mix=mix, alpha=ALPHA, **{"out_features": OUT} | options)
    torch.nn.init.normal_(experts.B)
    return experts.to(dtype)


def layer(mix, dtype=torch.float64, segment=None, **options):
    torch.manual_seed(0)
    router = tr.SMEARRouter(H, E, expert_dropout=0.0, segment=segment)
    router.weight_norm_weight.data.fill_(0.8)
    return tr.MoE(router, tr.SoftMergedExperts(bank(mix, dtype, **options))).to(dtype)


def merged(mix, weights, x, dtype=torch.float64):
    """One segment of rows ``x``."""
    merge = tr.routing.Merge(weights[None], torch.tensor([0, len(x)]))
    return tr.SoftMergedExperts(bank(mix, dtype))(x, merge)


def by_loop(experts, weights, x):
    """Of each token, each expert's parameters, or what they do, added up one by one."""

    def of_token(weights, x):
        if experts.mix == "product":
            total = sum(p * b @ a for p, a, b in zip(weights, experts.A, experts.B))
        else:
            total = sum(p * b for p, b in zip(weights, experts.B)) @ sum(
                p * a for p, a in zip(weights, experts.A)
            )
        return ALPHA / RANK * (total @ x)

    tokens = zip(weights.flatten(0, 1), x.flatten(0, 1))
    return torch.stack([of_token(*token) for token in tokens]).unflatten(0, x.shape[:2])


def test_worked_example():
    for mix, expected in ("factors", 6.0), ("product", 6.5):
        experts = tr.LoraExperts(2, 1, 1, mix=mix).double()
        experts.A.data, experts.B.data = (
            torch.tensor(v, dtype=torch.float64).view(2, 1, 1) for v in ([1, 2], [3, 5])
        )
        weights = torch.tensor([[0.5, 0.5]], dtype=torch.float64, requires_grad=True)
        merge = tr.routing.Merge(weights, torch.tensor([0, 1]))
        y = tr.SoftMergedExperts(experts)(torch.ones(1, 1, dtype=torch.float64), merge)
        assert y.item() == expected
        y.backward()
        # (3 p + 5 q)(p + 2 q) and 3 p + 10 q.
        assert weights.grad.tolist() == [[8.5, 15.5] if mix == "factors" else [3, 10]]


@every_mix
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("segment", [None, 2])
def test_equals_a_loop(mix, masked, segment):
    moe, x = layer(mix, segment=segment), inputs(3, 5)
    valid = torch.arange(15).view(3, 5) % 4 != 1 if masked else torch.ones(3, 5, dtype=torch.bool)
    results = []
    for run in (
        lambda x, weights: by_loop(moe.experts.experts, weights, x).where(valid[..., None], 0),
        lambda x, _: moe(x, valid_mask=valid if masked else None),
    ):
        moe.zero_grad()
        leaf = x.clone().requires_grad_()
        y = run(leaf, moe.router(leaf, valid_mask=valid if masked else None).weights)
        (y * torch.arange(y.numel()).view(y.shape).sin()).sum().backward()
        results.append([y, leaf.grad, *(p.grad.clone() for p in moe.parameters())])
    for name, parameter in moe.experts.named_parameters():
        assert all(of_expert.any() for of_expert in parameter.grad), name
    for expected, actual in zip(*results):
        assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_products_are_linear_in_the_weights_and_factors_are_not():
    x, (p, q) = inputs(3), torch.rand(2, E, dtype=torch.float64).softmax(-1)
    middle = {mix: (merged(mix, p, x) + merged(mix, q, x)) / 2 for mix in MIXES}
    assert_close(merged("product", (p + q) / 2, x), middle["product"])
    assert not torch.allclose(merged("factors", (p + q) / 2, x), middle["factors"], rtol=1e-2)
    assert_close(merged("product", 3 * p, x), 3 * merged("product", p, x))
    assert_close(merged("factors", 3 * p, x), 9 * merged("factors", p, x))


def test_the_product_is_the_mean_of_the_results():
    x, p = inputs(3), torch.rand(E, dtype=torch.float64).softmax(-1)
    experts = bank("product")
    offsets = torch.arange(E + 1) * 3
    each = experts(x.repeat(E, 1), offsets).view(E, 3, OUT)
    assert_close(merged("product", p, x), (p[:, None, None] * each).sum(0))


@every_mix
def test_one_hot_weights_are_one_expert(mix):
    x = inputs(3)
    for e in range(E):
        offsets = torch.tensor([0] * (e + 1) + [3] * (E - e))
        one_hot = F.one_hot(torch.tensor(e), E).double()
        assert_close(merged(mix, one_hot, x), bank(mix)(x, offsets))


def test_where_the_definitions_agree():
    x, p = inputs(3), torch.rand(E, dtype=torch.float64).softmax(-1)
    assert not torch.allclose(merged("factors", p, x), merged("product", p, x), rtol=1e-2)
    results = []
    for mix in MIXES:
        experts = bank(mix)
        for parameter in experts.parameters():
            parameter.data.copy_(parameter.data[:1].expand_as(parameter))
        merge = tr.routing.Merge(p[None], torch.tensor([0, 3]))
        chosen = tr.MoE(tr.TopKRouter(H, E, 2).double(), bank(mix))
        chosen.router.weight.data = inputs(E, seed=5)
        results.append([tr.SoftMergedExperts(experts)(x, merge), chosen(x)])
    for factors, product in zip(*results):
        assert_close(factors, product)


@every_mix
def test_derivatives(mix):
    experts, x = tr.SoftMergedExperts(bank(mix)), inputs(5).requires_grad_()
    weights = torch.rand(2, E, dtype=torch.float64).softmax(-1).requires_grad_()

    def function(x, weights, *parameters):
        names = dict(zip(("experts.A", "experts.B"), parameters))
        merge = tr.routing.Merge(weights, torch.tensor([0, 2, 5]))
        return torch.func.functional_call(experts, names, (x, merge))

    arguments = (x, weights, *experts.parameters())
    assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, arguments)


@every_mix
def test_padding_content_changes_nothing(mix):
    valid, results = torch.arange(14).view(2, 7) % 3 != 1, []
    for content in 0.0, torch.nan, 1e30:
        moe, x = layer(mix, torch.float32), inputs(2, 7, dtype=torch.float32)
        x[~valid] = content
        y = moe(x, valid_mask=valid)
        assert (y[~valid] == 0).all()
        y.square().sum().backward()
        results.append([y, *(p.grad for p in moe.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@every_mix
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0), (0, 3), (2, 3, 4)])
def test_leading_dimensions_are_kept(mix, shape):
    moe = layer(mix, torch.float32, segment=2)
    y = moe(inputs(*shape, dtype=torch.float32))
    assert y.shape == (*shape, OUT)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in moe.parameters())


@every_mix
def test_rows_behind_the_last_segment_are_finite_and_reach_no_other(mix):
    x, weights = inputs(5), torch.rand(2, E, dtype=torch.float64).softmax(-1)
    experts = tr.SoftMergedExperts(bank(mix))
    y = experts(x, tr.routing.Merge(weights, torch.tensor([0, 1, 3])))
    assert y.isfinite().all()
    assert_close(y[:3], experts(x[:3], tr.routing.Merge(weights, torch.tensor([0, 1, 3]))))


@every_mix
def test_compiles_in_one_graph(mix):
    moe, x = layer(mix, torch.float32, segment=2), inputs(2, 5, dtype=torch.float32)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    moe(x).square().sum().backward()
    expected = [p.grad.clone() for p in moe.parameters()]
    moe.zero_grad()
    assert_close(compiled(x), moe(x))
    compiled(x).square().sum().backward()
    assert_close([p.grad for p in moe.parameters()], expected)


@every_mix
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_types_and_autocast(mix, dtype):
    half, exact, x = layer(mix, dtype), layer(mix, torch.float32), inputs(2, 5, dtype=dtype)
    exact.load_state_dict(half.state_dict())
    expected = exact(x.float())
    y = half(x)
    assert y.dtype == dtype
    assert_close(y.float(), expected, rtol=0.1, atol=0.1)
    y.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in half.parameters())
    with torch.autocast("cpu", dtype):
        y = exact(x.float())
    assert y.dtype == torch.float32
    assert_close(y, expected, rtol=0.1, atol=0.1)


@every_mix
def test_no_expert_becomes_a_matrix(mix):
    """Nothing is as large as one product B A."""
    experts = tr.LoraExperts(3, 64, 2, mix=mix)

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **kwargs or {})
            for result in results if isinstance(results, (tuple, list)) else [results]:
                if isinstance(result, torch.Tensor):
                    self.largest = max(self.largest, result.numel())
            return results

    merge = tr.routing.Merge(torch.ones(2, 3, requires_grad=True), torch.tensor([0, 4, 8]))
    with Sizes() as sizes:
        y = tr.SoftMergedExperts(experts)(torch.randn(8, 64, requires_grad=True), merge)
        y.sum().backward()
    assert 0 < sizes.largest < 64 * 64


def test_at_first_nothing_is_added():
    for mix in MIXES:
        experts = tr.LoraExperts(E, H, RANK, mix=mix)
        assert experts.A.shape == (E, RANK, H) and experts.A.any()
        assert experts.B.shape == (E, H, RANK) and not experts.B.any()
        moe = tr.MoE(tr.SMEARRouter(H, E), tr.SoftMergedExperts(experts))
        assert not moe(inputs(2, 3, dtype=torch.float32)).any()
    assert experts.alpha == RANK and experts.out_features == H
    assert "rank=2, out_features=6, alpha=2, mix='product'" in repr(experts)


def test_errors():
    for options, said in (
        ({"rank": 0}, "expected rank >= 1, got 0"),
        ({"out_features": 0}, "expected out_features >= 1, got 0"),
        ({"mix": "sum"}, r"expected mix among \['factors', 'product'\], got 'sum'"),
    ):
        with pytest.raises(ValueError, match=f"LoraExperts: {said}"):
            tr.LoraExperts(E, H, **{"rank": RANK} | options)
