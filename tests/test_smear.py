"""SMEAR: weights of a sequence, and experts merged by them."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import torch_routers as tr

H, E, SIZE = 6, 4, 5


def inputs(*shape, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, H, dtype=torch.float64, generator=generator).to(dtype)


def router(dtype=torch.float64, **options):
    torch.manual_seed(0)
    router = tr.SMEARRouter(H, E, **{"expert_dropout": 0.0} | options)
    with torch.no_grad():
        router.weight.mul_(100)
        if router.router_norm:
            router.weight_norm_weight.mul_(80)
            router.norm_bias.normal_()
            router.weight_norm_bias.normal_()
    return router.to(dtype)


def layer(dtype=torch.float64, bias=True, **options):
    each = router(dtype, **options)
    experts = tr.MLPExperts(E, H, SIZE, activation="silu", bias=bias)
    if bias:
        experts.up_proj_bias.data.normal_()
    return tr.MoE(each, tr.SoftMergedExperts(experts)).to(dtype)


def mask(*shape):
    return (torch.arange(torch.Size(shape).numel()) % 4 != 1).view(shape)


# ---- the merge -----------------------------------------------------------------------------------


def test_worked_example():
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    down = torch.tensor([[[0.3, -0.1]], [[0.2, 0.5]]], dtype=torch.float64)
    bias = torch.tensor([[0.05], [-0.02]], dtype=torch.float64)
    up = torch.tensor([[[0.4], [0.1]], [[-0.3], [0.6]]], dtype=torch.float64)
    logits = torch.tensor([0.2, -0.4], dtype=torch.float64, requires_grad=True)
    weights = logits.softmax(0)
    merged = [tr.ops.soft_merge(weights, parameter) for parameter in (down, bias, up)]
    y = merged[2] @ F.silu(merged[0] @ x + merged[1])
    (of_logits,) = torch.autograd.grad(y.sum(), logits)
    for actual, expected in {
        weights: [0.6456563, 0.3543437],
        y: [0.0050627, 0.0092342],
        of_logits: [0.0731147, -0.0731147],
    }.items():
        assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-8)


def worked_example(**options):
    """The same through the layer: the mean of a sequence of one token is the token."""
    experts = tr.MLPExperts(2, 2, 1, activation="silu", bias=True)
    each = tr.SMEARRouter(2, 2, router_norm=False, **options)
    moe = tr.MoE(each, tr.SoftMergedExperts(experts)).double()
    each.weight.data = torch.tensor([[0.2, 0.0], [-0.4, 0.0]], dtype=torch.float64)
    for name, value in {
        "up_proj": [[[0.3, -0.1]], [[0.2, 0.5]]],
        "up_proj_bias": [[0.05], [-0.02]],
        "down_proj": [[[0.4], [0.1]], [[-0.3], [0.6]]],
    }.items():
        getattr(experts, name).data = torch.tensor(value, dtype=torch.float64)
    return moe, torch.tensor([[1.0, -2.0]], dtype=torch.float64)


def test_worked_example_through_the_layer():
    moe, x = worked_example(expert_dropout=0.0)
    y = moe(x)
    expected = torch.tensor([[0.0050627, 0.0092342]], dtype=torch.float64)
    assert_close(y, expected, rtol=0, atol=5e-8)
    y.sum().backward()
    of_logits = moe.router.weight.grad[:, 0]  # times the first number of x, which is 1
    expected = torch.tensor([0.0731147, -0.0731147], dtype=torch.float64)
    assert_close(of_logits, expected, rtol=0, atol=5e-8)
    averaged = tr.MoE(moe.router, moe.experts.experts)(x)
    expected = torch.tensor([[0.1167284, -0.0307871]], dtype=torch.float64)
    assert_close(averaged, expected, rtol=0, atol=5e-8)


def test_worked_example_of_dropout():
    """Neither, one, or both of the experts are left out."""
    moe, x = worked_example(expert_dropout=0.5)
    weights = {tuple(moe.router(x, seed=seed).merge.weights[0].tolist()) for seed in range(40)}
    both = [0.6456563, 0.3543437]
    first_out = [1e-10 / 0.3543437, 1.0]
    second_out = [1.0, 1e-10 / 0.6456563]
    expected = torch.tensor([first_out, [0.5, 0.5], both, second_out], dtype=torch.float64)
    actual = torch.tensor(sorted(weights), dtype=torch.float64)
    assert_close(actual, expected, rtol=1e-6, atol=1e-17)
    assert (0.5, 0.5) in weights, "exactly, where both are left out"


def by_loop(moe, x, valid):
    """Each sequence by itself, each expert's parameters added up one by one."""
    routing_layer, experts = moe.router, moe.experts.experts
    results = []
    for sequence, is_valid in zip(x, valid):
        y = []
        segment = routing_layer.segment or len(sequence)
        for first in range(0, len(sequence), segment):
            looked_at = slice(first, first + segment)
            if routing_layer.segment is not None:
                looked_at = slice(first - segment, first) if first else slice(0, 0)
            tokens = sequence[looked_at][is_valid[looked_at]]
            mean = tokens.mean(0) if len(tokens) else sequence.new_zeros(H)
            weight = routing_layer.weight
            if routing_layer.router_norm:
                mean = layer_norm(mean, routing_layer.norm_weight, routing_layer.norm_bias)
                weight = torch.stack([
                    layer_norm(
                        row, routing_layer.weight_norm_weight, routing_layer.weight_norm_bias
                    )
                    for row in weight
                ])  # fmt: skip
            p = (weight @ mean).softmax(0)
            merged = {
                name: sum(p[e] * parameter[e] for e in range(E))
                for name, parameter in experts.named_parameters()
            }
            for t in range(first, min(first + segment, len(sequence))):
                hidden = F.silu(merged["up_proj"] @ sequence[t] + merged["up_proj_bias"])
                of_token = merged["down_proj"] @ hidden + merged["down_proj_bias"]
                y.append(of_token if is_valid[t] else torch.zeros_like(of_token))
        results.append(torch.stack(y))
    return torch.stack(results)


def layer_norm(x, gain, bias):
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * gain + bias


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"router_norm": False}, {"segment": 3}, {"segment": 2}])
def test_equals_a_loop(options, masked):
    x = inputs(3, 8)
    valid = mask(3, 8) if masked else torch.ones(3, 8, dtype=torch.bool)
    results = []
    for run in (
        lambda moe, x: by_loop(moe, x, valid),
        lambda moe, x: moe(x, valid_mask=valid if masked else None),
    ):
        moe, leaf = layer(**options), x.clone().requires_grad_()
        y = run(moe, leaf)
        (y * inputs(3, 8, seed=3)).sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in moe.parameters())])
    assert all(gradient.any() for gradient in results[0])
    for expected, actual in zip(*results):
        assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"segment": 2}, {"expert_dropout": 0.4, "jitter": 0.3}])
def test_derivatives(options):
    moe, x = layer(**options), inputs(2, 3).requires_grad_()
    names, parameters = zip(*moe.named_parameters())

    def function(x, *parameters):
        given = dict(zip(names, parameters))
        return torch.func.functional_call(moe, given, (x,), {"valid_mask": mask(2, 3), "seed": 5})

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *parameters), fast_mode=True)


def test_gradients_of_logits_sum_to_zero():
    moe = layer(router_norm=False)
    moe(inputs(3, 5)).square().sum().backward()
    gradient = moe.router.weight.grad  # sums over sequences of logit gradient times mean
    assert gradient.any()
    assert_close(gradient.sum(0), torch.zeros(H, dtype=torch.float64))


class OwnExperts(torch.nn.Module):
    """A bank that somebody else wrote."""

    def __init__(self, experts):
        super().__init__()
        self.experts, self.num_experts, self.hidden_size = experts, E, H

    def forward(self, rows, offsets):
        return self.experts(rows, offsets)


@pytest.mark.parametrize("segment", [None, 2])
def test_banks_of_your_own(segment):
    results = []
    for wrap in (lambda experts: experts), OwnExperts:
        moe, x = layer(segment=segment), inputs(3, 5).requires_grad_()
        parameters = list(moe.parameters())
        moe.experts = tr.SoftMergedExperts(wrap(moe.experts.experts))
        y = moe(x, valid_mask=mask(3, 5))
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in parameters)])
    for own, ours in zip(*results):
        assert_close(ours, own)


def test_one_hot_weights_are_one_expert():
    moe, x = layer(), inputs(2, 3)
    merge = tr.routing.Merge(torch.eye(E, dtype=torch.float64)[[2, 0]], torch.tensor([0, 3, 6]))
    y = moe.experts(x.view(6, H), merge).view(2, 3, H)
    for b, expert in enumerate([2, 0]):
        offsets = torch.tensor([0] * (expert + 1) + [3] * (E - expert))
        assert_close(y[b], moe.experts.experts(x[b], offsets))


def test_equal_experts_make_weights_irrelevant():
    moe, x = layer(), inputs(2, 3)
    for parameter in moe.experts.parameters():
        parameter.data.copy_(parameter.data[:1].expand_as(parameter))
    other = copy.deepcopy(moe)
    other.router.weight.data.neg_()
    assert_close(moe(x), other(x))


def test_merging_is_not_averaging():
    merged = layer()
    averaged = tr.MoE(merged.router, merged.experts.experts)
    x = inputs(2, 3)
    assert not torch.allclose(merged(x), averaged(x), rtol=1e-2)


def test_one_expert_is_a_plain_layer():
    experts = tr.MLPExperts(1, H, SIZE).double()
    moe = tr.MoE(tr.SMEARRouter(H, 1).double(), tr.SoftMergedExperts(experts))
    x = inputs(2, 3)
    y, routing = moe(x, return_routing=True)
    assert (routing.weights == 1).all()
    assert_close(y, experts(x.view(6, H), torch.tensor([0, 6])).view(2, 3, H))


# ---- masks, order, sequences ---------------------------------------------------------------------


@pytest.mark.parametrize("segment", [None, 2])
def test_padding_content_changes_nothing(segment):
    valid, results = mask(3, 7), []
    for content in 0.0, torch.nan, 1e30:
        moe, x = layer(torch.float32, segment=segment), inputs(3, 7, dtype=torch.float32)
        x[~valid] = content
        y, routing = moe(x, valid_mask=valid, return_routing=True)
        assert (y[~valid] == 0).all() and (routing.weights[~valid] == 0).all()
        assert routing.counts.tolist() == [int(valid.sum())] * E
        y.square().sum().backward()
        results.append([y, routing.weights, *(p.grad for p in moe.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_the_amount_of_padding_changes_nothing():
    moe, x = layer(), inputs(2, 5)
    padded, valid = torch.cat([x, inputs(2, 4, seed=9)], 1), torch.arange(9).expand(2, 9) < 5
    assert_close(moe(padded, valid_mask=valid)[:, :5], moe(x))
    without_mask = moe(padded)[:, :5]  # as in the authors' code
    assert not torch.allclose(without_mask, moe(x), rtol=1e-2)


def test_sequences_do_not_depend_on_each_other():
    moe, x = layer(), inputs(5, 4)
    order = torch.tensor([3, 0, 4])
    assert_close(moe(x[order]), moe(x)[order])
    assert moe.router.traits.batch_dependency == "sequence"
    changed = x.clone()
    changed[0, 3] += 1  # the last token of a sequence is seen by its first
    assert not torch.equal(moe(changed)[0, 0], moe(x)[0, 0])
    assert_close(moe(changed)[1:], moe(x)[1:])


def test_segments_never_see_the_future():
    moe, x = layer(segment=3, causal=True), inputs(2, 8)
    assert moe.router.traits.causal and moe.router.traits.batch_dependency == "sequence_causal"
    y = moe(x)
    for t in range(8):
        changed = x.clone()
        changed[:, t:] = inputs(2, 8 - t, seed=t + 20)
        assert torch.equal(moe(changed)[:, :t], y[:, :t])
    changed = x.clone()
    changed[:, 0] += 1
    assert not torch.equal(moe(changed)[:, 3], y[:, 3]), "but the past"


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (2, 0), (0, 3), (2, 3, 4)])
@pytest.mark.parametrize("segment", [None, 2])
def test_leading_dimensions_are_kept(shape, segment):
    moe = layer(torch.float32, segment=segment)
    y, routing = moe(inputs(*shape, dtype=torch.float32), return_routing=True)
    assert y.shape == (*shape, H) and routing.weights.shape == (*shape, E)
    assert routing.logits.shape == (*shape, E)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in moe.parameters())


def test_sequences_without_tokens_have_mean_zero():
    each, valid = router(), torch.tensor([[False] * 3, [True] * 3])
    routing = each(inputs(2, 3), valid_mask=valid)
    weight = layer_norm_of_rows(each)
    assert_close(routing.merge.weights[0], (weight @ each.norm_bias).softmax(0))
    assert not routing.weights[0].any()


def layer_norm_of_rows(each):
    gains = each.weight_norm_weight, each.weight_norm_bias
    return torch.stack([layer_norm(row, *gains) for row in each.weight])


# ---- memory --------------------------------------------------------------------------------------


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """How many numbers the largest tensor has that is made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **kwargs or {})
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.numel())
        return results


def test_nothing_is_as_large_as_all_experts_for_each_sequence():
    moe, x = layer(torch.float32), inputs(7, 2, dtype=torch.float32)
    with Sizes() as sizes:
        moe(x).square().sum().backward()
    assert 7 * SIZE * H <= sizes.largest < 7 * E * SIZE * H


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("segment", [None, 2])
def test_merged_experts_are_not_kept_for_the_backward(segment, compiled):
    moe, x = layer(torch.float32, segment=segment), inputs(7, 4, dtype=torch.float32)
    segments = len(moe.router(x).merge.weights)
    run = torch.compile(moe, fullgraph=True, backend="aot_eager") if compiled else moe
    saved = []

    def pack(tensor):
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x).square().sum().backward()
    assert (E, SIZE, H) in saved, "the experts themselves are"
    assert not [shape for shape in saved if shape.numel() >= segments * SIZE * H]


# ---- dropout -------------------------------------------------------------------------------------


def test_experts_are_left_out():
    each = tr.SMEARRouter(H, E, expert_dropout=0.25).double()  # new: all weights are alike
    x = inputs(4000, 1)
    p = each.eval()(x).merge.weights
    dropped = each.train()(x, seed=3).merge.weights
    uniform = (dropped == 1 / E).all(-1)
    out = (dropped < 1e-8) | uniform.unsqueeze(-1)
    assert abs(float(out.double().mean()) - 0.25) < 0.01
    kept = torch.where(out, 0, p) + 1e-10
    assert_close(dropped, kept / kept.sum(-1, keepdim=True))
    assert torch.equal(each(x, seed=3).merge.weights, dropped)
    assert not torch.equal(each(x, seed=4).merge.weights, dropped)
    assert uniform.any(), "all experts of some sequence are left out: uniform"
    assert_close(dropped.sum(-1), torch.ones(4000, dtype=torch.float64))


def test_without_any_expert_weights_are_uniform_in_half_types():
    each = tr.SMEARRouter(H, E, expert_dropout=0.75).half()
    weights = each(inputs(400, 2, dtype=torch.float16), seed=3).weights
    assert weights.dtype == torch.float32 and weights.isfinite().all()
    assert (weights == 1 / E).all(-1).any()


def test_jitter_multiplies_the_mean():
    each = tr.SMEARRouter(H, H, router_norm=False, expert_dropout=0.0, jitter=0.25).double()
    each.weight.data = torch.eye(H, dtype=torch.float64)  # the logits are the mean
    x = inputs(500, 1)
    means = each.eval()(x).logits
    assert_close(means, x)
    noise = each.train()(x, seed=3).logits / means
    assert 0.75 <= noise.min() < 0.76 and 1.24 < noise.max() <= 1.25
    assert abs(float(noise.mean()) - 1) < 0.01
    assert len(noise.unique()) > 0.99 * noise.numel()
    assert torch.equal(each(x, seed=3).logits / means, noise)
    assert each.traits.random and not router().traits.random
    each.expert_dropout = 0.5
    routing = each(x, seed=3)
    out, upwards = routing.merge.weights < 1e-8, routing.logits.squeeze(1) / x.squeeze(1) > 1
    shares = upwards[out].double().mean(), upwards[~out].double().mean()
    assert all(abs(share - 0.5) < 0.1 for share in shares), "no number is used twice"


def test_checkpoints_repeat_the_dropout():
    results = []
    for run in (lambda f, x: f(x)), partial(checkpoint, use_reentrant=False):
        moe, x = layer(expert_dropout=0.5), inputs(6, 3).requires_grad_()
        torch.manual_seed(7)
        y = run(moe, x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in moe.parameters())])
    for plain, checkpointed in zip(*results):
        assert torch.equal(plain, checkpointed)


# ---- programs, dtypes, configuration -------------------------------------------------------------


@pytest.mark.parametrize("segment", [None, 2])
def test_compiles_in_one_graph(segment):
    moe, x = layer(torch.float32, segment=segment), inputs(2, 5, dtype=torch.float32)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), moe(x))
    compiled(x).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_types(dtype):
    moe, x = layer(dtype), inputs(2, 5, dtype=dtype)
    y, routing = moe(x, return_routing=True)
    assert y.dtype == dtype and routing.weights.dtype == torch.float32
    exact = layer(torch.float32)
    exact.load_state_dict(moe.state_dict())
    assert_close(y.float(), exact(x.float()), rtol=0.1, atol=0.1)
    y.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in moe.parameters())


def test_autocast_merges_in_full_precision():
    moe, x = layer(torch.float32), inputs(2, 5, dtype=torch.float32)
    experts, weights = moe.experts.experts, moe.router(x).merge.weights
    with torch.autocast("cpu", torch.bfloat16):
        merged = tr.ops.soft_merge(weights, experts.up_proj)
        y = moe(x)
    assert torch.equal(merged, tr.ops.soft_merge(weights, experts.up_proj))
    exact = moe(x)
    assert y.dtype == torch.float32 and not torch.equal(y, exact)
    assert_close(y, exact, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        y.square().sum().backward()
    gradients = [p.grad.clone() for p in experts.parameters()]
    moe.zero_grad()
    exact.square().sum().backward()
    for actual, parameter in zip(gradients, experts.parameters()):
        assert actual.dtype == torch.float32
        assert_close(actual, parameter.grad, rtol=0, atol=0.05 * float(parameter.grad.abs().max()))


def test_means_of_long_sequences_of_half_types():
    x = (1 + inputs(2, 20000)).to(torch.bfloat16)  # a sum in bfloat16 would end at 512
    each = router(torch.float32, router_norm=False)
    expected = router(router_norm=False)(x.double()).logits
    assert_close(each(x).logits.double(), expected, rtol=1e-4, atol=1e-4)


def test_configuration_makes_the_round_trip():
    each = router(segment=4, causal=True)
    again = tr.from_config(each.config()).double()
    again.load_state_dict(each.state_dict())
    assert torch.equal(again(inputs(2, 9)).weights, each(inputs(2, 9)).weights)


def test_defaults_are_those_of_the_paper():
    each = tr.SMEARRouter(H, E)
    assert each.expert_dropout == 0.1 and each.segment is None and each.jitter == 0
    assert (each.weight_norm_weight == 1e-2).all() and (each.norm_weight == 1).all()
    assert not each.norm_bias.any() and not each.weight_norm_bias.any()
    assert (tr.SMEARRouter(H, E, weight_norm_gain=0.5).weight_norm_weight == 0.5).all()


def test_errors():
    for options, said in (
        ({"expert_dropout": 1.0}, r"expected expert_dropout in \[0, 1\), got 1.0"),
        ({"jitter": 1.0}, r"expected jitter in \[0, 1\), got 1.0"),
        ({"segment": 0}, "expected segment >= 1, got 0"),
        ({"causal": True}, "expected a segment with causal=True, got none: .* Pass segment"),
    ):
        with pytest.raises(ValueError, match=f"SMEARRouter: {said}"):
            tr.SMEARRouter(H, E, **options)
    with pytest.raises(ValueError, match="SMEARRouter: expected one sequence per sample"):
        router()(inputs(2, 3), group_offsets=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match=r"SMEARRouter: expected x of shape \[..., hidden_size=6"):
        router()(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="SoftMergedExperts: expected experts with parameters"):
        tr.SoftMergedExperts(torch.nn.Linear(2, 3))
    top_k = tr.MoE(tr.TopKRouter(H, E, 2), tr.SoftMergedExperts(tr.MLPExperts(E, H, SIZE)))
    with pytest.raises(ValueError, match="MoE: expected a router that merges experts"):
        top_k(torch.zeros(3, H))
    with pytest.raises(ValueError, match="MoE: expected scale_input=False"):
        tr.MoE(router(), layer().experts, scale_input=True)
    soft_merge = tr.ops.soft_merge
    with pytest.raises(ValueError, match=r"soft_merge: expected weights \[..., num_experts\] for"):
        soft_merge(torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="soft_merge: expected parameters in a floating dtype"):
        soft_merge(torch.zeros(2, 3), torch.zeros(3, 5).long())
