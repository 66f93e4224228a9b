"""The layer: what joins routers and experts, against a loop over tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import torch_routers as tr

T, E, H, SIZE = 14, 5, 6, 7


def router(top_k=2, **options):
    torch.manual_seed(0)
    router = tr.TopKRouter(H, E, top_k, **options)
    router.weight.data *= 40
    return router


class ThresholdRouter(tr.Router):
    """A weight for every expert, most of them 0, and none for some tokens."""

    def __init__(self):
        super().__init__(E)
        self.weight = nn.Parameter(40 * torch.randn(E, H).mul(0.02))

    def route(self, x, *, valid_mask, **context):
        logits = self.full_precision(x) @ self.full_precision(self.weight).T
        weights = (logits - 1).relu()
        if valid_mask is not None:
            weights = torch.where(valid_mask.unsqueeze(-1), weights, 0)
        counts = (weights != 0).view(-1, E).sum(0)
        return tr.Routing(weights, logits=logits, counts=counts)


def threshold_router():
    torch.manual_seed(0)
    return ThresholdRouter()


def swiglu(experts, e):
    gate_up = experts.gate_up_proj[e], experts.gate_up_proj_bias
    gate_up_bias = None if gate_up[1] is None else gate_up[1][e]
    down_bias = None if experts.down_proj_bias is None else experts.down_proj_bias[e]

    def expert(x):
        gate, up = F.linear(x, gate_up[0], gate_up_bias).chunk(2, -1)
        return F.linear(F.silu(gate) * up, experts.down_proj[e], down_bias)

    return expert


def clamped(experts, e):
    def expert(x):
        gate, up = F.linear(x, experts.gate_up_proj[e], experts.gate_up_proj_bias[e]).chunk(2, -1)
        gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
        hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return F.linear(hidden, experts.down_proj[e], experts.down_proj_bias[e])

    return expert


def mlp(experts, e):
    def expert(x):
        hidden = F.linear(x, experts.up_proj[e], experts.up_proj_bias[e]).relu()
        return F.linear(hidden, experts.down_proj[e], experts.down_proj_bias[e])

    return expert


def silu_mlp(experts, e):
    return lambda x: experts.down_proj[e] @ F.silu(experts.up_proj[e] @ x)


def blockffn(**options):
    layer = tr.BlockFFN(H, E, SIZE, **options)
    layer.router.gain.data = torch.tensor([1.0, 0.0, -0.5, 2.0, 0.7])  # 0 is active, too
    return layer


# Name: (the layer, its experts one by one).
LAYERS = {
    "plain": (lambda: tr.MoE(router(), tr.SwiGLUExperts(E, H, SIZE)), swiglu),
    "biases": (lambda: tr.MoE(router(), tr.SwiGLUExperts(E, H, SIZE, bias=True)), swiglu),
    "clamped": (lambda: tr.MoE(router(), tr.ClampedSwiGLUExperts(E, H, SIZE, limit=0.5)), clamped),
    "mlp": (
        lambda: tr.MoE(router(), tr.MLPExperts(E, H, SIZE, activation="relu", bias=True)),
        mlp,
    ),
    "shared": (
        lambda: tr.MoE(router(), tr.SwiGLUExperts(E, H, SIZE), shared=tr.SwiGLU(H, 9)),
        swiglu,
    ),
    "gated shared": (
        lambda: tr.MoE(
            router(), tr.SwiGLUExperts(E, H, SIZE), shared=tr.SwiGLU(H, 9), shared_gate=True
        ),
        swiglu,
    ),
    "scaled input": (
        lambda: tr.MoE(
            router(score="sigmoid", renormalize=False),
            tr.SwiGLUExperts(E, H, SIZE),
            scale_input=True,
        ),
        swiglu,
    ),
    "weight per expert": (
        lambda: tr.MoE(threshold_router(), tr.SwiGLUExperts(E, H, SIZE)),
        swiglu,
    ),
    "weight per expert, bounded": (
        lambda: tr.MoE(threshold_router(), tr.SwiGLUExperts(E, H, SIZE), max_active=4),
        swiglu,
    ),
    "BlockFFN": (blockffn, silu_mlp),
    "BlockFFN, bounded, shared": (
        lambda: blockffn(max_active=4, shared=tr.SwiGLU(H, 9), shared_gate=True),
        silu_mlp,
    ),
    "lora": (
        lambda: tr.MoE(router(), tr.LoraExperts(E, H, 3, alpha=6)),
        lambda experts, e: lambda x: 2 * F.linear(F.linear(x, experts.A[e]), experts.B[e]),
    ),
    "modules": (
        lambda: tr.MoE(
            router(),
            [nn.Sequential(nn.Linear(H, 3 + e), nn.Tanh(), nn.Linear(3 + e, H)) for e in range(E)],
        ),
        lambda experts, e: experts.experts[e],
    ),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def layer(name, dtype=torch.float32):
    torch.manual_seed(1)
    moe = LAYERS[name][0]().to(dtype)
    for key, parameter in moe.named_parameters():
        if "bias" in key or key == "experts.B":
            nn.init.normal_(parameter)
    return moe


def by_loop(moe, name, x, valid):
    result = torch.zeros_like(x)
    for t in valid.nonzero().flatten().tolist():
        routing = moe.router(x[t])
        y = 0
        experts = range(E) if routing.indices is None else routing.indices.tolist()
        for weight, e in zip(routing.weights, experts):
            expert = LAYERS[name][1](moe.experts, e)
            y = y + (expert(weight * x[t]) if moe.scale_input else weight * expert(x[t]))
        if moe.shared is not None:
            gate = 1 if moe.shared_gate is None else moe.shared_gate(x[t]).sigmoid()
            y = y + gate * moe.shared(x[t])
        result[t] = y
    return result


def inputs(dtype=torch.float64):
    return torch.randn(T, H, dtype=dtype, generator=torch.Generator().manual_seed(2))


@every_layer
@pytest.mark.parametrize("masked", [False, True])
def test_equals_a_loop_over_tokens(name, masked):
    moe, x = layer(name, torch.float64), inputs()
    valid = torch.arange(T) % 3 != 1 if masked else torch.ones(T, dtype=torch.bool)
    direction = torch.randn(T, H, dtype=torch.float64)
    results = []
    for run in (
        lambda x: by_loop(moe, name, x, valid),
        lambda x: moe(x, valid_mask=valid if masked else None),
    ):
        moe.zero_grad()
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        (y * direction).sum().backward()
        results.append([y, leaf.grad, *(p.grad.clone() for p in moe.parameters())])
    for expected, actual in zip(*results):
        assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@every_layer
def test_padding_content_changes_nothing(name):
    valid, results = torch.arange(T) % 3 != 1, []
    for content in 0.0, torch.nan, 1e30:
        moe, x = layer(name), inputs(torch.float32)
        x[~valid] = content
        y = moe(x, valid_mask=valid)
        assert (y[~valid] == 0).all()
        y.square().sum().backward()
        results.append([y, *(p.grad for p in moe.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@every_layer
def test_experts_without_tokens_get_zero_gradients(name):
    moe, x = layer(name), inputs(torch.float32)
    if isinstance(moe.router, (ThresholdRouter, tr.ReLURouter)):
        moe.router.weight.data[[1, 3, 4]] = 0
        moe(x).square().sum().backward()
    else:
        moe(x, indices=torch.tensor([[0, 2]]).expand(T, 2)).square().sum().backward()
    for key, parameter in moe.experts.named_parameters():
        if name == "modules":
            is_used = key.split(".")[1] in "02"
            assert bool(parameter.grad.any()) == is_used, key
        else:
            assert parameter.grad[[0, 2]].any() and not parameter.grad[[1, 3, 4]].any(), key
    moe.zero_grad()
    moe(x, valid_mask=torch.zeros(T, dtype=torch.bool)).sum().backward()
    for key, parameter in moe.experts.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), key


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_types(name, dtype):
    moe, exact = layer(name, dtype), layer(name)
    exact.load_state_dict(moe.state_dict())
    x = inputs(torch.float32).to(dtype)
    y = moe(x)
    assert y.dtype == dtype
    assert_close(y.float(), exact(x.float()), rtol=0.06, atol=0.06)
    y.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in moe.parameters())


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "modules"])
def test_compiles_in_one_graph(name):
    moe, x = layer(name), inputs(torch.float32)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), moe(x))
    compiled(x).sum().backward()


def test_modules_compile_with_a_break():
    moe, x = layer("modules"), inputs(torch.float32)
    assert_close(torch.compile(moe, backend="aot_eager")(x), moe(x))


def test_padding_of_followed_inputs_reaches_no_shared_expert():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.moe = nn.Embedding(9, H), layer("shared")

        def forward(self, input_ids, attention_mask=None):
            return self.moe(self.embed(input_ids))

    root, mask = Root(), torch.tensor([[1, 1, 0], [1, 0, 0]])
    tr.follow_inputs(root)
    y = root(torch.arange(6).view(2, 3), attention_mask=mask)
    assert torch.equal((y != 0).any(-1).long(), mask)


# ---- a weight for every expert -------------------------------------------------------------------


class Counted(nn.Module):
    """Experts that tell how many rows they got."""

    def __init__(self):
        super().__init__()
        self.experts, self.num_experts, self.rows = tr.SwiGLUExperts(E, H, SIZE), E, []

    def forward(self, rows, offsets):
        self.rows.append(len(rows))
        return self.experts(rows, offsets)


def test_only_active_pairs_are_computed():
    experts = Counted()
    moe, x = tr.MoE(threshold_router(), experts), inputs(torch.float32)
    _, routing = moe(x, return_routing=True)
    assert 0 < experts.rows[0] == routing.counts.sum() < T * E
    assert routing.counts.sum() == (routing.weights != 0).sum()
    assert not (routing.weights != 0).any(-1).all(), "a token without experts is part of the test"


def test_a_bound_makes_shapes_independent_of_the_routing():
    experts = Counted()
    moe, x = tr.MoE(threshold_router(), experts, max_active=2), inputs(torch.float32)
    together = torch.func.vmap(moe)(x[None])[0]
    assert experts.rows == [T * 2]
    assert_close(together, moe(x))
    # With less room than is needed, it is the last experts whose rows are missing.
    moe.max_active = 1 / T
    with torch.no_grad():
        _, routing = moe(x, return_routing=True)
        y = torch.func.vmap(moe)(x[None])[0]
    assert (y != 0).any(-1).sum() == 1
    first = (routing.weights != 0).T.nonzero()[0]  # of the first expert, the first token
    assert y[first[1]].any()


def test_nan_stays_with_its_token():
    moe, x = layer("weight per expert"), inputs(torch.float32)
    expected = moe(x)
    x[3, 2] = torch.nan
    y, others = moe(x), torch.arange(T) != 3
    assert y[3].isnan().all() and torch.equal(y[others], expected[others])


# ---- upcycling -----------------------------------------------------------------------------------


def test_upcycled_experts_begin_as_the_dense_layer():
    dense = tr.SwiGLU(H, SIZE).double()
    moe = tr.MoE(router().double(), tr.SwiGLUExperts.from_dense(dense, E))
    x = inputs()
    assert_close(moe(x), dense(x))  # the weights of a token sum to one
    assert moe.experts.gate_up_proj.dtype == torch.float64
    moe(x).sum().backward()
    grads = moe.experts.down_proj.grad
    assert not torch.equal(grads[0], grads[1])  # copies, which part from here on


def test_upcycling_takes_biases_over():
    dense = tr.SwiGLU(H, SIZE)
    for name, out, size in ("gate_proj", SIZE, H), ("up_proj", SIZE, H), ("down_proj", H, SIZE):
        setattr(dense, name, nn.Linear(size, out))
    moe = tr.MoE(router(), tr.SwiGLUExperts.from_dense(dense, E))
    x = inputs(torch.float32)
    assert_close(moe(x), dense(x))


def test_errors():
    with pytest.raises(ValueError, match=r"SwiGLUExperts: expected mlp with the linear layers"):
        tr.SwiGLUExperts.from_dense(nn.Sequential(nn.Linear(2, 2)), 3)
    with pytest.raises(ValueError, match=r"MoE: expected experts with num_experts=5"):
        tr.MoE(router(), [nn.Identity()])
    with pytest.raises(ValueError, match=r"MoE: expected max_active > 0, got 0"):
        tr.MoE(router(), tr.SwiGLUExperts(E, H, SIZE), max_active=0)
    with pytest.raises(ValueError, match=r"MoE: expected shared experts with shared_gate=True"):
        tr.MoE(router(), tr.SwiGLUExperts(E, H, SIZE), shared_gate=True)
