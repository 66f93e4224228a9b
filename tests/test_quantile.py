"""Quantile balancing: the prices of experts, and the controller that follows them."""

import copy
import itertools
import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

import torch_routers as tr
from ranks import Ranks
from test_delivery import BATCHES, CHECKPOINTS, compiled
from test_delivery import model as delivery_model

quantile_dual = tr.ops.quantile_dual


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- the operator --------------------------------------------------------------------------------


def dual_by_sorting(scores, dual, slots, nonnegative=False):
    """Token by token and expert by expert; ``slots`` is a list, 0 for who does not take part."""
    experts = len(dual)
    least = 0.0 if nonnegative else -torch.inf
    margins, total = [], 0
    for row, k in zip(scores.tolist(), slots):
        if 0 < k < experts:
            by_value = sorted((z - b for z, b in zip(row, dual.tolist())), reverse=True)
            alpha = max(least, by_value[k])
            margins.append([z - alpha for z in row])
            total += k
    if not margins:
        return dual
    share = total // experts
    columns = (sorted(column, reverse=True) for column in zip(*margins))
    return torch.tensor([max(least, column[share]) for column in columns], dtype=dual.dtype)


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize(
    "tokens, experts, top_k", [(64, 8, 2), (10, 4, 1), (37, 5, 3), (7, 6, 5), (3, 16, 2), (1, 2, 1)]
)
def test_equals_sorting(tokens, experts, top_k, nonnegative):
    scores, dual = normal(tokens, experts), 0.5 * normal(experts, seed=1)
    expected = dual_by_sorting(scores, dual, [top_k] * tokens, nonnegative)
    assert quantile_dual(scores, dual, top_k, nonnegative=nonnegative).equal(expected)
    slots = torch.arange(tokens) % (top_k + 1)
    expected = dual_by_sorting(scores, dual, slots.tolist(), nonnegative)
    options = {"token_top_k": slots, "nonnegative": nonnegative}
    assert quantile_dual(scores, dual, top_k, **options).equal(expected)


def test_example_by_hand():
    """Two of four tokens each: the third largest margin of a column to the token's second best."""
    scores = torch.tensor([[4.0, 0.0], [3.0, 1.0], [2.0, -1.0], [1.0, 0.5]])
    # Seconds 0, 1, -1, 0.5: margins 4, 2, 3, 0.5 and 0, 0, 0, 0.
    assert quantile_dual(scores, torch.zeros(2), 1).tolist() == [2, 0]
    # With prices 5 and 0 the seconds are -1, -2, -3, -4: margins 5, 5, 5, 5 and 1, 3, 2, 4.5.
    assert quantile_dual(scores, torch.tensor([5.0, 0.0]), 1).tolist() == [5, 2]


def test_masked_equals_compacted():
    scores, dual, mask = normal(20, 6), normal(6, seed=1), torch.arange(20) % 3 > 0
    expected = quantile_dual(scores[mask], dual, 2)
    for content in 0.0, 1e3, torch.nan, torch.inf, -torch.inf:
        padded = torch.where(mask[:, None], scores, content).view(4, 5, 6)
        assert quantile_dual(padded, dual, 2, valid_mask=mask.view(4, 5)).equal(expected)
    assert not quantile_dual(scores, dual, 2).equal(expected)


def test_without_tokens_prices_stay():
    dual = normal(4)
    nobody = torch.zeros(3, dtype=torch.bool)
    for nonnegative in False, True:
        stay = partial(quantile_dual, dual=dual, nonnegative=nonnegative)
        assert stay(normal(0, 4), top_k=2).equal(dual)
        assert stay(normal(3, 4), top_k=2, valid_mask=nobody).equal(dual)
        assert stay(normal(3, 4), top_k=2, token_top_k=nobody.long()).equal(dual)
        assert stay(normal(3, 4), top_k=4).equal(dual)  # nobody has a choice
    assert quantile_dual(normal(3, 1), dual[:1], 1).equal(dual[:1])


def test_tokens_that_get_every_expert_take_no_share():
    scores, dual, slots = normal(12, 4), normal(4, seed=1), torch.tensor([4, 1, 2, 4] * 3)
    expected = quantile_dual(scores[slots < 4], dual, 2, token_top_k=slots[slots < 4])
    assert quantile_dual(scores, dual, 4, token_top_k=slots).equal(expected)


def test_fewer_slots_than_experts_price_by_the_largest_margin():
    scores = normal(3, 16)
    margins = scores - scores.topk(3).values[:, 2:]
    assert quantile_dual(scores, torch.zeros(16).double(), 2).equal(margins.amax(0))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_tokens_that_are_not_finite_spoil_no_price(bad):
    scores, dual = normal(30, 6), normal(6, seed=1)
    scores[:2] = bad
    assert quantile_dual(scores, dual, 2).equal(quantile_dual(scores[2:], dual, 2))
    scores[1] = normal(6, seed=2)
    scores[0, 1:] = 0  # of the first token one score alone
    moved = quantile_dual(scores, dual, 2)
    assert moved.isfinite().all()
    assert bad == bad or moved.equal(quantile_dual(scores[1:], dual, 2))
    scores = normal(30, 6)
    scores[:, 4] = bad  # an expert that nobody may have, or that everybody must
    moved = quantile_dual(scores, dual, 2)
    assert moved.isfinite().all() and moved[4] == dual[4]


def test_dtypes():
    scores, dual = normal(30, 6, dtype=torch.float32).bfloat16(), torch.linspace(-1, 1, 6)
    moved = quantile_dual(scores, dual, 2)
    assert moved.dtype == torch.float32 and moved.equal(quantile_dual(scores.float(), dual, 2))
    assert quantile_dual(scores.double(), dual, 2).dtype == torch.float64


def test_has_no_gradient():
    scores = normal(30, 6).requires_grad_()
    assert not quantile_dual(scores, normal(6, seed=1).requires_grad_(), 2).requires_grad


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(dynamic):
    function = torch.compile(quantile_dual, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in 20, 33:
        scores, dual, mask = normal(tokens, 6), normal(6, seed=1), torch.arange(tokens) % 3 > 0
        expected = quantile_dual(scores, dual, 2, valid_mask=mask)
        assert function(scores, dual, 2, valid_mask=mask).equal(expected)


def test_errors_of_the_operator():
    scores, dual = torch.zeros(3, 4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"quantile_dual: expected scores .* and a dual .* \[5\]"):
        quantile_dual(scores, torch.zeros(5), 2)
    with pytest.raises(ValueError, match=r"got torch.int64 of shape \[3, 4\] and \[4\]"):
        quantile_dual(scores.long(), dual, 2)
    for top_k in 0, 5:
        with pytest.raises(ValueError, match=rf"top_k in \[1, num_experts=4\], got {top_k}"):
            quantile_dual(scores, dual, top_k)
    with pytest.raises(ValueError, match=r"token_top_k of shape \[3\], .* got \[2\]"):
        quantile_dual(scores, dual, 2, token_top_k=torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"valid_mask of shape \[3\], .* got \[1, 3\]"):
        quantile_dual(scores, dual, 2, valid_mask=torch.ones(1, 3, dtype=torch.bool))


# ---- the controller ------------------------------------------------------------------------------

E = 4


def with_bias(**options):
    return tr.TopKRouter(8, E, 2, selection_bias="logits", **options)


model = partial(delivery_model, router=with_bias)


def routers(model):
    return [block.moe.router for block in model[1:]]


def biases(model):
    return torch.stack([router.expert_bias for router in routers(model)])


def single_router(**options):
    router = with_bias(**options)
    router.weight.data = normal(E, 8, dtype=torch.float32)
    router.expert_bias += torch.tensor([0.5, -0.5, 0.25, -0.25])
    return router


def learn(router, *calls):
    for x, context in calls:
        router(x, **context).weights.sum().backward()


def logits_of(router, x):
    return (x.flatten(0, -2) @ router.weight.detach().T).double()


def expected_bias(bias, parts, ema):
    """``parts``: logits and the slots of each token, for each micro-batch of each rank."""
    beta, total, tokens = -bias.double(), 0.0, 0
    for logits, slots in parts:
        n = sum(k > 0 for k in slots)
        total, tokens = total + n * dual_by_sorting(logits, beta, slots), tokens + n
    beta = ema * beta + (1 - ema) * total / tokens
    return (beta.mean() - beta).float()


def test_a_step_is_the_mean_of_micro_batches_by_their_tokens():
    router, mask = single_router(), torch.arange(10).view(2, 5) % 3 > 0
    controller, bias = tr.QuantileController(router, ema=0.3), router.expert_bias.clone()
    slots = torch.tensor([[1, 2, 0, 2, 1], [2, 2, 1, 0, 1]])
    calls = [
        (BATCHES[0], {}),
        (BATCHES[1], {"valid_mask": mask}),
        (BATCHES[2], {"top_k": slots, "valid_mask": mask}),
        (BATCHES[0][:0], {}),
        (BATCHES[0][:1], {"top_k": 1}),
    ]
    parts = [
        (
            logits_of(router, x),
            torch.broadcast_to(torch.as_tensor(k), x.shape[:-1]).flatten().tolist(),
        )
        for (x, _), k in zip(calls, [2, 2 * mask, slots * mask, 2, 1])
    ]
    learn(router, *calls)
    assert router.expert_bias.equal(bias)  # until the step
    controller.step()
    assert_close(router.expert_bias, expected_bias(bias, parts, 0.3), rtol=0, atol=1e-6)
    assert router.expert_bias.dtype == torch.float32
    after = router.expert_bias.clone()
    controller.ema = 0.0  # what was measured is gone: only the new bias matters
    learn(router, calls[0])
    controller.step()
    assert_close(router.expert_bias, expected_bias(after, parts[:1], 0.0), rtol=0, atol=1e-6)


def test_a_step_without_tokens_moves_nothing():
    router, nobody = single_router(), torch.zeros(2, 5, dtype=torch.bool)
    router.expert_bias += 1  # nor is the mean subtracted
    controller, bias = tr.QuantileController(router), router.expert_bias.clone()
    controller.step()
    learn(router, (BATCHES[0][:0], {}), (BATCHES[0], {"valid_mask": nobody}))
    controller.step()
    assert router.expert_bias.equal(bias)


def test_neither_eval_nor_padding_counts():
    router, mask = single_router(), torch.arange(10).view(2, 5) % 3 > 0
    controller, bias = tr.QuantileController(router, ema=0.0), router.expert_bias.clone()
    padded = torch.where(mask[..., None], BATCHES[0], torch.nan)
    learn(router.eval(), (BATCHES[1], {}))
    controller.step()
    assert router.expert_bias.equal(bias)
    learn(router.train(), (padded, {"valid_mask": mask}))
    learn(router.eval(), (BATCHES[2], {}))
    controller.step()
    assert router.expert_bias.equal(bias)  # frozen, and what was measured is gone
    learn(router.train(), (padded, {"valid_mask": mask}))
    learn(router.eval(), (BATCHES[2], {}))
    router.train()
    controller.step()
    other = single_router()
    controller = tr.QuantileController(other, ema=0.0)
    learn(other, (BATCHES[0][mask], {}))
    controller.step()
    assert_close(router.expert_bias, other.expert_bias, rtol=0, atol=1e-6)
    assert not router.expert_bias.equal(bias)


def test_what_was_chosen_counts_also_where_it_is_dropped():
    results = []
    for capacity in None, 1:
        router = single_router(capacity=capacity)
        controller = tr.QuantileController(router)
        learn(router, (BATCHES[0], {}))
        controller.step()
        results.append(router.expert_bias)
    assert results[0].equal(results[1])


def trained(checkpointing="none", compile=None, micro_batches=3, first=False, backend="aot_eager"):
    """The biases after two steps."""
    m = model(checkpointing)
    for router in routers(m):
        router.expert_bias += torch.tensor([0.1, -0.1, 0.2, -0.2])
    controller, forward = tr.QuantileController(m, ema=0.5), compiled(m, compile, backend)
    for _ in range(2):
        results = []
        for x in BATCHES[:micro_batches]:
            results.append(forward(x).square().mean())
            if not first:
                results.pop().backward()
        for result in results:
            result.backward()
        controller.step()
    return biases(m)


@pytest.mark.parametrize("checkpointing", CHECKPOINTS)
@pytest.mark.parametrize("compile", [None, "model", "blocks"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_tokens_count_once_in_every_mode(checkpointing, compile, micro_batches):
    expected = trained(micro_batches=micro_batches)
    assert (expected.std(-1) > 0.01).all()
    assert_close(trained(checkpointing, compile, micro_batches), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "checkpointing, compile", [*itertools.product(CHECKPOINTS, [None, "model"])]
)
def test_tokens_count_once_when_all_forwards_come_first(checkpointing, compile):
    assert_close(trained(checkpointing, compile, first=True), trained(), rtol=0, atol=1e-5)


def test_tokens_count_with_inductor():
    assert_close(trained("none", "model", backend="inductor"), trained(), rtol=0, atol=1e-5)


def test_a_second_backward_counts_nothing():
    results = []
    for times in 1, 2:
        router = single_router()
        controller = tr.QuantileController(router)
        learn(router, (BATCHES[0], {}))
        loss = router(BATCHES[1][:, :2]).weights.sum()
        for _ in range(times):
            loss.backward(retain_graph=True)
        controller.step()
        results.append(router.expert_bias)
    assert results[0].equal(results[1])


def test_copies_measure_for_themselves_and_the_state_is_the_bias():
    m = model()
    controller = tr.QuantileController(m)
    assert {name.split(".")[-1] for name in m[1].moe.router.state_dict()} == {
        "weight",
        "expert_bias",
    }
    for other in copy.deepcopy(m[1].moe), pickle.loads(pickle.dumps(m[1].moe)):
        other(BATCHES[0]).sum().backward()
    controller.step()
    assert not biases(m).any()
    m(BATCHES[0]).sum().backward()
    controller.remove()
    m(BATCHES[0]).sum().backward()
    controller = tr.QuantileController(m)
    controller.step()
    assert not biases(m).any()


# ---- what it is for ------------------------------------------------------------------------------


def skewed(seed):
    """Logits of 256 tokens for 16 experts, some of which everybody likes."""
    return normal(256, 16, seed=seed) + normal(16, seed=seed + 100)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("seed", range(3))
def test_balances_within_five_steps(seed, score):
    """The router's input is the logits: its weight is the identity."""
    x = skewed(seed)
    router = tr.TopKRouter(16, 16, 2, score=score, selection_bias="logits")
    router.weight.data = torch.eye(16)
    controller, vio = tr.QuantileController(router, ema=0.0), []
    for _ in range(6):
        routing = router(x)
        vio.append(tr.metrics.max_vio(routing).item())
        routing.weights.sum().backward()
        controller.step()
    assert vio[0] > 2 and vio[1] < 0.5 * vio[0] and vio[5] < 0.25
    assert vio[5] < vio[1]
    # The weights are those of the experts without the bias.
    expected, _ = tr.ops.gate(x, routing.indices, score=score)
    assert_close(routing.weights, expected)


def test_an_average_over_steps_gets_there_too_and_steps_of_a_sign_do_not():
    router = tr.TopKRouter(16, 16, 2, selection_bias="logits")
    router.weight.data = torch.eye(16)
    other = copy.deepcopy(router)
    ours, theirs = tr.QuantileController(router, ema=0.9), tr.BalanceController(other)
    for step in range(50):
        x = skewed(0)[torch.randperm(256, generator=torch.Generator().manual_seed(step))[:128]]
        for each in router, other:
            each(x).weights.sum().backward()
        ours.step()
        theirs.step()
    vio, of_signs = (tr.metrics.max_vio(each(skewed(0))) for each in (router, other))
    assert vio < 0.5 and of_signs > 2


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_that_prices_itself_is_balanced(seed):
    """Steps on the same batch, with prices that are at least 0: arXiv 2502.15451."""
    scores, dual, vio = skewed(seed).softmax(-1), torch.zeros(16).double(), []
    for _ in range(15):
        chosen = (scores - dual).topk(2).indices
        vio.append(tr.metrics.max_vio(chosen.flatten().bincount(minlength=16)).item())
        dual = quantile_dual(scores, dual, 2, nonnegative=True)
    assert vio[0] > 1.5 and vio[4] < 0.5 * vio[0] and vio[14] < 0.35
    assert (dual >= 0).all() and dual.any()


@pytest.mark.parametrize("top_k", [1, 3])
def test_each_step_lowers_the_dual_of_the_assignment(top_k):
    """Its value bounds the sum of scores of every balanced assignment from above."""
    scores, dual = normal(48, 6) + 2 * normal(6, seed=1), torch.zeros(6).double()
    values = []
    for _ in range(10):
        best = (scores - dual).topk(top_k).values.sum()
        values.append((best + 48 * top_k / 6 * dual.sum()).item())
        dual = quantile_dual(scores, dual, top_k)
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(values))
    balanced = (torch.arange(48)[:, None] + torch.arange(top_k)) % 6
    assert scores.gather(1, balanced).sum() < values[-1] < values[0] - 1


# ---- several ranks -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as ranks:
        yield ranks


def balance_on_ranks(tokens):
    rank, router = dist.get_rank(), single_router()
    controller, single = tr.QuantileController(router, ema=0.3), single_router()
    for step in range(3):
        parts = normal(sum(tokens), 8, seed=step, dtype=torch.float32).split(tokens)
        logits = [(logits_of(single, x), [2] * len(x)) for x in parts]
        single.expert_bias.copy_(expected_bias(single.expert_bias, logits, 0.3))
        router(parts[rank]).weights.sum().backward()
        controller.step()
        assert_close(router.expert_bias, single.expert_bias, rtol=0, atol=1e-5)
    biases = [torch.empty(E) for _ in tokens]
    dist.all_gather(biases, router.expert_bias)
    assert all(bias.equal(biases[0]) for bias in biases) and biases[0].any()


@pytest.mark.parametrize("tokens", [[20, 20], [30, 5], [24, 0]], ids=str)
def test_ranks_balance_together(ranks, tokens):
    ranks(balance_on_ranks, 2, tokens=tokens)


def balance_alone():
    rank = dist.get_rank()
    groups = [dist.new_group([0]), dist.new_group([1])]
    router, x = single_router(), normal(20, 8, seed=rank, dtype=torch.float32)
    controller = tr.QuantileController(router, ema=0.3, group=groups[rank])
    expected = expected_bias(router.expert_bias, [(logits_of(router, x), [2] * 20)], 0.3)
    learn(router, (x, {}))
    controller.step()
    assert_close(router.expert_bias, expected, rtol=0, atol=1e-5)


def test_a_group_of_ranks_balances_for_itself(ranks):
    ranks(balance_alone, 2)


# ---- errors --------------------------------------------------------------------------------------


def test_errors():
    for ema in -0.1, 1.0:
        with pytest.raises(ValueError, match=rf"expected ema in \[0, 1\), got {ema}"):
            tr.QuantileController(with_bias(), ema=ema)
    with pytest.raises(ValueError, match="QuantileController: expected a model with routers, got"):
        tr.QuantileController(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r'TopKRouter\. Build them with selection_bias="logits"'):
        tr.QuantileController(tr.TopKRouter(8, E, 2))
    of_scores = tr.TopKRouter(8, E, 2, selection_bias=True)
    with pytest.raises(ValueError, match=r"added to the logits, got one to the scores in '0'\. Bu"):
        tr.QuantileController(torch.nn.Sequential(of_scores))
    with pytest.raises(ValueError, match=r"without groups of experts, got num_groups=2 in '0'"):
        tr.QuantileController(torch.nn.Sequential(with_bias(num_groups=2, topk_group=1)))
    router = with_bias()
    controller = tr.QuantileController(router)
    for other in tr.QuantileController, tr.BalanceController:
        with pytest.raises(ValueError, match=rf"{other.__name__}: expected a model without a con"):
            other(router)
    controller.remove()
    tr.BalanceController(router)
