"""Metrics of routings: values by hand, masks, windows of batches, and what loggers get."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import torch_routers as tr
from torch_routers import metrics

TOPK = tr.TopKRouter(8, 4, 2)
nn.init.normal_(TOPK.weight, generator=torch.Generator().manual_seed(0))
BATCHES = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
MASK = torch.tensor([[True, True, False, True, True], [False, True, True, True, False]])


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def routing_of(indices, weights, counts, logits=None, tokens=None):
    """With the statistics that say how many tokens there are, if ``tokens`` is given."""
    counts = torch.tensor(counts)
    statistics = None
    if tokens is not None:
        statistics = tr.ops.Statistics(None, None, counts[None], torch.tensor([tokens]))
    indices = None if indices is None else torch.tensor(indices)
    return tr.Routing(torch.tensor(weights), indices, logits, counts, statistics)


#: Six tokens: two slots, one and another one dropped, twice both dropped, masked.
DROPPED = routing_of(
    indices=[[0, 1], [0, -1], [-1, 2], *[[-1, -1]] * 3],
    weights=[[0.25, 0.75], [0.5, 0.0], [0.0, 0.5], *[[0.0, 0.0]] * 3],
    counts=[5, 2, 2, 1],
    logits=torch.tensor(
        [[0.0] * 4, [0.0, 0.0, *[-torch.inf] * 2], [-torch.inf] * 4, *[[torch.nan] * 4] * 3]
    ),
    tokens=5,
)


# ---- values by hand ------------------------------------------------------------------------------


def test_metrics_of_counts():
    counts = torch.tensor([[5, 5, 5, 5], [8, 0, 0, 0], [3, 1, 0, 0]])
    assert_close(metrics.load(counts)[2], torch.tensor([0.75, 0.25, 0, 0], dtype=torch.float64))
    cv = scalar([0, math.sqrt(3), math.sqrt((4 + 0 + 1 + 1) / 4)])
    assert_close(metrics.load_cv(counts), cv)
    assert_close(metrics.max_share(counts), scalar([0.25, 1, 0.75]))
    assert_close(metrics.max_vio(counts), scalar([0.0, 3, 2]))
    assert metrics.dead(counts).tolist() == [0, 3, 2]


def test_counts_beyond_float32_stay_exact():
    counts = torch.tensor([2**24 + 1, 2**24])
    assert metrics.max_vio(counts) > 0


def test_an_active_expert_has_a_tenth_of_the_fair_share():
    load = torch.tensor([[100, 100, 10, 0], [50, 50, 50, 50], [60, 60, 1, 0]])
    assert metrics.active_experts(load).tolist() == [3, 4, 2]  # 10 > 52.5 / 10, 1 < 30.25 / 10


def test_mutual_information():
    independent = torch.tensor([[10, 30], [20, 60]])
    told = torch.tensor([[7, 0], [0, 7]])
    partly = torch.tensor([[3, 1], [1, 3]])
    # p = 3/8 and 1/8 against 1/4: 2 (3/8 log2 3/2 + 1/8 log2 1/2)
    expected = 2 * (3 / 8 * math.log2(3 / 2) - 1 / 8)
    values = metrics.mutual_information(torch.stack([independent, told, partly]))
    assert_close(values, scalar([0, 1, expected]))


def test_load_divergence():
    """By the entropies of the loads: 1 - (H(a) + H(b)) / 2 H(m)."""
    a = torch.tensor([[3, 1, 0], [6, 0, 0], [2, 2, 2], [5, 5, 0]])
    b = torch.tensor([[2, 6, 0], [0, 9, 0], [7, 7, 7], [0, 0, 2]])
    of_quarter = math.log(4) - 0.75 * math.log(3)
    expected = scalar(
        [1 - of_quarter / math.log(2), 1, 0, 1 - math.log(2) / 2 / (1.5 * math.log(2))]
    )
    assert_close(metrics.load_divergence(a, b), expected)
    assert_close(metrics.load_divergence(b, 10 * a), expected)
    assert metrics.load_divergence(a[1], a[1]) == 0  # of one expert nothing is to be known
    assert metrics.load_divergence(a[0], torch.zeros(3)).isnan()


def test_loads_in_equilibrium():
    gamma = torch.tensor([0.0, 0.5, 2, 8, 32, 128])
    quality = torch.randn(3, 1, 16, generator=torch.Generator().manual_seed(0)).double()
    quality *= torch.tensor([0.1, 1, 10]).view(3, 1, 1)
    rho = metrics.equilibrium_load(quality, gamma)
    assert rho.shape == (3, 6, 16)
    assert_close(rho, (quality - gamma[:, None] * rho).softmax(-1), rtol=0, atol=1e-8)
    assert_close(rho[:, 0], quality[:, 0].softmax(-1), rtol=0, atol=1e-8)
    assert (rho.amax(-1).diff() < 0).all()
    assert_close(metrics.equilibrium_load(quality + 7, gamma), rho)


def test_gamma_eff():
    """From loads 3/4 and 1/4, ln 3 = q - gamma (3/4 - 1/4)."""
    quality = torch.tensor([[math.log(3) + 0.5 * g, 0.0] for g in (0, 4, 50)])
    expected = scalar([0, 4, 50])
    values = metrics.gamma_eff(torch.tensor([3, 1]), quality)
    assert_close(values, expected, rtol=0, atol=1e-4)
    # One expert of 16 with the load 0.362 without a cost of load; the other loads are equal.
    loads = torch.tensor([0.362, *[0.638 / 15] * 15], dtype=torch.float64)
    quality = loads.log() + 12 * loads
    assert_close(metrics.gamma_eff(1000 * loads, quality), scalar(12), rtol=0, atol=1e-4)
    assert_close(metrics.gamma_eff(1000 * loads, loads.log()), scalar(0), rtol=0, atol=1e-4)


def test_gamma_eff_at_the_ends():
    quality = torch.tensor([1.0, 0.0])
    counts = torch.tensor([[5, 5], [4, 6], [9, 1], [0, 0]])  # even, too even, drawn more, nothing
    values = metrics.gamma_eff(counts, quality)
    assert_close(values, scalar([100, 100, 0, math.nan]), rtol=0, atol=1e-4, equal_nan=True)
    assert_close(metrics.gamma_eff(counts[0], quality, largest=7), scalar(7), rtol=0, atol=1e-4)


def test_metrics_of_tokens():
    """Means over the three routed tokens, or the five that are not masked."""
    assert_close(metrics.drop_rate(DROPPED), scalar(6 / 10))
    assert_close(metrics.active_mean(DROPPED), scalar(4 / 5))
    assert_close(metrics.selection_share(DROPPED), scalar([1, 0.4, 0.4, 0.2]))
    assert_close(metrics.top1_fraction(DROPPED), scalar([1 / 3, 1 / 3, 1 / 3, 0]))
    assert_close(metrics.ess(DROPPED), scalar((1 / (0.25**2 + 0.75**2) + 1 + 1) / 3))
    assert_close(metrics.entropy(DROPPED), scalar((1 + 0.5 + 0) / 3))
    assert_close(metrics.z_mean(DROPPED), scalar((math.log(4) + math.log(2) + 0) / 3))
    assert_close(metrics.load(DROPPED), scalar([0.5, 0.2, 0.2, 0.1]))


def test_a_dense_routing_uses_the_experts_that_have_weight():
    dense = routing_of(None, [[0.0, 0.5, 0.5], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], [0, 1, 2])
    assert_close(metrics.ess(dense), scalar(1.5))
    assert_close(metrics.active_mean(dense), scalar(1.5))
    assert_close(metrics.top1_fraction(dense), scalar([0, 0.5, 0.5]))  # of equals the first slot
    same = routing_of([[1, 2], [2, -1], [-1, -1]], [[0.5, 0.5], [1, 0], [0, 0]], [0, 1, 2])
    assert metrics.routing_agreement(dense, same) == (1, 1)


def test_nan_logits_are_noticed():
    routing = routing_of([[0, 1]], [[0.5, 0.5]], [1, 1], torch.tensor([[torch.nan, 0.0]]))
    assert metrics.entropy(routing).isnan() and metrics.z_mean(routing).isnan()


def test_a_single_expert_has_no_entropy():
    routing = routing_of([[0]], [[1.0]], [1], torch.tensor([[3.0]]))
    assert metrics.entropy(routing) == 0


def test_without_tokens_means_are_nan():
    routing = TOPK(BATCHES[0], valid_mask=torch.zeros_like(MASK))
    assert metrics.dead(routing) == 4
    for name in "load_cv", "max_share", "max_vio", "entropy", "z_mean", "drop_rate", "ess":
        assert getattr(metrics, name)(routing).isnan(), name


def test_logits_are_needed_for_their_metrics():
    routing = routing_of([[0]], [[1.0]], [1, 0])
    for name in "entropy", "z_mean":
        with pytest.raises(ValueError, match=f"{name}: expected a routing with logits"):
            getattr(metrics, name)(routing)


# ---- agreement -----------------------------------------------------------------------------------


def test_agreement():
    weights = [[0.6, 0.4]] * 5
    a = routing_of([[0, 1], [0, 1], [2, 3], [0, 1], [-1, -1]], weights, [3, 3, 1, 1])
    b = routing_of([[1, 0], [0, 2], [0, 1], [-1, -1], [-1, -1]], weights, [3, 2, 1, 0])
    agreement = metrics.routing_agreement(a, b)
    assert_close(agreement.jaccard, scalar((1 + 1 / 3 + 0 + 0) / 4))
    assert_close(agreement.top1, scalar((0 + 1 + 0 + 0) / 4))
    assert_close(metrics.routing_agreement(b, a), agreement)
    assert_close(metrics.router_drift(a, b), 1 - agreement.jaccard)
    assert metrics.router_drift(a, a) == 0


def test_agreement_is_of_the_same_tokens():
    with pytest.raises(ValueError, match=r"routing_agreement: expected .* \[2, 5, 4\] and \[1, 5"):
        metrics.routing_agreement(TOPK(BATCHES[0]), TOPK(BATCHES[0][:1]))


# ---- sparsity ------------------------------------------------------------------------------------

ACTIVE = torch.rand(2, 40, 6, generator=torch.Generator().manual_seed(0)) < 0.3
ACTIVE[:, ::7] = False  # tokens without experts
REAL = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) < 0.8
IDS = torch.tensor([3] * 11 + [1] + [2] * 20 + [3] * 8).expand(2, 40)


def runs(active, real, ids):
    """The documents of each sequence, without padding: one list of sets of experts for each."""
    found = []
    for sequence in range(2):
        last = None
        for token in real[sequence].nonzero().flatten().tolist():
            if last is None or ids[sequence, token] != last:
                found.append([])
                last = ids[sequence, token]
            found[-1].append(set(active[sequence, token].nonzero().flatten().tolist()))
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_sparsity_equals_a_loop_over_windows(masked, packed):
    real = REAL if masked else torch.ones_like(REAL)
    ids = IDS if packed else torch.zeros_like(IDS)
    options = {"valid_mask": REAL} if masked else {}
    options |= {"group_ids": IDS} if packed else {}
    found = runs(ACTIVE, real, ids)
    for window in 1, 2, 4, 8, 16:
        idle = [
            1 - len(set().union(*run[i : i + window])) / 6
            for run in found
            for i in range(len(run) - window + 1)
        ]
        expected = scalar(sum(idle) / len(idle))
        assert_close(metrics.chunk_sparsity(ACTIVE, window, **options), expected)
    pairs = [(a, b) for run in found for a, b in pairwise(run) if a]
    expected = scalar(sum(len(a & b) / len(a) for a, b in pairs) / len(pairs))
    assert_close(metrics.reuse_ratio(ACTIVE, **options), expected)
    tokens = metrics.token_sparsity(ACTIVE, options.get("valid_mask"))
    assert_close(tokens, metrics.chunk_sparsity(ACTIVE, 1, **options))


def test_sparsity_does_not_look_at_padding():
    mask = REAL[0]
    for name, arguments in ("chunk_sparsity", (4,)), ("reuse_ratio", ()):
        metric = getattr(metrics, name)
        compacted = metric(ACTIVE[0, mask], *arguments, group_ids=IDS[0, mask])
        for content in True, False:
            active = torch.where(mask.unsqueeze(-1), ACTIVE[0], content)
            ids = torch.where(mask, IDS[0], 99 * content)
            value = metric(active, *arguments, valid_mask=mask, group_ids=ids)
            assert torch.equal(value, compacted)
        assert metric(ACTIVE[0], *arguments, valid_mask=torch.zeros_like(mask)).isnan()
        assert metric(ACTIVE[0, :0], *arguments, valid_mask=mask[:0]).isnan()
    with pytest.raises(ValueError, match="chunk_sparsity: expected window >= 1, got 0"):
        metrics.chunk_sparsity(ACTIVE, 0)


def test_what_is_active_may_have_no_weight():
    routing = routing_of(None, [[0.0, 0.5, 0.0], [0.0, 0.0, 1.0]], [1, 1, 1])
    active = torch.tensor([[True, True, False], [False, False, True]])
    assert metrics.drop_rate(routing) > 0
    routing = routing._replace(active=active)
    assert metrics.drop_rate(routing) == 0
    assert_close(metrics.active_mean(routing), scalar(1.5))
    assert metrics.routing_agreement(routing, routing).jaccard == 1
    assert torch.equal(routing.used(), active)


# ---- masks, derivatives, devices -----------------------------------------------------------------


def hash_routing(x, valid_mask=None):
    router = tr.HashRouter(32, 4, 2)
    ids = (x[..., 0] * 100).long() % 32
    return router(x, token_ids=ids, valid_mask=valid_mask)


@pytest.mark.parametrize("route", [TOPK, hash_routing], ids=["topk", "hash"])
def test_padding_changes_nothing(route):
    x = torch.where(MASK.unsqueeze(-1), BATCHES[0], torch.nan if route is TOPK else 3.0)
    padded, compacted = route(x, valid_mask=MASK), route(BATCHES[0][MASK])
    assert_close(metrics.totals(padded), metrics.totals(compacted))
    assert int(metrics.totals(padded).tokens) == 7


def test_totals_carry_no_gradient():
    routing = TOPK(BATCHES[0])
    assert routing.weights.requires_grad
    assert not any(value.requires_grad for value in metrics.totals(routing))


def test_nothing_waits_for_the_device():
    """A tensor without content cannot be read."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        a, b = (TOPK(torch.empty(2, 5, 8), valid_mask=torch.empty(2, 5).bool()) for _ in range(2))
        for name in metrics.__all__:
            function = getattr(metrics, name)
            if name in ("routing_agreement", "router_drift", "load_divergence"):
                function(a, b)
            elif name == "gamma_eff":
                function(a, torch.empty(4))
            elif name == "equilibrium_load":
                function(torch.empty(4), torch.empty(3))
            elif name in ("by_layer", "summary"):
                function([a, b])
            elif name == "mutual_information":
                function(torch.stack([a.counts, b.counts]))
            elif name == "segment_routing_performance":
                function(a, 3)
            elif name in ("token_sparsity", "chunk_sparsity", "reuse_ratio"):
                active, mask = torch.empty(2, 9, 4).bool(), torch.empty(2, 9).bool()
                ids = {} if name == "token_sparsity" else {"group_ids": torch.empty(2, 9).long()}
                function(active, valid_mask=mask, **ids)
            elif name[0].islower() and name not in ("read", "segment_cache_hit_rate"):
                function(a)


# ---- summary and meter ---------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, losses=()):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.moe = tr.MoE(tr.TopKRouter(8, 4, 2, losses=losses), tr.SwiGLUExperts(4, 8, 6))

    def forward(self, x, valid_mask=None):
        return x + self.moe(self.norm(x), valid_mask=valid_mask)


def model(layers=2, losses=()):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), *(Block(losses) for _ in range(layers)))


def collected(model, *batches):
    with tr.collect(model) as routings:
        for x in batches:
            model(x)
    return routings


OF_LOGITS = {"entropy", "z_mean"}
PER_LAYER = {"load_cv", "max_share", "max_vio", "dead", "drop_rate", "active_mean", "ess"}
PER_LAYER |= OF_LOGITS


def test_summary_is_the_metrics_of_each_layer():
    routings = collected(model(), BATCHES[0])
    assert routings.names == ["1.moe.router", "2.moe.router"]
    values = metrics.summary(routings)
    assert values.keys() == {f"router/{name}/{m}" for name in routings.names for m in PER_LAYER}
    for name, routing in zip(routings.names, routings):
        for metric in PER_LAYER:
            expected = getattr(metrics, metric)(routing)
            assert expected.dim() == 0
            assert_close(values[f"router/{name}/{metric}"], expected)
    assert metrics.read(values) == {name: float(value) for name, value in values.items()}
    assert metrics.read({}) == {}


def test_summary_names_what_it_is_given():
    routings = list(collected(model(), BATCHES[0]))
    assert set(metrics.by_layer(routings)) == {"0", "1"}
    assert set(metrics.by_layer(routings, ["a", "b"])) == {"a", "b"}
    both = metrics.by_layer(routings, ["a", "a"])["a"]
    assert int(both.tokens) == 20
    with pytest.raises(ValueError, match="by_layer: expected one name for each of 2 routings"):
        metrics.summary(routings, ["a"])
    assert "router/ess" in metrics.summary(collected(TOPK, BATCHES[0]))  # the root has no name


def test_a_router_without_logits_has_no_metric_of_logits():
    values = metrics.summary([hash_routing(BATCHES[0])])
    assert values.keys() == {f"router/0/{metric}" for metric in PER_LAYER - OF_LOGITS}


@pytest.mark.parametrize("what", ["model", "blocks"])
def test_compiling_changes_no_name_and_compiles_the_blocks_once(what):
    m = model(layers=10)
    m.requires_grad_(False)
    if what == "model":
        forward = torch.compile(m, fullgraph=True, backend="aot_eager")
    else:
        forward = m
        for block in m[1:]:
            block.compile(fullgraph=True, backend="aot_eager")
    routings = collected(forward, BATCHES[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        again = collected(forward, BATCHES[0])
    assert again.names == routings.names == [f"{i}.moe.router" for i in range(1, 11)]
    assert_close(metrics.read(metrics.summary(again)), metrics.read(metrics.summary(routings)))


def test_two_batches_are_one_window():
    m = model()
    meter, whole = metrics.RoutingMeter(m), metrics.RoutingMeter(m)
    for x in BATCHES:
        with meter.observe():
            m(x)
    with whole.observe():
        m(torch.cat(BATCHES))
    assert_close(meter.compute(), whole.compute())
    assert meter.totals["1.moe.router"].counts.dtype == torch.int64
    assert int(meter.totals["1.moe.router"].tokens) == 30
    window = collected(m, *BATCHES)
    assert_close(meter.compute(), metrics.summary(window))
    whole.reset()
    whole.update(window)
    assert_close(meter.compute(), whole.compute())
    meter.reset()
    assert meter.compute() == {}


def test_a_window_is_no_mean_of_its_batches():
    """Batches of different size, and experts that only one of them uses."""
    a = routing_of([[0]], [[1.0]], [1, 0], torch.zeros(1, 2))
    b = routing_of([[1]] * 3, [[1.0]] * 3, [0, 3], torch.tensor([[0.0, 200.0]] * 3))
    values = metrics.read(metrics.summary([a, b], ["x", "x"]))
    assert values["router/x/dead"] == 0
    assert values["router/x/max_share"] == 0.75
    assert values["router/x/entropy"] == pytest.approx(1 / 4)


def test_observing_is_no_destination_for_losses():
    m = model(losses=[tr.losses.ZLoss(0.1)])
    with (
        pytest.raises(RuntimeError, match="MoE: expected a destination for 1 losses"),
        metrics.RoutingMeter(m).observe(),
    ):
        m(BATCHES[0])
    meter = metrics.RoutingMeter(m)
    with tr.collect(m) as routings, meter.observe():
        m(BATCHES[0])
    assert routings.aux_loss().requires_grad
    assert len(meter.totals) == 2
    collected(m, BATCHES[0])
    assert int(meter.totals["1.moe.router"].tokens) == 10  # it stopped looking


def test_a_meter_needs_a_router():
    with pytest.raises(ValueError, match="RoutingMeter: expected a model with routers, got Linear"):
        metrics.RoutingMeter(nn.Linear(2, 2))
