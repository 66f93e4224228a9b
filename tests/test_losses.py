"""The auxiliary losses: worked examples, gradients, and what they refuse."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import torch_routers as tr
from torch_routers.losses import importance as importance_of
from torch_routers.losses import load_balance, z_loss

LOGITS = torch.tensor(
    [[2, 1, 0], [0, 2, 1], [3, 0, 1], [1, 0.5, 0]], dtype=torch.float64, requires_grad=True
)


def statistics(logits, top_k=2, **options):
    return tr.ops.topk_gate(logits, top_k, statistics=True, **options)[2]


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


def test_balance_by_the_convention_of_switch_is_top_k_times_as_large():
    s = statistics(LOGITS)
    loss = load_balance(s.score_sums[0], s.group_counts[0], s.group_tokens[0], convention="switch")
    assert_close(loss.item(), 2.1308854, rtol=0, atol=5e-8)


def test_z_of_a_worked_example():
    assert_close(z(LOGITS).item(), 6.1160907, rtol=0, atol=5e-8)
    gradient = torch.autograd.grad(z(LOGITS), LOGITS)[0][0]
    expected = torch.tensor([0.8008190, 0.2946049, 0.1083791], dtype=torch.float64)
    assert_close(gradient, expected, rtol=0, atol=5e-8)


@pytest.mark.parametrize("unbiased, expected", [(False, 0.2042051), (True, 0.3063077)])
def test_importance_of_a_worked_example(unbiased, expected):
    """Score sums 2.1055467, 1.2591754, .6352780."""
    assert_close(importance(LOGITS, unbiased).item(), expected, rtol=0, atol=5e-8)


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


@pytest.mark.parametrize("loss", [balance, z, importance])
def test_masked_tokens_count_for_nothing(loss):
    mask = torch.tensor([True, False, True, True])
    assert_close(loss(LOGITS, valid_mask=mask), loss(LOGITS[mask]))


@pytest.mark.parametrize("loss", [balance, z, importance])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tokens_are_no_loss(loss, dtype):
    logits = torch.zeros(0, 3, dtype=dtype, requires_grad=True)
    value = loss(logits)
    assert value.item() == 0 and value.dtype == dtype
    assert torch.autograd.grad(value, logits)[0].shape == (0, 3)


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
    "name, calls", [("balance", 1), ("own", 0), ("three", 1), ("mixed", 1), ("overridden", 2)]
)
def test_the_losses_of_a_router_are_one_call(name, calls):
    router = tr.TopKRouter(6, 4, 2, losses=SETS[name])
    with CallsOfRouterLosses() as mode:
        router(torch.randn(9, 6))
    assert mode.count == calls


@each_set
def test_losses_survive_their_configuration(losses):
    for loss in losses:
        again = tr.from_config(loss.config())
        assert type(again) is type(loss) and again.config() == loss.config()
        assert repr(again) == repr(loss)


def test_a_weight_may_change_between_calls():
    loss = tr.losses.LoadBalanceLoss(1.0)
    router, x = tr.TopKRouter(6, 4, 2, losses=[loss]), torch.randn(9, 6)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    for loss.weight in 1.0, 0.5, 0.25:
        for routing in router(x), compiled(x):
            assert_close(routing.aux_loss, loss.weight * routing.losses["load_balance"])


def test_a_convention_that_is_none_raises():
    said = r"LoadBalanceLoss: expected convention in \['megatron', 'switch'\], got 'gshard'"
    with pytest.raises(ValueError, match=said):
        tr.losses.LoadBalanceLoss(1.0, "gshard")


def test_a_loss_without_statistics_says_so():
    routing = tr.TopKRouter(6, 4, 2)(torch.randn(9, 6))
    with pytest.raises(ValueError, match="ZLoss: expected a routing with statistics, got none"):
        tr.losses.ZLoss(1.0)(routing)
