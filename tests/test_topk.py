"""The top-k router's capacities, noise and number of experts per call."""

import warnings

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import torch_routers as tr

T, E, H = 24, 6, 12


def make(top_k=2, **options):
    torch.manual_seed(0)
    options = {"renormalize": False, "cross_batch": "allow"} | options
    router = tr.TopKRouter(H, E, top_k, **options)
    router.weight.data *= 40
    return router


def inputs(*leading, seed=1):
    return torch.randn(*leading, H, generator=torch.Generator().manual_seed(seed))


def kept_by_loop(routing, capacity, policy):
    """Keys of what is kept of one group: (token, slot)."""
    tokens, slots = routing.indices.shape
    of_expert = {}
    for t in range(tokens):
        for j in range(slots):
            of_expert.setdefault(int(routing.indices[t, j]), []).append((t, j))
    key = {
        "position": lambda tj: (tj[1], tj[0]),
        "weight": lambda tj: (-float(routing.weights[tj]), *tj),
        "priority": lambda tj: (-float(routing.probs()[tj[0]].max()), *tj),
        "batch_priority": lambda tj: (tj[1], -float(routing.probs()[tj[0]].max()), tj[0]),
    }[policy]
    return {tj for slots in of_expert.values() for tj in sorted(slots, key=key)[:capacity]}


# ---- capacity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["position", "weight", "priority", "batch_priority"])
def test_a_capacity_keeps_those_that_the_policy_prefers(policy):
    router, x = make(drop_policy=policy), inputs(T)
    with torch.no_grad():
        free, limited = router(x), router(x, capacity=5)
    kept = kept_by_loop(free, 5, policy)
    assert len(kept) < T * 2, "nothing is dropped"
    for t in range(T):
        for j in range(2):
            is_kept = (t, j) in kept
            assert limited.indices[t, j] == (free.indices[t, j] if is_kept else -1)
            assert limited.weights[t, j] == (free.weights[t, j] if is_kept else 0)
    assert torch.equal(limited.counts, free.counts)  # before dropping


def test_batch_priority_compiles_and_breaks_ties_by_position():
    router, x = make(drop_policy="batch_priority"), inputs(T)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, capacity=4).indices, router(x, capacity=4).indices)
    alike = router(x[:1].expand(T, H), capacity=4)
    assert ((alike.indices >= 0).all(-1) == (torch.arange(T) < 4)).all()
    assert router(x[:0], capacity=4).indices.shape == (0, 2)


def test_a_capacity_factor_is_of_the_valid_tokens_of_each_sequence():
    router, x = make(capacity_factor=0.75), inputs(3, 16)
    mask = torch.ones(3, 16, dtype=torch.bool)
    mask[1, 5:] = False
    routing = router(x, valid_mask=mask)
    for b, tokens in enumerate((16, 5, 16)):
        alone = router(x[b : b + 1], valid_mask=mask[b : b + 1])
        assert torch.equal(routing.indices[b], alone.indices[0])
        capacity = -(-tokens * 2 * 3 // (4 * E))
        load = torch.bincount(routing.indices[b][routing.indices[b] >= 0], minlength=E)
        assert load.max() == capacity
    assert router.traits.batch_dependency == "sequence" and router.traits.drops_tokens


def test_a_capacity_of_the_batch_lets_sequences_influence_each_other():
    router, x = make(capacity_factor=0.75, capacity_group="batch"), inputs(3, 16)
    together = router(x)
    alone = router(x[2:])
    assert not torch.equal(together.indices[2], alone.indices[0])
    assert router.traits.batch_dependency == "batch" and not router.traits.causal


def test_packed_sequences_have_capacities_of_their_own():
    router, x = make(capacity_factor=0.5), inputs(T)
    offsets = torch.tensor([0, 7, 7, T])
    packed = router(x, group_offsets=offsets)
    apart = [router(x[:7]), router(x[7:])]
    assert torch.equal(packed.indices, torch.cat([routing.indices for routing in apart]))


def test_min_capacity():
    x = inputs(4)
    assert (make(capacity_factor=0.1)(x).indices == -1).any()
    assert (make(capacity_factor=0.1, min_capacity=8)(x).indices >= 0).all()


def test_weights_are_renormalised_after_the_drop():
    router, x = make(capacity_factor=0.5, renormalize_after_drop=True, scale=2.0), inputs(T)
    total = router(x).weights.sum(-1)
    assert ((total - 2).abs().lt(1e-5) | (total == 0)).all() and (total == 0).any()


BLIND = [  # to drops
    *(tr.losses.LoadBalanceLoss(1.0, c) for c in ("megatron", "switch", "gshard", "deepspeed")),
    tr.losses.ImportanceLoss(1.0),
    tr.losses.EntropyLoss(1.0),
    tr.losses.ZLoss(1.0),
    tr.losses.VarianceLoss(1.0),
    *(tr.losses.SpecializationLoss(1.0, usage=usage) for usage in ("top1", "topk")),
]


@pytest.mark.parametrize("loss", BLIND, ids=repr)
@pytest.mark.parametrize(
    "options", [{"capacity_factor": 0.3}, {"second_policy": "random"}, {"capacity": 0}], ids=str
)
def test_losses_see_the_choice_before_the_drop(loss, options):
    free, limited = make(losses=[loss]), make(losses=[loss], **options)
    routing, expected = limited(inputs(T)), free(inputs(T))
    assert (routing.indices < 0).any() and expected.chosen is None
    assert torch.equal(routing.choice(), expected.indices)
    assert_close(routing.aux_loss, expected.aux_loss)


def test_a_dropped_slot_has_no_gradient_and_its_token_no_output():
    router = make(top_k=1)
    moe, x = tr.MoE(router, tr.SwiGLUExperts(E, H, 8)), inputs(T).requires_grad_()
    y, routing = moe(x, return_routing=True, capacity=2)
    dropped = routing.indices[:, 0] == -1
    assert dropped.any() and (y[dropped] == 0).all() and (y[~dropped] != 0).any(-1).all()
    y.sum().backward()
    assert (x.grad[dropped] == 0).all()


def test_eval_with_capacities_over_the_batch_warns():
    with pytest.warns(tr.CrossBatchRoutingWarning, match="TopKRouter: expected routing that"):
        make(capacity_factor=1.0, capacity_group="batch", cross_batch="warn").eval()
    with pytest.raises(ValueError, match="TopKRouter: expected routing that does not depend"):
        make(capacity_factor=1.0, capacity_group="batch", cross_batch="raise").eval()
    router = make(cross_batch="raise").eval()
    with pytest.raises(ValueError, match="capacities over the whole batch"):
        router(inputs(T), capacity=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(capacity_factor=1.0, cross_batch="warn").eval()(inputs(2, 7))
        router(inputs(2, 7), capacity=3)
        make(capacity_factor=1.0, capacity_group="batch").eval()


def test_random_drops_are_those_of_a_seed_and_the_token():
    router, x = make(drop_policy="random", capacity_factor=0.5), inputs(T)
    ids = torch.arange(100, 100 + T)
    first, again = (router(x, seed=3, row_ids=ids) for _ in range(2))
    assert torch.equal(first.indices, again.indices)
    assert not torch.equal(first.indices, router(x, seed=4, row_ids=ids).indices)
    order = torch.randperm(T)
    assert torch.equal(router(x[order], seed=3, row_ids=ids[order]).indices, first.indices[order])
    router.eval()
    assert torch.equal(router(x).indices, router(x).indices)
    by_call = make(drop_policy="random")
    assert torch.equal(by_call(x, capacity_factor=0.5, seed=3, row_ids=ids).indices, first.indices)


# ---- experts per token ---------------------------------------------------------------------------


def test_the_number_of_experts_can_be_that_of_the_call():
    router, x = make(), inputs(T)
    assert torch.equal(router(x, top_k=1).indices, router(x).indices[:, :1])
    assert router(x, top_k=4).indices.shape == (T, 4)
    slots = torch.arange(T) % 3
    routing = router(x, top_k=slots)
    assert torch.equal((routing.indices >= 0).sum(-1), slots)
    assert routing.counts.sum() == slots.sum()


# ---- noise ---------------------------------------------------------------------------------------

NOISES = [{"jitter": 0.3}, {"noise": "gumbel"}, {"noise": "normal", "noise_scale": 0.5}]


@pytest.mark.parametrize("options", NOISES, ids=str)
def test_noise_is_of_training_alone(options):
    router, x = make(**options), inputs(T)
    assert router.traits.random
    assert not torch.equal(router(x).logits, make()(x).logits)
    router.eval()
    assert torch.equal(router(x).logits, make()(x).logits)


@pytest.mark.parametrize("options", NOISES, ids=str)
def test_noise_of_a_token_does_not_depend_on_its_batch(options):
    router, x, ids = make(**options), inputs(T), torch.arange(T) + 7
    whole = router(x, seed=5, row_ids=ids)
    order = torch.randperm(T)[:9]
    part = router(x[order], seed=5, row_ids=ids[order])
    assert_close(part.logits, whole.logits[order])
    folded = router(x.view(4, 6, H), seed=5, row_ids=ids.view(4, 6))
    assert_close(folded.logits.view(T, E), whole.logits)
    assert not torch.equal(router(x, seed=6, row_ids=ids).logits, whole.logits)


@pytest.mark.parametrize("options", NOISES, ids=str)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_draws_the_same_noise_again(options, use_reentrant):
    gradients = []
    for run in (lambda f, x: f(x)), lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant):
        router, x = make(**options), inputs(T).requires_grad_()
        torch.manual_seed(3)
        run(lambda x, router=router: router(x).weights, x).square().sum().backward()
        gradients.append((x.grad, router.weight.grad))
    assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("options", NOISES, ids=str)
def test_noise_compiles(options):
    router, x = make(**options), inputs(T)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, seed=3).logits, router(x, seed=3).logits)
    compiled(x)


def test_jitter_stays_within_its_bounds_and_leaves_the_input_alone():
    router, x = make(jitter=0.1), torch.ones(4000, H)
    router.weight.data.copy_(torch.eye(E, H))
    factors = router(x).logits
    assert (x == 1).all()
    assert 0.9 < factors.min() < 0.901 and 1.099 < factors.max() < 1.1
    assert_close(factors.mean(), torch.tensor(1.0), rtol=0, atol=0.002)


@pytest.mark.parametrize("noise, std", [("normal", 1.0), ("gumbel", 1.2825)])
def test_noise_has_its_standard_deviation(noise, std):
    router = make(noise=noise, noise_scale=2.0)
    logits = router(torch.zeros(20000, H)).logits
    assert_close(logits.std(), torch.tensor(2 * std), rtol=0.02, atol=0)
    assert torch.corrcoef(logits.T).fill_diagonal_(0).abs().max() < 0.04


# ---- the random second choice --------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"renormalize": True, "scale": 3.0}, {}], ids=str)
def test_a_second_choice_is_kept_as_often_as_twice_its_weight(options):
    router = make(second_policy="random", **options)
    assert router.traits.random and not router.traits.drops_tokens
    router.weight.data.copy_(torch.eye(E, H))
    second = torch.tensor([0.4, 0.25, 0.1, 0.01, 0.5])
    x = torch.full((20000, len(second), H), -30.0)
    x[..., 3], x[..., 1] = (1 - second).log(), second.log() - 1e-4
    routing = router(x)
    kept = routing.indices[..., 1] >= 0
    assert (routing.indices[..., 0] == 3).all() and (routing.indices[..., 1][kept] == 1).all()
    rate, chance = kept.double().mean(0), 2 * second.double()
    error = (chance * (1 - chance) / len(x)).sqrt()
    assert ((rate - chance).abs() <= 5 * error + 1e-3).all(), rate
    scale = options.get("scale", 1)
    expected = scale * torch.stack([1 - second, second], -1).expand(len(x), -1, -1)
    expected = torch.where(routing.indices >= 0, expected, 0)
    assert_close(routing.weights, expected, rtol=1e-3, atol=1e-4)


def test_who_loses_the_second_choice_is_a_matter_of_seed_and_token():
    router, x, ids = make(second_policy="random"), inputs(T), torch.arange(T) + 50
    whole = router(x, seed=5, row_ids=ids)
    lost = (whole.indices < 0)[:, 1]
    assert lost.any() and not lost.all()
    order = torch.randperm(T)[:9]
    part = router(x[order], seed=5, row_ids=ids[order])
    assert torch.equal(part.indices, whole.indices[order])
    assert torch.equal(router(x, seed=5, row_ids=ids).indices, whole.indices)
    assert not torch.equal(router(x, seed=6, row_ids=ids).indices, whole.indices)
    padded = torch.cat([torch.full((5, H), torch.nan), x])
    mask, ids = torch.arange(T + 5) >= 5, torch.arange(T + 5) + 45
    masked = router(padded, valid_mask=mask, seed=5, row_ids=ids)
    assert torch.equal(masked.indices[5:], whole.indices) and (masked.indices[:5] == -1).all()
    assert torch.equal(masked.weights[5:], whole.weights)


def test_a_second_choice_is_lost_in_training_alone_and_not_again_in_a_replay():
    router, x = make(second_policy="random"), inputs(T)
    plain = make()(x)
    routing = router(x)
    assert torch.equal(routing.counts, plain.counts)  # as losses see them: before the drop
    for replay in router(x, indices=plain.indices), router.eval()(x):
        assert torch.equal(replay.indices, plain.indices)
        assert torch.equal(replay.weights, plain.weights)
    router.train()
    replay = router(x, indices=routing.indices)
    assert torch.equal(replay.indices, routing.indices)
    assert torch.equal(replay.weights, routing.weights)


def test_a_second_choice_that_is_lost_takes_no_place():
    """In an expert with a capacity; and what is kept can be renormalised."""
    options = {"second_policy": "random", "renormalize_after_drop": True}
    router, x, ids = make(**options), inputs(T), torch.arange(T)
    routing = router(x, seed=1, row_ids=ids)
    assert_close(routing.weights.sum(-1), torch.ones(T))
    load = routing.indices[routing.indices >= 0].bincount(minlength=E)
    assert load.max() < routing.counts.max()
    limited = router(x, seed=1, row_ids=ids, capacity=int(load.max()))
    assert torch.equal(limited.indices, routing.indices)


def test_a_random_second_choice_compiles_and_repeats_itself_in_a_checkpoint():
    router, x = make(second_policy="random"), inputs(T)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, seed=3).indices, router(x, seed=3).indices)
    gradients = []
    for run in (lambda f: f(x)), lambda f: checkpoint(f, x, use_reentrant=False):
        torch.manual_seed(3)
        loss = run(lambda x: router(x).weights).square().sum()
        gradients.append(torch.autograd.grad(loss, router.weight)[0])
    assert_close(*gradients, rtol=0, atol=0)


def test_a_random_second_choice_needs_two():
    with pytest.raises(ValueError, match=r"expected top_k=2 with second_policy=.random., got 3"):
        make(3, second_policy="random")
    with pytest.raises(ValueError, match="expected second_policy among"):
        make(second_policy="sampled")
    router, x = make(second_policy="random"), inputs(T)
    assert router(x, top_k=1).indices.shape == (T, 1)
    with pytest.raises(ValueError, match=r"expected top_k <= 2 with second_policy=.random., got 3"):
        router(x, top_k=3)


# ---- sequence-wise losses ------------------------------------------------------------------------


def test_losses_of_sequences_are_the_mean_over_them():
    """Samples of a batch, or the sequences of a pack; the other losses stay those of all tokens."""
    losses = [tr.losses.SequenceBalanceLoss(0.1), tr.losses.LoadBalanceLoss(0.1)]
    router, x = make(losses=losses), inputs(3, 8)
    offsets = torch.tensor([0, 8, 16, T])
    alone = torch.stack([router(sample).losses["load_balance"] for sample in x])
    for routing in router(x), router(x.view(T, H), group_offsets=offsets):
        assert_close(routing.losses["sequence_balance"], alone.mean())
        assert_close(routing.losses["load_balance"], router(x.view(T, H)).losses["load_balance"])
        routing.aux_loss.backward()
    assert router.weight.grad.any()
