"""The auxiliary losses: worked examples, gradients, and what they refuse."""

import copy
import json
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import torch_routers as tr
from torch_routers.losses import (
    entropy,
    expected_load,
    load_balance,
    transformers_load_balance,
    z_loss,
)
from torch_routers.losses import importance as importance_of

LOGITS = torch.tensor(
    [[2, 1, 0], [0, 2, 1], [3, 0, 1], [1, 0.5, 0]], dtype=torch.float64, requires_grad=True
)


MASK = torch.tensor([True, True, False, True, False, False, True, True, False, False])


def statistics(logits, top_k=2, **options):
    return tr.ops.topk_gate(logits, top_k, statistics=True, **options)[2]


def routing(logits, top_k=2, **options):
    weights, indices, s = tr.ops.topk_gate(logits, top_k, statistics=True, **options)
    return with_load(
        tr.Routing(weights, indices, logits, s.group_counts.sum(0), s), options.get("valid_mask")
    )


def with_load(routing, valid_mask=None):
    """As a router would whose noise depends on the logits alone."""
    logits, top_k = routing.logits, routing.indices.shape[-1]
    if valid_mask is not None:  # as Router does with its input
        logits = torch.where(valid_mask.unsqueeze(-1), logits, 0)
    noisy = logits + (9 * logits).sin()
    load = expected_load(logits, noisy, logits.sigmoid(), top_k, valid_mask=valid_mask)
    return routing._replace(load=load)


class NoisyTopK(tr.TopKRouter):
    def route(self, x, *, valid_mask, **context):
        return with_load(super().route(x, valid_mask=valid_mask, **context), valid_mask)


def balance(logits, **options):
    s = statistics(logits, **options)
    return load_balance(s.score_sums[0], s.group_counts[0], s.group_tokens[0])


def z(logits, **options):
    s = statistics(logits, **options)
    return z_loss(s.lse, s.group_tokens[0])


def importance(logits, unbiased=False, **options):
    return importance_of(statistics(logits, **options).score_sums[0], unbiased=unbiased)


def test_balance_of_a_worked_example():
    """Counts 3, 3, 2 of two slots per token; mean probabilities .526, .315, .159."""
    assert_close(balance(LOGITS).item(), 1.0654427, rtol=0, atol=5e-8)
    gradient = torch.autograd.grad(balance(LOGITS), LOGITS)[0][0]
    expected = torch.tensor([0.0056149, 0.0020656, -0.0076805], dtype=torch.float64)
    assert_close(gradient, expected, rtol=0, atol=5e-8)


@pytest.mark.parametrize(
    "convention, expected",
    [
        ("megatron", 1.0654427),
        ("switch", 2.1308854),
        ("gshard", 1.4204654),
        ("deepspeed", 1.0654427),
    ],
)
def test_conventions_of_balance_of_a_worked_example(convention, expected):
    """First choices 3, 1, 0."""
    loss = tr.losses.LoadBalanceLoss(1.0, convention)(routing(LOGITS))
    assert_close(loss.item(), expected, rtol=0, atol=5e-8)


def test_balance_of_deepspeed_counts_empty_slots_that_of_megatron_does_not():
    indices = torch.tensor([[0, 1], [1, -1], [-1, -1], [0, -1]])
    full, counts = LOGITS.softmax(1).sum(0), torch.tensor([2, 2, 0])
    _, s = tr.ops.gate(LOGITS, indices, statistics=True)
    partly_empty = tr.Routing(s.lse, indices, LOGITS, s.group_counts[0], s)
    for convention, slots in ("megatron", 4), ("deepspeed", 8), ("switch", 4), ("gshard", 4):
        of = torch.tensor([2, 1, 0]) if convention == "gshard" else counts
        expected = 3 * (of / slots * full / 4).sum()
        assert_close(tr.losses.LoadBalanceLoss(1.0, convention)(partly_empty), expected)


def test_the_loss_of_transformers_is_one_product_over_all_layers():
    layers = [torch.randn(tokens, 4, dtype=torch.float64) for tokens in (5, 7)]
    all_tokens = torch.cat(layers)
    shares = F.one_hot(all_tokens.topk(2).indices, 4).double().sum(1).mean(0)
    expected = 4 * (shares * all_tokens.softmax(1).mean(0)).sum()
    assert_close(transformers_load_balance(routing(layer) for layer in layers), expected)


def test_the_loss_of_transformers_is_top_k_times_that_of_megatron_on_one_layer():
    expected = tr.losses.LoadBalanceLoss(2.0)(routing(LOGITS)) * 2
    assert_close(transformers_load_balance([routing(LOGITS)]), expected)
    assert_close(expected.item(), 2.1308854, rtol=0, atol=5e-8)


def test_opposite_imbalances_of_two_layers_cancel_in_the_loss_of_transformers():
    left, right = (routing(99 * torch.eye(2)[[e, e, e]], top_k=1) for e in (0, 1))
    assert_close(transformers_load_balance([left, right]), torch.tensor(1.0))
    assert_close(tr.losses.LoadBalanceLoss(1.0)(left), torch.tensor(2.0))


def test_the_loss_of_transformers_says_which_routings_it_needs():
    said = "transformers_load_balance: expected routings with the same number of experts, got "
    with pytest.raises(ValueError, match=said + "none"):
        transformers_load_balance([])
    with pytest.raises(ValueError, match=said + r"\[3, 4\]"):
        transformers_load_balance([routing(LOGITS), routing(torch.randn(4, 4).double())])
    with pytest.raises(ValueError, match="transformers_load_balance: expected a routing with stat"):
        transformers_load_balance([tr.TopKRouter(6, 4, 2)(torch.randn(9, 6))])


def test_balance_of_sequences_is_the_mean_of_that_of_each():
    """Sequences without tokens are none."""
    offsets = torch.tensor([0, 1, 4, 4])
    expected = (balance(LOGITS[:1]) + balance(LOGITS[1:])) / 2
    loss = tr.losses.SequenceBalanceLoss(1.0)(routing(LOGITS, group_offsets=offsets))
    assert_close(loss, expected)


def test_balance_of_sequences_sees_what_cancels_in_the_batch():
    """Sequence 0 sends all tokens to expert 0, sequence 1 to expert 1."""
    logits = 99 * torch.eye(2)[[0, 0, 1, 1]].view(2, 2, 2)
    r = routing(logits, top_k=1, group_offsets=torch.tensor([0, 2, 4]))
    assert_close(tr.losses.SequenceBalanceLoss(1.0)(r), torch.tensor(2.0))
    assert_close(tr.losses.LoadBalanceLoss(1.0)(r), torch.tensor(1.0))


def test_balance_of_sequences_raises_where_the_router_mixed_them():
    said = (
        "SequenceBalanceLoss: expected a routing with a group per sequence, got one group of 2 "
        "samples. Its router must honour wants_groups"
    )
    with pytest.raises(ValueError, match=said):
        tr.losses.SequenceBalanceLoss(1.0)(routing(LOGITS.view(2, 2, 3)))
    assert_close(tr.losses.SequenceBalanceLoss(1.0)(routing(LOGITS[None])), balance(LOGITS))


def test_a_router_wants_groups_for_losses_of_sequences_in_training():
    batch, sequences = tr.losses.LoadBalanceLoss(1.0), tr.losses.SequenceBalanceLoss(1.0)
    assert tr.TopKRouter(6, 4, 2, losses=[batch, sequences]).wants_groups
    assert not tr.TopKRouter(6, 4, 2, losses=[batch]).wants_groups
    assert not tr.TopKRouter(6, 4, 2, losses=[sequences]).eval().wants_groups


def test_z_of_a_worked_example():
    assert_close(z(LOGITS).item(), 6.1160907, rtol=0, atol=5e-8)
    gradient = torch.autograd.grad(z(LOGITS), LOGITS)[0][0]
    expected = torch.tensor([0.8008190, 0.2946049, 0.1083791], dtype=torch.float64)
    assert_close(gradient, expected, rtol=0, atol=5e-8)


@pytest.mark.parametrize("unbiased, expected", [(False, 0.2042051), (True, 0.3063077)])
def test_importance_of_a_worked_example(unbiased, expected):
    """Score sums 2.1055467, 1.2591754, .6352780."""
    assert_close(importance(LOGITS, unbiased).item(), expected, rtol=0, atol=5e-8)


@pytest.mark.parametrize("unbiased, expected", [(False, 0.3200821), (True, 0.4801231)])
def test_importance_of_weights_of_a_worked_example(unbiased, expected):
    """Weights .731 and .269, .731 and .269, .881 and .119, .622 and .378 of the best two experts.

    Their sums are 2.2343150, 1.3775407 and .3881443, around a mean of 4/3.
    """
    loss = tr.losses.ImportanceLoss(1.0, unbiased, of="weights")
    assert_close(loss(routing(LOGITS)).item(), expected, rtol=0, atol=5e-8)


def test_importance_of_weights_is_of_what_is_left_and_its_gradient_too():
    weights = torch.tensor([[0.5, 0.25], [0.0, 0.5], [0.0, 0.0]], requires_grad=True)
    indices = torch.tensor([[2, 0], [-1, 2], [-1, -1]])
    sparse = tr.Routing(weights, indices, counts=torch.zeros(4, dtype=torch.int64))
    dense = torch.tensor([[0.25, 0, 0.5, 0], [0, 0, 0.5, 0], [0, 0, 0, 0]])
    loss = tr.losses.ImportanceLoss(1.0, of="weights")
    value = loss(sparse)
    assert_close(value, importance_of(torch.tensor([0.25, 0, 1.0, 0])))
    assert_close(loss(sparse._replace(weights=dense, indices=None)), value)
    gradient = torch.autograd.grad(value, weights)[0]
    assert (gradient != 0).tolist() == [[True, True], [False, True], [False, False]]


def test_importance_is_of_scores_or_weights():
    with pytest.raises(ValueError, match=r"expected of in \['scores', 'weights'\], got 'x'"):
        tr.losses.ImportanceLoss(1.0, of="x")


CLEAN, NOISY = torch.tensor([[1, 0.2, -0.3, 0.5], [1.1, 0.6, -0.5, 0.4]], dtype=torch.float64)


@pytest.mark.parametrize(
    "threshold, sigma, expected",
    [
        ("kth_excluding", 0.5, [0.8849303, 0.3445783, 0.0359303, 0.4207403]),
        ("kth", 0.25, [0.9452007, 0.0547993, 0.0001591, 0.3445783]),
    ],
)
def test_load_of_a_worked_example(threshold, sigma, expected):
    """To be among the best two, experts 0 and 1 must exceed .4 and the others .6; or all .6."""
    sigma = torch.tensor(sigma, dtype=torch.float64)
    load = expected_load(CLEAN, NOISY, sigma, 2, threshold=threshold)
    assert_close(load, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-8)
    twice = expected_load(
        CLEAN.expand(3, 2, 4), NOISY.expand(3, 2, 4), sigma, 2, threshold=threshold
    )
    assert_close(twice, 6 * load)


@pytest.mark.parametrize("threshold", ["kth_excluding", "kth"])
def test_load_has_a_gradient_to_logits_threshold_and_noise(threshold):
    clean, noise, sigma = torch.randn(3, 5, 4, dtype=torch.float64)
    sigma = sigma.exp()
    inputs = [x.requires_grad_() for x in (clean, clean + noise * sigma, sigma)]
    load = partial(expected_load, top_k=2, threshold=threshold)
    assert torch.autograd.gradcheck(load, inputs)
    assert torch.autograd.gradgradcheck(load, inputs)


def test_load_is_how_often_an_expert_is_chosen_when_its_own_noise_is_drawn_anew():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(100_000, generator=generator, dtype=torch.float64)
    load = expected_load(CLEAN, NOISY, torch.tensor(0.5), 2)
    for e in range(4):
        others = NOISY.expand(len(draws), 4).clone()
        others[:, e] = CLEAN[e] + 0.5 * draws
        chosen = (others.topk(2).indices == e).any(1).double().mean()
        assert_close(load[e], chosen, rtol=0, atol=0.006)


@pytest.mark.parametrize("threshold", ["kth_excluding", "kth"])
def test_load_of_all_experts_is_the_number_of_tokens(threshold):
    logits = torch.randn(5, 3, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True])
    load = expected_load(logits, logits, torch.ones(()), 3, valid_mask=mask, threshold=threshold)
    assert load.tolist() == [4, 4, 4]
    assert (torch.autograd.grad(load.sum(), logits)[0] == 0).all()


@pytest.mark.parametrize("threshold", ["kth_excluding", "kth"])
def test_load_of_masked_tokens_is_none_whatever_they_are(threshold):
    clean, noisy, sigma = torch.rand(3, 10, 4)
    load = partial(expected_load, top_k=2, threshold=threshold)
    expected = load(clean[MASK], noisy[MASK], sigma[MASK])
    for content in 0.0, torch.nan, torch.inf:
        inputs = [
            x.where(MASK.unsqueeze(1), content).requires_grad_() for x in (clean, noisy, sigma)
        ]
        masked = load(*inputs, valid_mask=MASK)
        assert_close(masked, expected)
        assert all((g[~MASK] == 0).all() for g in torch.autograd.grad(masked.sum(), inputs))


@pytest.mark.parametrize("unbiased", [False, True])
def test_loss_of_load_is_its_squared_coefficient_of_variation(unbiased):
    load = torch.tensor([3.0, 1.0, 2.0])
    r = routing(LOGITS)._replace(load=load)
    expected = load.var(correction=int(unbiased)) / load.mean() ** 2
    assert_close(tr.losses.LoadLoss(1.0, unbiased)(r), expected)


def test_load_says_what_it_needs():
    x = torch.zeros(2, 4)
    with pytest.raises(
        ValueError, match=r"^expected_load: expected top_k in \[1, num_experts=4\], got 5$"
    ):
        expected_load(x, x, x, 5)
    said = r"^expected_load: expected threshold in \['kth_excluding', 'kth'\], got 'k'$"
    with pytest.raises(ValueError, match=said):
        expected_load(x, x, x, 2, threshold="k")
    said = r"^expected_load: expected noisy of shape \[2, 4\], that of clean, got \[4\]$"
    with pytest.raises(ValueError, match=said):
        expected_load(x, x[0], x, 2)
    said = (
        "^LoadLoss: expected a routing with load, got none. Routers with noise compute it in train"
    )
    with pytest.raises(ValueError, match=said):
        tr.losses.LoadLoss(1.0)(routing(LOGITS)._replace(load=None))


def test_entropy_of_a_worked_example():
    z = torch.tensor([1.2, 0.3, -0.5, 0.0], dtype=torch.float64, requires_grad=True)
    of_row, of_four = entropy(z), entropy(z.expand(2, 2, 4))
    assert_close(of_row.item(), 1.1858411, rtol=0, atol=5e-8)
    assert_close(of_four, of_row)
    expected = torch.tensor([-0.2904220, 0.0754820, 0.1112243, 0.1037157], dtype=torch.float64)
    assert_close(torch.autograd.grad(of_row, z)[0], expected, rtol=0, atol=5e-8)


def test_entropy_of_certainty_is_zero_and_that_of_indifference_the_logarithm():
    for certain in torch.inf, 1e4:
        logits = torch.tensor([[0.0, -certain, -certain]], requires_grad=True)
        assert entropy(logits) == 0
        assert (torch.autograd.grad(entropy(logits), logits)[0] == 0).all()
    assert_close(entropy(torch.full((5, 7), 3.0)), torch.tensor(7.0).log())


def test_entropy_leaves_out_hidden_experts():
    """In value and gradient; a token that sees none adds nothing, yet is one."""
    hidden = torch.full((4, 2), -torch.inf, dtype=torch.float64)
    logits = torch.cat([LOGITS, hidden], 1).detach().requires_grad_()
    assert_close(entropy(logits), entropy(LOGITS))
    (gradient,) = torch.autograd.grad(entropy(logits), logits)
    assert_close(gradient[:, :3], torch.autograd.grad(entropy(LOGITS), LOGITS)[0])
    assert (gradient[:, 3:] == 0).all()
    blind = torch.cat([logits, torch.full((1, 5), -torch.inf)])
    assert_close(entropy(blind), entropy(LOGITS) * 4 / 5)
    assert torch.autograd.grad(entropy(blind), logits)[0].isfinite().all()


def test_entropy_notices_nan():
    assert entropy(torch.tensor([[0.0, torch.nan], [0.0, 1.0]])).isnan()


def test_minimal_entropy_specialises_and_a_negative_weight_does_the_opposite():
    after = {}
    for weight in 1.0, -1.0:
        z = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
        (weight * tr.losses.EntropyLoss(weight)(routing(z))).backward()
        after[weight] = (z - z.grad).softmax(1).max()
    assert after[-1.0] < torch.tensor([1.0, 0.0, -1.0]).softmax(0).max() < after[1.0]


def test_entropy_needs_logits():
    with pytest.raises(
        ValueError, match=r"^EntropyLoss: expected a routing with logits, got none$"
    ):
        tr.losses.EntropyLoss(1.0)(routing(LOGITS)._replace(logits=None))


def test_balance_is_one_when_experts_share_alike_and_num_experts_when_one_has_all():
    assert_close(balance(10 * torch.eye(4), top_k=1), torch.tensor(1.0))
    assert_close(balance(torch.tensor([[99.0, 0, 0, 0]] * 5), top_k=1), torch.tensor(4.0))


def test_z_is_the_mean_square_of_the_log_sum_exp():
    assert_close(z(LOGITS), LOGITS.logsumexp(1).square().mean())


@pytest.mark.parametrize("loss", [balance, z, importance])
def test_gradients(loss):
    assert torch.autograd.gradcheck(loss, LOGITS)
    assert torch.autograd.gradgradcheck(loss, LOGITS)


def test_a_token_of_hidden_experts_adds_nothing_to_z():
    logits = torch.cat([LOGITS, torch.full((1, 3), -torch.inf)]).detach().requires_grad_()
    assert_close(z(logits), z(LOGITS) * 4 / 5)
    assert (torch.autograd.grad(z(logits), logits)[0][4] == 0).all()


def test_a_million_tokens_in_float32():
    lse = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)) + 3
    exact = lse.double().square().mean()
    assert_close(z_loss(lse, torch.tensor(len(lse))).double(), exact, rtol=1e-7, atol=0)


# ---- what is true of every loss ------------------------------------------------------------------

EACH = [
    *(tr.losses.LoadBalanceLoss(0.5, c) for c in ("megatron", "switch", "gshard", "deepspeed")),
    tr.losses.SequenceBalanceLoss(0.5),
    tr.losses.GlobalBalanceLoss(0.5),
    tr.losses.GlobalBalanceLoss(0.5, scope="group", grad_reduction="mean"),
    tr.losses.ZLoss(0.5),
    tr.losses.ImportanceLoss(0.5),
    tr.losses.ImportanceLoss(0.5, unbiased=True),
    tr.losses.ImportanceLoss(0.5, of="weights"),
    tr.losses.EntropyLoss(0.5),
    tr.losses.LoadLoss(0.5),
    tr.losses.LoadLoss(0.5, unbiased=True),
    tr.losses.VarianceLoss(0.5),
    tr.losses.VarianceLoss(0.5, axis="token"),
    tr.losses.SpecializationLoss(0.5),
    tr.losses.SpecializationLoss(0.5, usage="topk", entropy_sign="paper"),
]


@pytest.fixture(params=EACH, ids=repr)
def loss(request):
    return copy.deepcopy(request.param)


def value_and_gradient(loss, logits, **options):
    loss = copy.deepcopy(loss)  # some remember
    logits = logits.clone().requires_grad_()
    value = loss(routing(logits, **options))
    return value.detach(), torch.autograd.grad(value, logits)[0]


def test_gradcheck(loss):
    logits = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    for offsets in None, torch.tensor([0, 3, 3, 7]):
        of_logits = partial(routing, group_offsets=offsets)
        assert torch.autograd.gradcheck(lambda x, of=of_logits: loss(of(x)), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padded_tokens_count_for_nothing_and_their_content_changes_no_bit(loss, dtype):
    logits = torch.randn(10, 4, dtype=dtype)
    other = torch.where(MASK.unsqueeze(1), logits, torch.nan)
    in_groups = (
        {"group_offsets": torch.tensor([0, 5, 8, 10])},
        {"group_offsets": torch.tensor([0, 3, 5, 5])},
    )
    for padded, compact in ({}, {}), in_groups:
        value, gradient = value_and_gradient(loss, logits, valid_mask=MASK, **padded)
        alone, of_alone = value_and_gradient(loss, logits[MASK], **compact)
        assert_close(value, alone, rtol=1e-6, atol=1e-7)
        assert_close(gradient[MASK], of_alone, rtol=1e-6, atol=1e-6)
        assert (gradient[~MASK] == 0).all()
        again, of_again = value_and_gradient(loss, other, valid_mask=MASK, **padded)
        assert torch.equal(value, again) and torch.equal(gradient, of_again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [0, 3])
def test_without_tokens_there_is_no_loss(loss, dtype, tokens):
    mask = torch.zeros(tokens, dtype=torch.bool)
    logits = torch.randn(tokens, 3, dtype=dtype)
    value, gradient = value_and_gradient(loss, logits, valid_mask=mask)
    assert value == 0 and value.dtype == dtype and (gradient == 0).all()


def test_a_single_expert_has_no_choice(loss):
    """Its balance is perfect, so that no gradient is left but that of z."""
    logits = torch.randn(5, 1)
    value, gradient = value_and_gradient(loss, logits, top_k=1)
    if isinstance(loss, tr.losses.ZLoss):
        assert_close((value, gradient), (logits.square().mean(), 2 / 5 * logits))
    else:
        perfect = "balance" in loss.name or loss.name == "specialization"
        assert_close(value, torch.tensor(float(perfect)))
        assert_close(gradient, torch.zeros(5, 1))


def test_groups_change_no_loss_but_that_of_sequences(loss):
    logits, offsets = torch.randn(10, 4), torch.tensor([0, 3, 3, 10])
    split = value_and_gradient(loss, logits, group_offsets=offsets)
    if not loss.per_sequence:
        assert_close(split, value_and_gradient(loss, logits))


def test_a_router_with_the_loss_compiles(loss):
    routers = [NoisyTopK(6, 4, 2, losses=[loss])]
    routers.append(copy.deepcopy(routers[0]))
    calls = routers[0], torch.compile(routers[1], fullgraph=True, backend="aot_eager")
    for options in {}, {"valid_mask": torch.arange(9) % 3 > 0}:
        x = torch.randn(9, 6)
        results = [call(x, **options).aux_loss for call in calls]
        assert_close(*results)
        gradients = [torch.autograd.grad(y, r.weight) for y, r in zip(results, routers)]
        assert_close(*gradients)


def test_the_objective_is_proportional_to_the_weight(loss):
    router, x = NoisyTopK(6, 4, 2, losses=[loss]), torch.randn(9, 6)
    gradients = []
    for loss.weight in 1.0, -2.0, 0.0:
        r = router(x)
        assert_close(r.aux_loss, loss.weight * r.losses[loss.name])
        gradients += torch.autograd.grad(r.aux_loss, router.weight)
    assert gradients[0].abs().max() > 1e-4
    assert_close(gradients[1:], [-2 * gradients[0], 0 * gradients[0]])


# ---- the losses of a router ----------------------------------------------------------------------


class Largest(tr.losses.RouterLoss):
    """A loss of one's own."""

    name = "largest"

    def forward(self, routing):
        return self.statistics(routing).score_sums.max()


class AlmostZ(tr.losses.ZLoss):
    name = "almost_z"

    def forward(self, routing):
        return super().forward(routing) + 1


class AgainZ(tr.losses.ZLoss):
    name = "again_z"


SETS = {
    "balance": [tr.losses.LoadBalanceLoss(0.5)],
    "own": [Largest(0.5)],
    "computed apart": [tr.losses.ZLoss(0.25), tr.losses.LoadBalanceLoss(0.5, "gshard")],
    "batch and sequences": [
        tr.losses.SequenceBalanceLoss(0.25),
        tr.losses.ImportanceLoss(0.5),
        tr.losses.LoadBalanceLoss(0.5),
    ],
    "three": [
        tr.losses.ZLoss(0.25),
        tr.losses.LoadBalanceLoss(0.5, "switch"),
        tr.losses.ImportanceLoss(2.0, unbiased=True),
    ],
    "mixed": [tr.losses.ZLoss(0.25), Largest(0.5), tr.losses.ImportanceLoss(2.0)],
    "overridden": [AlmostZ(0.25), tr.losses.ZLoss(0.5)],
    "one term twice": [AgainZ(0.25), tr.losses.ZLoss(0.5)],
}
each_set = pytest.mark.parametrize("losses", SETS.values(), ids=SETS)


class CallsOfRouterLosses(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.torch_routers.router_losses.default
        return function(*args, **(kwargs or {}))


# ---- the global batch ----------------------------------------------------------------------------


def test_global_balance_sees_the_counts_of_all_micro_batches_since_the_last_reset():
    loss, batches = tr.losses.GlobalBalanceLoss(1.0), torch.randn(3, 7, 4, dtype=torch.float64)
    for _ in range(2):
        seen = torch.zeros(4, dtype=torch.int64)
        for x in batches:
            r = routing(x)
            seen += r.counts
            s = r.statistics
            assert_close(loss(r), load_balance(s.score_sums[0], seen, s.group_tokens[0]))
        loss.reset()


def test_micro_batches_may_be_unbalanced_if_the_global_batch_is_not():
    loss = tr.losses.GlobalBalanceLoss(1.0)
    left, right = (routing(99 * torch.eye(2)[[e, e, e]], top_k=1) for e in (0, 1))
    assert_close([loss(left), loss(right)], [torch.tensor(2.0), torch.tensor(1.0)])


def test_a_later_micro_batch_does_not_change_the_gradient_of_an_earlier_one():
    loss, x = tr.losses.GlobalBalanceLoss(1.0), torch.randn(7, 4, requires_grad=True)
    expected = value_and_gradient(loss, x.detach())[1]
    value = loss(routing(x))
    loss(routing(torch.randn(9, 4)))
    loss.reset()
    assert torch.equal(torch.autograd.grad(value, x)[0], expected)


def through_pickle(loss):
    return pickle.loads(pickle.dumps(loss))


@pytest.mark.parametrize("again", [copy.deepcopy, through_pickle])
def test_counts_are_in_a_copy_and_not_in_the_state_dict(again):
    loss, first, second = tr.losses.GlobalBalanceLoss(1.0), *torch.randn(2, 7, 4)
    loss(routing(first))
    copied = again(loss)
    assert not loss.state_dict() and "group" not in loss.config()
    assert torch.equal(copied(routing(second)), loss(routing(second)))
    loss.reset()  # leaves the copy alone
    assert not torch.equal(copied(routing(second)), loss(routing(second)))


class Layer(nn.Module):
    def __init__(self, run, **options):
        super().__init__()
        router = tr.TopKRouter(8, 4, 2, losses=[tr.losses.GlobalBalanceLoss(8.0, **options)])
        nn.init.normal_(router.weight)
        self.moe, self.run = tr.MoE(router, tr.SwiGLUExperts(4, 8, 6)), run

    def forward(self, x):
        return x + self.run(self.moe, x)


def trained(run, compile=None, **options):
    """Gradients and counts of three steps of two micro-batches, through two layers."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 8), Layer(run, **options), Layer(run, **options))
    losses = [layer.moe.router.losses[0] for layer in model[1:]]
    attached, results, probe = tr.attach(model), [], routing(9 * torch.eye(4)[[0, 0, 1]], 1)
    for step, batches in enumerate(torch.randn(3, 2, 6, 8)):
        for x in batches:
            attached(model(x).square().mean()).backward()
        if step == 0 and compile:  # not the first call: see GlobalBalanceLoss
            compile(model)
        results += [p.grad for p in model.parameters()]
        results += [loss(probe) for loss in losses]  # tells how much was counted before
        model.zero_grad()
        for loss in losses:
            loss.reset()
    return results


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("compile", [None, "block in checkpoint", "checkpoint in model"])
@pytest.mark.parametrize("options", [{}, {"scope": "group", "grad_reduction": "sum"}], ids=str)
def test_a_recomputed_forward_is_not_counted_again(reentrant, compile, options):
    compiler = partial(torch.compile, fullgraph=True, backend="aot_eager")

    def compile_model(model):
        if compile == "checkpoint in model":
            model.compile(fullgraph=True, backend="aot_eager")
        for layer in model[1:]:
            layer.moe = compiler(layer.moe) if compile == "block in checkpoint" else layer.moe

    run = partial(checkpoint, use_reentrant=reentrant)
    actual = trained(run, compile and compile_model, **options)
    assert_close(actual, trained(lambda layer, x: layer(x), **options), rtol=1e-4, atol=1e-5)


def test_opcheck():
    op = torch.ops.torch_routers._count.default
    torch.library.opcheck(op, (torch.tensor([1, 2]), torch.tensor([3, 0]), 1))


def test_balance_of_a_group_forgets_earlier_micro_batches():
    loss = tr.losses.GlobalBalanceLoss(1.0, scope="group")
    for x in torch.randn(3, 7, 4, dtype=torch.float64):
        assert_close(loss(routing(x)), balance(x))


def test_global_balance_of_several_routers_is_refused():
    """Its counts would be those of all of them."""
    losses = [tr.losses.GlobalBalanceLoss(1.0), tr.losses.ZLoss(1e-3)]
    router = tr.TopKRouter(8, 4, 2, losses=losses)
    message = (
        "NoisyTopKRouter: expected a GlobalBalanceLoss of its own, got one of another TopKRouter"
    )
    with pytest.raises(ValueError, match=message):
        tr.NoisyTopKRouter(8, 4, 2, losses=losses)
    for copied in copy.deepcopy(losses), through_pickle(losses):
        tr.TopKRouter(8, 4, 2, losses=copied)
    tr.from_config(router.config())
    del router  # nobody counts there any more
    tr.TopKRouter(8, 4, 2, losses=losses)


def test_global_balance_says_what_it_takes():
    with pytest.raises(
        ValueError, match=r"expected scope among \['global_batch', 'group'\], got 'x'"
    ):
        tr.losses.GlobalBalanceLoss(1.0, scope="x")
    with pytest.raises(ValueError, match=r"expected grad_reduction among \[None, 'mean', 'sum'\]"):
        tr.losses.GlobalBalanceLoss(1.0, grad_reduction="max")


# ---- several losses ------------------------------------------------------------------------------


@each_set
def test_the_objective_is_the_weighted_sum(losses):
    """Of what each says alone; and so is its gradient."""
    router, x = tr.TopKRouter(6, 4, 2, losses=losses), torch.randn(9, 6)
    routing = router(x)
    alone = {loss.name: loss(routing) for loss in losses}
    assert_close(routing.losses, {name: value.detach() for name, value in alone.items()})
    expected = sum(loss.weight * alone[loss.name] for loss in losses)
    assert_close(routing.aux_loss, expected)
    assert_close(
        torch.autograd.grad(routing.aux_loss, router.weight, retain_graph=True),
        torch.autograd.grad(expected, router.weight),
    )


@pytest.mark.parametrize(
    "name, calls",
    [
        ("balance", 1),
        ("own", 0),
        ("computed apart", 2),
        ("batch and sequences", 2),
        ("three", 1),
        ("mixed", 1),
        ("overridden", 2),
    ],
)
def test_the_losses_of_a_router_are_one_call(name, calls):
    router = tr.TopKRouter(6, 4, 2, losses=SETS[name])
    with CallsOfRouterLosses() as mode:
        router(torch.randn(9, 6))
    assert mode.count == calls


def test_losses_survive_their_configuration(loss):
    again = tr.from_config(json.loads(json.dumps(loss.config())))
    assert type(again) is type(loss) and again.config() == loss.config()
    assert repr(again) == repr(loss)


def test_the_names_under_which_losses_are_logged():
    names = {type(loss).__name__: loss.name for loss in EACH}
    assert names == {
        "LoadBalanceLoss": "load_balance",
        "SequenceBalanceLoss": "sequence_balance",
        "GlobalBalanceLoss": "global_balance",
        "ZLoss": "z",
        "ImportanceLoss": "importance",
        "EntropyLoss": "entropy",
        "LoadLoss": "load",
        "VarianceLoss": "variance",
        "SpecializationLoss": "specialization",
    }


def test_a_weight_may_change_between_calls():
    loss = tr.losses.LoadBalanceLoss(1.0)
    router, x = tr.TopKRouter(6, 4, 2, losses=[loss]), torch.randn(9, 6)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    for loss.weight in 1.0, 0.5, 0.25:
        for routing in router(x), compiled(x):
            assert_close(routing.aux_loss, loss.weight * routing.losses["load_balance"])


def test_a_convention_that_is_none_raises():
    with pytest.raises(ValueError) as info:
        tr.losses.LoadBalanceLoss(1.0, "mola")
    assert str(info.value) == (
        "LoadBalanceLoss: expected convention in ['megatron', 'switch', 'gshard', 'deepspeed'], "
        "got 'mola'"
    )


def test_a_loss_without_statistics_says_so():
    routing = tr.TopKRouter(6, 4, 2)(torch.randn(9, 6))
    with pytest.raises(ValueError, match="ZLoss: expected a routing with statistics, got none"):
        tr.losses.ZLoss(1.0)(routing)
