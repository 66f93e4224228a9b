"""What only the layer of BlockFFN promises; the rest is in test_moe.py and test_routers.py."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import torch_routers as tr
from torch_routers import losses

T, E, H, SIZE = 20, 6, 32, 4


def layer(dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = tr.BlockFFN(hidden_size=H, num_experts=E, intermediate_size=SIZE, **options)
    layer.router.gain.data = torch.tensor([1.0, 0.3, -0.5, 2.0, 0.0, 0.7])
    layer.router.weight.data[1] = 0  # an expert that no token activates
    return layer.to(dtype)


def inputs(*shape, dtype=torch.float64):
    shape = shape or (T,)
    return torch.randn(*shape, H, generator=torch.Generator().manual_seed(1)).to(dtype)


def dense(layer, x):
    """Every pair of token and expert, as the paper writes it."""
    a = (x @ layer.router.weight.T).relu()
    h = a * (a.square().mean(-1, keepdim=True) + layer.router.eps).rsqrt()
    hidden = F.silu(torch.einsum("th,eih->tei", x, layer.experts.up_proj))
    scaled = hidden * (h * layer.router.gain).unsqueeze(-1)
    return torch.einsum("tei,ehi->th", scaled, layer.experts.down_proj)


def with_gradients(run, module, x):
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    y = run(leaf)
    (y * torch.linspace(-1, 1, H, dtype=x.dtype)).sum().backward()
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in module.parameters())]


def test_sparse_equals_dense():
    """To 1e-12, outputs and all gradients; inactive experts' are exactly 0."""
    each, x = layer(), inputs()
    sparse = with_gradients(each, each, x)
    for actual, expected in zip(sparse, with_gradients(lambda x: dense(each, x), each, x)):
        assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for parameter in each.experts.parameters():
        assert (parameter.grad[1] == 0).all() and parameter.grad[0].any()
    assert (each.router.weight.grad[1] == 0).all() and each.router.gain.grad[1] == 0


def test_equals_a_moe_of_its_parts():
    each, x = layer(), inputs(2, 5)
    moe = tr.MoE(each.router, each.experts)
    for actual, expected in zip(with_gradients(each, each, x), with_gradients(moe, moe, x)):
        assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def kept_for_backward(module, x):
    """The shapes of the tensors that it keeps, one for each memory."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor, list(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    del y
    return [shape for _, shape in kept.values()]


def test_backward_needs_no_result_of_the_down_projection():
    each = layer()
    moe, x = tr.MoE(each.router, each.experts), inputs()
    rows = int(each.router(x).counts.sum())
    assert kept_for_backward(moe, x).count([rows, H]) == 2  # the input of the experts, the results
    assert kept_for_backward(each, x).count([rows, H]) == 1


def test_an_active_expert_without_gain_learns_its_gain():
    for make in layer, lambda: tr.MoE(layer().router, tr.SwiGLUExperts(E, H, SIZE).double()):
        each, x = make(), inputs()
        y, routing = each(x, return_routing=True)
        logits = x @ each.router.weight.T
        assert torch.equal(routing.active, logits > 0)
        assert torch.equal(routing.counts, (logits > 0).sum(0))
        assert (routing.weights[:, 4] == 0).all() and routing.counts[4] > 0
        assert tr.metrics.drop_rate(routing) == 0
        y.square().sum().backward()
        assert each.router.gain.grad[4] != 0
        assert (each.experts.down_proj.grad[4] == 0).all()


def test_activity_depends_on_no_gain():
    each, x = layer(), inputs()
    mask = torch.arange(T) % 3 != 0
    active = each.router(x, valid_mask=mask).active
    assert active.any() and not active[~mask].any()
    each.router.gain.data.neg_()
    assert torch.equal(each.router(x, valid_mask=mask).active, active)


def test_nan_is_noticed_in_its_token_alone():
    each, x = layer(), inputs()
    expected = each(x)
    x[3, 2] = torch.nan
    y, others = each(x), torch.arange(T) != 3
    assert y[3].isnan().all() and torch.equal(y[others], expected[others])


def test_half_types_round_the_hidden_layer_once():
    each = layer(torch.bfloat16)
    scale = torch.rand(T, 1) + 0.5
    rows, offsets = inputs(dtype=torch.bfloat16), torch.tensor([0, T, *[T] * (E - 1)])
    hidden = F.silu(tr.ops.grouped_linear(rows, each.experts.up_proj, offsets))
    exact = (hidden.double() * scale.double()).bfloat16()
    expected = tr.ops.grouped_linear(exact, each.experts.down_proj, offsets)
    assert torch.equal(each.experts(rows, offsets, scale), expected)


@pytest.mark.parametrize(
    "shape, cuts",
    [((T,), [0, 5, 6, 14, T]), ((2, T // 2), [0, 5, 6, 10, 14, T])],  # rows of a batch are apart
)
def test_losses_stay_within_documents(shape, cuts):
    """A pack has the losses of its documents apart, weighed by the pairs and chunks of each."""
    each = layer(
        losses=[
            losses.ActivationLocalityLoss(1.0),
            losses.ChunkSparsificationLoss(1.0, chunk_size=4),
            losses.TokenBalanceLoss(1.0),
        ]
    )
    x, offsets = inputs(), torch.tensor([0, 5, 6, 6, 14, T])
    y, routing = each(x.view(*shape, H), return_routing=True, group_offsets=offsets)
    assert torch.equal(routing.group_offsets, offsets)
    assert_close(y.view(T, H), each(x, return_routing=True)[0])
    spans = list(pairwise(cuts))
    apart = [each(x[a:b], return_routing=True)[1].losses for a, b in spans]
    pairs, chunks = [b - a - 1 for a, b in spans], [-(-(b - a) // 4) for a, b in spans]
    for name, value in routing.losses.items():
        counts = chunks if name == "chunk_sparsification" else pairs
        expected = sum(n * part[name] for n, part in zip(counts, apart)) / sum(counts)
        assert_close(value, expected)
    untold = each(x.view(*shape, H), return_routing=True)[1]
    assert untold.group_ids() is None
    assert all(untold.losses[name] != value for name, value in routing.losses.items())


def test_documents_compile():
    each = layer(
        torch.float32,
        losses=[losses.ChunkSparsificationLoss(1.0, chunk_size=4), losses.TokenBalanceLoss(1.0)],
        max_active=E,
    )
    x, offsets = inputs(dtype=torch.float32), torch.tensor([0, 5, 14, T])
    compiled = torch.compile(each, fullgraph=True, backend="aot_eager")
    expected = with_losses(each, x, offsets)
    for actual, value in zip(with_losses(compiled, x, offsets), expected):
        # Of gradients: sums of numbers as large as their largest, rounded in another order.
        assert_close(actual, value, rtol=1e-5, atol=1e-6 * value.abs().max().item())
    with torch.compiler.set_stance("fail_on_recompile"):  # other documents, as many
        with_losses(compiled, x, torch.tensor([0, 1, 2, T]))


def with_losses(module, x, offsets):
    module.zero_grad()
    y, routing = module(x, return_routing=True, group_offsets=offsets)
    (y.square().sum() + routing.aux_loss).backward()
    return [y.detach(), *routing.losses.values(), *(p.grad.clone() for p in module.parameters())]


def test_the_shared_experts_see_every_token():
    shared = tr.SwiGLU(H, 5).double()
    x = inputs()
    with_shared, without = layer(shared=shared), layer()
    assert_close(with_shared(x), without(x) + shared(x))


def test_its_losses_need_a_destination():
    each, x = layer(losses=[losses.ActivationLocalityLoss(1.0)]), inputs()
    with pytest.raises(RuntimeError, match="BlockFFN: expected a destination for 1 losses"):
        each(x)
    with tr.collect(each) as routings:
        y = each(x)
    collected = routings.aux_loss()
    (y.sum() + collected).backward()
    expected = each.router.weight.grad.clone()
    each.zero_grad()
    tr.attach(each)(each(x).sum()).backward()
    assert_close(each.router.weight.grad, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_experts": 0}, "ReLURouter: expected num_experts >= 1, got 0"),
        ({"intermediate_size": 0}, "MLPExperts: expected intermediate_size >= 1, got 0"),
        ({"eps": 0.0}, "ReLURouter: expected eps in [1e-30, 1e30], got 0.0"),
        ({"max_active": 0}, "BlockFFN: expected max_active > 0, got 0"),
        (
            {"shared_gate": True},
            "BlockFFN: expected shared experts with shared_gate=True, got none",
        ),
    ],
)
def test_errors(options, message):
    sizes = {"hidden_size": H, "num_experts": E, "intermediate_size": SIZE}
    with pytest.raises(ValueError) as info:
        tr.BlockFFN(**sizes | options)
    assert str(info.value) == message


def test_options_of_the_router():
    router = tr.BlockFFN(H, E, SIZE, eps=1e-6, norm="simple", init_std=0.5).router
    assert (router.eps, router.norm) == (1e-6, "simple")
    assert 0.3 < router.weight.std() < 0.7


@pytest.mark.parametrize("experts, tokens", [(1, 5), (E, 0), (1, 0)])
def test_degenerate_sizes(experts, tokens):
    each = tr.BlockFFN(H, experts, SIZE, losses=[losses.ChunkSparsificationLoss(1.0)]).double()
    y, routing = each(inputs(tokens), return_routing=True)
    (y.sum() + routing.aux_loss).backward()
    assert y.shape == (tokens, H) and (tokens or routing.aux_loss == 0)
    assert all(p.grad.isfinite().all() for p in each.parameters())
