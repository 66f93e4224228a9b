"""Losses that make experts differ: of tasks, of weights and outputs, of scores, of labels."""

import copy
import json
import math
import pickle
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import torch_routers as tr
from torch_routers import losses

MASK = torch.tensor([True, True, False, True, False, False, True, True, False, False])
TASKS = torch.tensor([0, 2, 1, 0, 0, 2, 2, 0, 1, -1])
LABELS = torch.tensor([3, 0, 9, -1, 2, 2, 1, 1, 0, 3])
REFERENCE = torch.randn(10, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
J = [[0.30, 0.15, 0.05], [0.05, 0.10, 0.35]]
P = [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


def close(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert_close(actual, expected, rtol=0, atol=6e-8)


def gradient(value, x):
    return torch.autograd.grad(value, x, retain_graph=True)[0]


def through_softmax(p, of_p):
    """The gradient with respect to logits."""
    return p * (of_p - (p * of_p).sum(-1, keepdim=True))


def softmax(z, mask):
    """Of masked tokens their content as it is, which may be NaN."""
    if mask is None:
        return z.softmax(-1)
    mask = mask.unsqueeze(-1)
    return torch.where(mask, torch.where(mask, z, 0).softmax(-1), z)


# ---- what is true of every function of tokens ----------------------------------------------------


def mutual_information(z, mask=None, ids=TASKS, **options):
    scores = losses.task_scores(softmax(z, mask), ids, 3, valid_mask=mask)
    return losses.mutual_information_loss(scores, **options)


def specialization(z, mask=None, counts=(1, 4, 0, 2), **options):
    return losses.specialization_loss(z, torch.tensor(counts), valid_mask=mask, **options)


def outputs(z, mask=None, **options):
    """The four numbers of a token are two outputs."""
    used = None if mask is None else mask.unsqueeze(-1).expand(-1, 2)
    return losses.expert_orthogonality(z.unflatten(-1, (2, 2)), used, **options)


def variance(z, mask=None, **options):
    return losses.variance_loss(softmax(z, mask), valid_mask=mask, **options)


def route_label(z, mask=None, labels=LABELS):
    return losses.route_label(z, labels, valid_mask=mask)


def alignment(z, mask=None, reference=REFERENCE, **options):
    return losses.router_alignment(z, reference.to(z.dtype), valid_mask=mask, **options)


#: Each by the name of what it gets besides logits and mask, and what that is.
FUNCTIONS = [
    (mutual_information, {"ids": TASKS}, {}),
    (mutual_information, {"ids": TASKS}, {"eps": 0}),
    (specialization, {}, {}),
    (specialization, {}, {"entropy_weight": 0.5, "entropy_sign": "paper"}),
    (outputs, {}, {}),
    (outputs, {}, {"form": "cosine"}),
    (outputs, {}, {"reduction": "sum"}),
    (variance, {}, {}),
    (variance, {}, {"axis": "token"}),
    (route_label, {"labels": LABELS}, {}),
    (alignment, {"reference": REFERENCE}, {}),
    (alignment, {"reference": REFERENCE}, {"top_k": 2}),
]


@pytest.fixture(params=FUNCTIONS, ids=lambda p: f"{p[0].__name__}-{p[2]}")
def function(request):
    """``function(logits, mask, rows)`` with what belongs to these rows of the tokens."""
    call, facts, options = request.param

    def of(z, mask=None, rows=slice(None)):
        return call(z, mask, **{name: x[rows] for name, x in facts.items()}, **options)

    return of


def value_and_gradient(function, z, *arguments):
    z = z.clone().requires_grad_()
    value = function(z, *arguments)
    return value.detach(), torch.autograd.grad(value, z)[0]


def test_gradcheck(function):
    z = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, z)
    assert torch.autograd.gradgradcheck(function, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_tokens_are_as_if_they_were_not(function, dtype):
    z = torch.randn(10, 4, dtype=dtype)
    value, slope = value_and_gradient(function, z, MASK)
    alone, of_alone = value_and_gradient(function, z[MASK], None, MASK)
    assert_close(value, alone, rtol=1e-6, atol=1e-7)
    assert_close(slope[MASK], of_alone, rtol=1e-5, atol=1e-6)
    for content in torch.nan, torch.inf:
        other = z.where(MASK.unsqueeze(1), content)
        again, of_again = value_and_gradient(function, other, MASK)
        assert torch.equal(value, again) and torch.equal(slope, of_again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [0, 3])
def test_without_tokens_there_is_no_loss(function, dtype, tokens):
    mask, z = torch.zeros(tokens, dtype=torch.bool), torch.randn(tokens, 4, dtype=dtype)
    value, slope = value_and_gradient(function, z, mask, slice(tokens))
    assert value == 0 and value.dtype == dtype and (slope == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(function, dtype):
    z = torch.randn(10, 4).to(dtype)
    value, slope = value_and_gradient(function, z, MASK)
    assert value.dtype == torch.float32 and slope.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = function(z.float(), MASK)
    assert_close(under_autocast, function(z.float(), MASK), rtol=0, atol=0)
    assert_close(value, under_autocast, rtol=3e-2, atol=1e-3)  # the softmax of here is half


def test_compiles(function):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for z in torch.randn(2, 10, 4):
        assert_close(value_and_gradient(compiled, z, MASK), value_and_gradient(function, z, MASK))


def test_leading_dimensions():
    z = torch.randn(2, 5, 4, dtype=torch.float64)
    flat = z.flatten(0, 1)
    many = TASKS.view(2, 5), LABELS.view(2, 5), REFERENCE.view(2, 5, 4), MASK.view(2, 5)
    tasks, labels, reference, mask = many
    assert_close(mutual_information(z, mask, tasks), mutual_information(flat, MASK))
    assert_close(specialization(z, mask), specialization(flat, MASK))
    assert_close(variance(z, mask, axis="token"), variance(flat, MASK, axis="token"))
    assert_close(route_label(z, mask, labels), route_label(flat, MASK))
    assert_close(alignment(z, mask, reference, top_k=3), alignment(flat, MASK, top_k=3))
    o = z.view(2, 5, 2, 2)
    used = mask.unsqueeze(-1).expand(2, 5, 2)
    assert_close(losses.expert_orthogonality(o, used), outputs(flat, MASK))


def test_a_single_expert_has_no_choice():
    z, tokens = torch.randn(5, 1), torch.zeros(5, dtype=torch.int64)
    assert route_label(z, labels=tokens) == alignment(z, reference=z + 1, top_k=1) == 0
    assert variance(z) == variance(z, axis="token") == 0
    assert specialization(z, counts=(5,)) == 1
    assert losses.router_orthogonality(torch.ones(1, 3), "cosine") == 0


def test_a_million_tokens_in_float32():
    z = torch.randn(1_000_000, 4, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(len(z)) % 3
    for call in (
        partial(mutual_information, ids=ids % 2 + z.argmax(1) % 2),
        partial(specialization, entropy_weight=1.0),
        variance,
        partial(route_label, labels=ids),
        partial(alignment, reference=z.flip(0), top_k=2),
    ):
        assert_close(call(z).double(), call(z.double()), rtol=1e-6, atol=0)


# ---- mutual information --------------------------------------------------------------------------


@pytest.mark.parametrize("eps, expected", [(0, -0.2306455), (1e-4, -0.2302456)])
def test_mutual_information_of_a_worked_example(eps, expected):
    close(losses.mutual_information_loss(double(*J) * 1e7, eps=eps), expected)


def test_gradient_of_mutual_information_takes_the_number_of_tokens_for_constant():
    joint = double(*J)
    of_tasks, of_experts = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
    expected = 1 - (joint / of_tasks / of_experts).log()
    scores = (joint * 8).detach().requires_grad_()
    loss = losses.mutual_information_loss(scores, eps=0)
    assert_close(gradient(loss, scores), expected.detach() / 8)


def test_mutual_information_is_what_the_task_takes_from_the_entropy_of_experts():
    p, ids = torch.randn(10, 4, dtype=torch.float64).softmax(-1), TASKS.abs()

    def entropy(p):
        return -(p * p.log()).sum()

    expected = entropy(p.mean(0))
    for task in range(3):
        of_task = p[ids == task]
        expected = expected - len(of_task) / 10 * entropy(of_task.mean(0))
    loss = losses.mutual_information_loss(losses.task_scores(p, ids, 3), eps=0)
    assert_close(loss, -expected)


def test_mutual_information_is_that_of_the_metric_where_experts_are_certain():
    counts = torch.tensor([[5, 0, 1], [0, 7, 1]])
    in_bits = tr.metrics.mutual_information(counts)
    close(losses.mutual_information_loss(counts.double(), eps=0), -in_bits * math.log(2))


def test_task_scores_are_sums():
    p = torch.rand(10, 4, dtype=torch.float64)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for token, task in enumerate(TASKS.tolist()):
        if MASK[token] and task >= 0:
            expected[task] += p[token]
    assert_close(losses.task_scores(p, TASKS, 3, valid_mask=MASK), expected)
    assert_close(losses.task_scores(p, TASKS.int(), 2, valid_mask=MASK), expected[:2])
    assert_close(losses.task_scores(p[0], torch.tensor(1), 2)[1], p[0])


def test_task_ids_of_samples_are_those_of_their_tokens():
    p = torch.rand(2, 3, 5, 4)
    of_samples = torch.tensor([2, 0])
    for ids in of_samples, of_samples.view(2, 1).expand(2, 3):
        expected = losses.task_scores(p, of_samples.view(2, 1, 1).expand(2, 3, 5), 3)
        assert torch.equal(losses.task_scores(p, ids, 3), expected)


@pytest.mark.parametrize("eps", [0, 1e-4])
def test_a_task_without_tokens_adds_nothing(eps):
    scores = double([3.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 2.0, 0.0])
    loss = losses.mutual_information_loss(scores, eps=eps)
    assert_close(loss, losses.mutual_information_loss(scores[::2], eps=eps))
    assert gradient(loss, scores).isfinite().all()


def test_a_single_task_or_expert_has_no_information():
    scores = torch.rand(4, 3)
    for alone in scores[:1], scores[:, :1]:
        loss = losses.mutual_information_loss(alone, eps=0)
        assert_close(loss, torch.tensor(0.0), rtol=0, atol=1e-6)


def test_minimised_it_gives_tasks_experts_of_their_own_and_uses_all():
    z = (0.1 * torch.randn(12, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
    optimizer = torch.optim.Adam([z], 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        mutual_information(z, ids=torch.arange(12) % 3).backward()
        optimizer.step()
    p = z.detach().softmax(-1).unflatten(0, (4, 3)).mean(0)  # of each of three tasks
    overlap = p @ p.T
    assert (overlap - overlap.diagonal().diag()).max() < 0.01


def test_mutual_information_says_what_is_wrong():
    p = torch.rand(2, 3, 4)
    message = (
        r"^task_scores: expected task_ids in integers of shape \[2, 3\], or leading dimensions of "
        r"it, got {} of shape {}$"
    )
    for ids in torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.zeros(3).long():
        shape = str(list(ids.shape)).replace("[", r"\[").replace("]", r"\]")
        with pytest.raises(ValueError, match=message.format(ids.dtype, shape)):
            losses.task_scores(p, ids, 2)
    with pytest.raises(ValueError, match=r"^task_scores: expected num_tasks >= 1, got 0$"):
        losses.task_scores(p, torch.zeros(2, 3).long(), 0)
    said = r"^MutualInformationLoss: expected num_tasks >= 1, got 0$"
    with pytest.raises(ValueError, match=said):
        losses.MutualInformationLoss(1.0, 0)
    said = r"^MutualInformationLoss: expected scope among \['rank', 'group'\], got 'global_batch'$"
    with pytest.raises(ValueError, match=said):
        losses.MutualInformationLoss(1.0, 2, scope="global_batch")
    said = (
        r"^MutualInformationLoss: expected grad_reduction among \[None, 'mean', 'sum'\], got 'max'$"
    )
    with pytest.raises(ValueError, match=said):
        losses.MutualInformationLoss(1.0, 2, grad_reduction="max")
    said = (
        r"^MutualInformationLoss: expected task_ids, got none\. Pass them by keyword to the router$"
    )
    router = tr.TopKRouter(6, 4, 2, losses=[losses.MutualInformationLoss(1.0, 2)])
    with pytest.raises(ValueError, match=said):
        router(torch.randn(3, 6))
    router.eval()(torch.randn(3, 6))  # where losses are not computed
    with pytest.raises(ValueError, match=r"expected a routing with logits, got none$"):
        losses.MutualInformationLoss(1.0, 2)(tr.Routing(p, None), torch.zeros(2).long())


# ---- orthogonal routers --------------------------------------------------------------------------

ROWS = [1.0, 2.0], [0.5, -1.0], [2.0, 0.3]


def test_cosine_of_a_worked_example():
    weight = double(*ROWS)
    loss = losses.router_orthogonality(weight, "cosine")
    close(loss, 1.5728117)
    length = weight.norm(dim=1, keepdim=True)
    u = weight / length
    gram = u @ u.T - torch.eye(3)
    of_u = 4 * gram @ u
    expected = (of_u - (of_u * u).sum(1, keepdim=True) * u) / length
    assert_close(gradient(loss, weight), expected)


def test_l1_is_the_sum_of_what_the_gram_matrix_has_too_much():
    weight = double(*ROWS)
    loss = losses.router_orthogonality(weight)
    gram = weight @ weight.T - torch.eye(3)
    # 4, .25 and 3.09 on the diagonal; twice 1.5, 2.6 and .7
    close(loss, 4 + 0.25 + 3.09 + 2 * (1.5 + 2.6 + 0.7))
    transposed = weight.T  # the matrix of the paper
    assert_close(gradient(loss, weight).T, 2 * transposed @ gram.sign())


@pytest.mark.parametrize("form", ["l1", "cosine"])
def test_orthogonal_rows_are_orthogonal(form):
    weight = nn.init.orthogonal_(torch.empty(3, 5, dtype=torch.float64)).requires_grad_()
    close(losses.router_orthogonality(weight, form), 0)
    shorter = losses.router_orthogonality(0.5 * weight, form)
    close(shorter, {"l1": 3 * 0.75, "cosine": 0}[form])


@pytest.mark.parametrize("form", ["l1", "cosine"])
def test_gradcheck_of_router_orthogonality(form):
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(partial(losses.router_orthogonality, form=form), weight)


@pytest.mark.parametrize("form", ["l1", "cosine"])
def test_router_orthogonality_is_in_full_precision(form):
    weight = torch.randn(16, 64).bfloat16()
    expected = losses.router_orthogonality(weight.float(), form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = losses.router_orthogonality(weight, form)
    assert torch.equal(actual, expected) and actual.dtype == torch.float32


def test_a_row_of_zeros_has_no_direction():
    weight = double([0.0, 0.0], [1.0, 1.0], [2.0, 2.0])
    loss = losses.router_orthogonality(weight, "cosine")
    close(loss, 2.0)
    assert_close(gradient(loss, weight), torch.zeros(3, 2).double())


def make(*options, router=tr.TopKRouter):
    torch.manual_seed(1)
    return router(6, 4, 2, losses=[losses.RouterOrthogonalityLoss(0.5, form=f) for f in options])


@pytest.mark.parametrize("form", ["l1", "cosine"])
@pytest.mark.parametrize("router", [tr.TopKRouter, tr.NoisyTopKRouter])
def test_a_router_knows_its_weight(form, router):
    router = make(form, router=router)
    expected = 0.5 * losses.router_orthogonality(router.weight, form)
    for tokens in 3, 0:
        routing = router(torch.randn(tokens, 6))
        assert_close(routing.aux_loss, expected)
        slope = torch.autograd.grad(routing.aux_loss, router.weight)[0]
        assert_close(slope, torch.autograd.grad(expected, router.weight, retain_graph=True)[0])


def test_the_router_is_no_part_of_its_loss():
    router = make("l1")
    assert not list(router.losses[0].parameters()) and len(list(router.modules())) == 3
    assert list(router.state_dict()) == list(tr.TopKRouter(6, 4, 2).state_dict())


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda router: pickle.loads(pickle.dumps(router))]
)
def test_a_copy_looks_at_its_own_weight(again):
    router = make("cosine")
    copied, x = again(router), torch.randn(3, 6)
    with torch.no_grad():
        copied.weight[1] = copied.weight[0]
    expected = 0.5 * losses.router_orthogonality(copied.weight, "cosine")
    assert_close(copied(x).aux_loss, expected)
    assert not torch.equal(router(x).aux_loss, expected)


def test_routers_may_share_it():
    first, second = make("l1"), make()
    second.losses = first.losses
    with torch.no_grad():
        second.weight *= 3
    for router in second, first:
        expected = losses.router_orthogonality(router.weight)
        assert_close(router(torch.randn(3, 6)).losses["router_orthogonality"], expected.detach())


def test_router_orthogonality_says_what_is_wrong():
    said = r"^router_orthogonality: expected form among \['l1', 'cosine'\], got 'l2'$"
    with pytest.raises(ValueError, match=said):
        losses.router_orthogonality(torch.ones(2, 3), "l2")
    said = r"^RouterOrthogonalityLoss: expected form among \['l1', 'cosine'\], got 'l2'$"
    with pytest.raises(ValueError, match=said):
        losses.RouterOrthogonalityLoss(1.0, form="l2")
    said = (
        r"^router_orthogonality: expected weight of shape \[num_experts, hidden_size\], got \[3\]$"
    )
    with pytest.raises(ValueError, match=said):
        losses.router_orthogonality(torch.ones(3))
    said = (
        r"^RouterOrthogonalityLoss: expected a router with a weight \[num_experts, hidden_size\], "
        "got {}$"
    )
    loss = losses.RouterOrthogonalityLoss(1.0)
    with pytest.raises(ValueError, match=said.format("NoneType")):
        loss(tr.Routing(torch.ones(1)))
    with pytest.raises(ValueError, match=said.format("Identity")):
        loss(tr.Routing(torch.ones(1)), router=nn.Identity())


# ---- orthogonal outputs --------------------------------------------------------------------------

A, B = [1.0, 2.0, -1.0], [0.5, -1.0, 2.0]


def test_projection_of_a_worked_example():
    """<a, b> = -3.5, <a, a> = 6, <b, b> = 5.25: 2.3333333 of a along b, 2.0416667 of b along a."""
    o = double(A, B)
    exact = partial(losses.expert_orthogonality, eps=0)
    loss = exact(o, reduction="sum")
    close(loss, 3.5**2 / 5.25 + 3.5**2 / 6)
    close(exact(o), loss / 2)
    longer = exact(torch.stack([2 * o[0], o[1]]), reduction="sum")  # sees that of a alone
    close((longer - loss) / 3, 2.3333333)

    (a, b), slope = o.detach(), gradient(loss, o)
    along_b, along_a = a @ b / (b @ b), a @ b / (a @ a)
    close(slope[0], 2 * along_b * b + 2 * along_a * b - 2 * along_a**2 * a)
    close(slope[1], 2 * along_b * a - 2 * along_b**2 * b + 2 * along_a * a)


def test_expert_orthogonality_is_over_ordered_pairs_of_used_slots():
    o = torch.randn(5, 3, 4, dtype=torch.float64)
    used = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]]).bool()
    projections, cosines = [], []
    for token in range(5):
        for j in range(3):
            for k in range(3):
                if j != k and used[token, j] and used[token, k]:
                    a, b = o[token, j], o[token, k]
                    projections.append(((a @ b) / (b @ b + 1e-8) * b).square().sum())
                    cosines.append(F.cosine_similarity(a, b, dim=0))
    assert len(projections) == 10
    call = partial(losses.expert_orthogonality, o.where(used[..., None], torch.nan), used)
    assert_close(call(), sum(projections) / 10)
    assert_close(call(reduction="sum"), sum(projections))
    assert_close(call(form="cosine"), sum(cosines) / 10, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["projection", "cosine"])
def test_outputs_of_zero_and_single_outputs_are_orthogonal_to_all(form):
    o = torch.cat([torch.zeros(2, 1, 4), torch.randn(2, 2, 4)], 1).requires_grad_()
    loss = losses.expert_orthogonality(o[:, :2], form=form)
    assert loss == 0 and gradient(loss, o).isfinite().all()
    alone = losses.expert_orthogonality(o[:, :1], form=form)
    assert alone == 0 and (gradient(alone, o) == 0).all()


def test_cosine_does_not_see_lengths_and_projection_that_of_one():
    o = torch.randn(7, 2, 4, dtype=torch.float64)
    scaled = o * torch.tensor([3.0, 1.0]).unsqueeze(-1)
    call = losses.expert_orthogonality
    assert_close(call(o, form="cosine"), call(scaled, form="cosine"), rtol=1e-6, atol=1e-6)
    assert call(o, form="cosine") <= 1
    same = o[:, :1].expand(7, 2, 4)
    assert_close(call(same, form="cosine"), torch.tensor(1.0).double(), rtol=1e-6, atol=0)


def test_expert_orthogonality_of_a_mixture_makes_its_experts_differ():
    torch.manual_seed(0)
    router, x = tr.TopKRouter(8, 3, 2), torch.randn(16, 8)
    experts = nn.Parameter(torch.randn(1, 8, 8) + 0.1 * torch.randn(3, 8, 8))
    optimizer, seen = torch.optim.Adam([experts], 0.05), []
    for _ in range(60):
        routing = router(x)
        o = torch.einsum("th,tkhi->tki", x, experts[routing.indices])
        seen.append(losses.expert_orthogonality(o, routing.indices >= 0, form="cosine"))
        optimizer.zero_grad()
        seen[-1].abs().backward()
        optimizer.step()
    assert seen[0] > 0.9 and seen[-1].abs() < 0.3


def test_expert_orthogonality_says_what_is_wrong():
    o = torch.ones(2, 3, 4)
    for name, choices in ("form", "'projection', 'cosine'"), ("reduction", "'mean', 'sum'"):
        said = rf"^expert_orthogonality: expected {name} among \[{choices}\], got 'none'$"
        with pytest.raises(ValueError, match=said):
            losses.expert_orthogonality(o, **{name: "none"})
    said = r"^expert_orthogonality: expected used in bool of shape \[2, 3\], got torch.{} of shape "
    with pytest.raises(ValueError, match=said.format("float32") + r"\[2, 3\]$"):
        losses.expert_orthogonality(o, torch.ones(2, 3))
    with pytest.raises(ValueError, match=said.format("bool") + r"\[2\]$"):
        losses.expert_orthogonality(o, torch.ones(2, dtype=torch.bool))


# ---- variance ------------------------------------------------------------------------------------


def test_variance_over_experts_of_a_worked_example():
    s = double([0.5, 0.3, 0.2])
    loss = losses.variance_loss(s)
    close(loss, -0.0233333)
    close(gradient(loss, s), -2 * (s.detach() - 1 / 3) / 2)
    close(loss, -(s.square().sum() - 1 / 3) / 2)  # rows that sum to 1
    assert_close(losses.variance_loss(double(*P)), -double(*P).var(1).mean())


def test_variance_over_tokens_is_a_sum():
    s = double(*P)
    loss = losses.variance_loss(s, axis="token")
    means = [sum(row[e] for row in P) / 4 for e in range(3)]
    close(loss, -sum((row[e] - means[e]) ** 2 for row in P for e in range(3)) / 3)
    close(gradient(loss, s), -2 * (s.detach() - s.detach().mean(0)) / 3)
    twice = losses.variance_loss(torch.cat([s, s]), axis="token")
    close(twice, 2 * loss)
    close(losses.variance_loss(torch.cat([s, s])), losses.variance_loss(s))


def test_variance_says_what_is_wrong():
    for call in losses.variance_loss, losses.VarianceLoss:
        said = rf"^{call.__name__}: expected axis among \['expert', 'token'\], got 'both'$"
        with pytest.raises(ValueError, match=said):
            call(torch.ones(1, 2), axis="both")


# ---- specialisation ------------------------------------------------------------------------------


@pytest.mark.parametrize("sign, expected", [("penalty", 0.4359939), ("paper", 0.2515061)])
def test_specialization_of_a_worked_example(sign, expected):
    """Mean probabilities .375, .3125, .3125; first choices 2, 1, 1; mean entropy .9224389."""
    z = double(*P).log().detach().requires_grad_()
    loss = losses.specialization_loss(z, torch.tensor([2, 1, 1]), entropy_sign=sign)
    close(loss, expected)
    close(loss, 0.34375 + {"penalty": 0.1, "paper": -0.1}[sign] * 0.9224389)
    p, usage = double(*P), torch.tensor([0.5, 0.25, 0.25])
    factor = {"penalty": 0.1, "paper": -0.1}[sign]
    of_p = (usage - factor * (p.log() + 1)) / 4
    assert_close(gradient(loss, z), through_softmax(p, of_p))


def test_the_first_term_of_specialization_is_one_over_num_experts_at_balance():
    z = torch.randn(5, 4, dtype=torch.float64)
    close(specialization(z, counts=(7, 7, 7, 7), entropy_weight=0), 1 / 4)
    assert_close(
        specialization(z, entropy_weight=2.0) - specialization(z, entropy_weight=0),
        2 * losses.entropy(z),
    )


def routing(z, top_k=2, **options):
    weights, indices, s = tr.ops.topk_gate(z, top_k, statistics=True, **options)
    return tr.Routing(weights, indices, z, s.group_counts[0], s)


def test_usage_is_of_first_choices_or_of_all_slots():
    z = double(*P).log()
    expected = partial(losses.specialization_loss, z, entropy_weight=0.3)
    of = partial(losses.SpecializationLoss, 0.7, entropy_weight=0.3)
    assert_close(of()(routing(z)), expected(torch.tensor([2, 1, 1])))
    counts = routing(z).counts
    assert counts.sum() == 8
    assert_close(of(usage="topk")(routing(z)), expected(counts))
    every_expert = of(usage="topk")(routing(z, top_k=3))
    assert_close(every_expert, 1 / 3 + 0.3 * losses.entropy(z))
    paper = of(entropy_sign="paper")(routing(z))
    assert_close(paper, expected(torch.tensor([2, 1, 1]), entropy_sign="paper"))


def test_without_slots_the_first_choice_is_the_largest_logit():
    z, mask = double(*P).log(), torch.tensor([True, True, True, False])
    router = tr.SoftRouter(3, 3).double()
    router.weight.data = torch.eye(3, dtype=torch.float64)
    dense = router(z, valid_mask=mask)
    expected = losses.specialization_loss(z, torch.tensor([2, 1, 0]), valid_mask=mask)
    assert_close(losses.SpecializationLoss(1.0)(dense), expected)
    counts = torch.tensor([3, 3, 3])
    expected = losses.specialization_loss(z, counts, valid_mask=mask)
    assert_close(losses.SpecializationLoss(1.0, usage="topk")(dense), expected)


def test_the_penalty_makes_tokens_certain_and_the_formula_of_the_paper_does_not():
    z = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    before, after = losses.entropy(z), {}
    for sign in "penalty", "paper":
        loss = losses.specialization_loss(z, torch.tensor([1, 1, 1]), entropy_sign=sign)
        after[sign] = losses.entropy(z - gradient(loss, z))
    assert after["penalty"] < before < after["paper"]


def test_specialization_says_what_is_wrong():
    said = r"entropy_sign among \['penalty', 'paper'\], got 'plus'$"
    with pytest.raises(ValueError, match="^specialization_loss: expected " + said):
        losses.specialization_loss(torch.ones(1, 2), torch.ones(2), entropy_sign="plus")
    with pytest.raises(ValueError, match="^SpecializationLoss: expected " + said):
        losses.SpecializationLoss(1.0, entropy_sign="plus")
    said = r"^SpecializationLoss: expected usage among \['top1', 'topk'\], got 'top2'$"
    with pytest.raises(ValueError, match=said):
        losses.SpecializationLoss(1.0, usage="top2")


# ---- labels, preservation ------------------------------------------------------------------------


def test_route_label_is_the_cross_entropy_of_tokens_that_have_one():
    z = torch.randn(10, 4, dtype=torch.float64)
    labels = torch.where((LABELS >= 0) & (LABELS < 4), LABELS, -100)
    assert_close(route_label(z), F.cross_entropy(z, labels))
    assert_close(route_label(z, MASK, LABELS.int()), F.cross_entropy(z[MASK], labels[MASK]))
    assert route_label(z, labels=torch.full((10,), -1)) == 0


def test_hidden_labels_cost_infinitely_much_and_blind_tokens_nothing():
    z = torch.tensor([[0.0, -torch.inf, 0.0], [-torch.inf] * 3], requires_grad=True)
    loss = losses.route_label(z, torch.tensor([0, 1]))
    close(loss.double(), torch.tensor(2.0).log() / 2)
    assert gradient(loss, z).isfinite().all()
    assert losses.route_label(z, torch.tensor([1, 1])) == torch.inf


def test_route_label_says_what_is_wrong():
    said = (
        r"^route_label: expected labels in integers of shape \[3\], got torch.{} of shape \[{}\]$"
    )
    for labels in torch.zeros(3), torch.zeros(4, dtype=torch.int64):
        name = str(labels.dtype).removeprefix("torch.")
        with pytest.raises(ValueError, match=said.format(name, len(labels))):
            losses.route_label(torch.zeros(3, 2), labels)


def log_of(*probs):
    """Logits, each row of which sums to one after exp."""
    return torch.tensor(probs, dtype=torch.float64).log().requires_grad_()


@pytest.mark.parametrize(
    "experts, labels",
    [
        (None, [0, 2, 1, -1]),  # the expert of the own number; there is no expert 7
        ([2, 2, -1], [2, -1, 2, -1]),  # no task 7
        ([1, 0, 0, 0, 0, 0, 0, 2], [1, 0, 0, 2]),
        ([-1], [-1, -1, -1, -1]),
    ],
    ids=str,
)
def test_labels_of_a_worked_example(experts, labels):
    z, tasks = log_of(*P), torch.tensor([0, 2, 1, 7])
    loss = losses.RouteLabelLoss(2.0, experts_of_tasks=experts)(routing(z), task_ids=tasks)
    pairs = [(token, expert) for token, expert in enumerate(labels) if expert >= 0]
    close(loss, -sum(math.log(P[t][e]) for t, e in pairs) / max(1, len(pairs)))
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for token, expert in pairs:
        expected[token] = torch.tensor(P[token], dtype=torch.float64) / len(pairs)
        expected[token, expert] -= 1 / len(pairs)
    assert_close(gradient(loss, z), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("experts", [None, [3, 3, 0]], ids=str)
def test_labels_are_of_real_tokens_by_sample_or_by_token(experts, dtype):
    loss = losses.RouteLabelLoss(3.0, experts_of_tasks=experts)
    router, x = tr.TopKRouter(6, 4, 2, losses=[loss]), torch.randn(2, 5, 6)
    mask, of_samples = MASK.view(2, 5), torch.tensor([2, 1], dtype=dtype)
    given = router(x, valid_mask=mask, task_ids=of_samples)
    labels = torch.tensor([2, 1] if experts is None else [0, 3]).repeat_interleave(5)
    expected = F.cross_entropy(given.logits.flatten(0, 1)[MASK], labels[MASK])
    assert_close(given.losses["route_label"], expected.detach())
    assert_close(given.aux_loss, 3 * expected)
    of_tokens = of_samples.view(2, 1).expand(2, 5)
    assert torch.equal(router(x, valid_mask=mask, task_ids=of_tokens).aux_loss, given.aux_loss)
    nothing = router(x, valid_mask=torch.zeros(2, 5, dtype=torch.bool), task_ids=of_samples)
    assert nothing.aux_loss == 0


@pytest.mark.parametrize("experts", [None, [3, 1, 0, -1, 2, -1]], ids=str)
def test_a_router_learns_labels_whatever_it_chose(experts):
    """In mode "hard" the weights are labels themselves, and tasks 4 and 5 have no expert."""
    loss = losses.RouteLabelLoss(1.0, experts_of_tasks=experts)
    router = tr.SoftRouter(6, 4, top_k=2, losses=[loss])
    nn.init.normal_(router.weight)
    x, tasks = torch.randn(12, 6), torch.arange(12) % 6
    mask, slopes = torch.arange(12) != 10, []  # one of task 4
    for router.mode in "soft", "soft_topk", "st_topk", "hard":
        slopes.append(gradient(router(x, task_ids=tasks, valid_mask=mask).aux_loss, router.weight))
    labels = torch.tensor(([0, 1, 2, 3, -100, -100] if experts is None else experts) * 2)
    labels = labels.where(mask & (labels >= 0), -100)
    expected = gradient(F.cross_entropy(F.linear(x, router.weight), labels), router.weight)
    for slope in slopes:
        assert_close(slope, expected)


def test_labels_are_of_tokens_with_no_active_expert_too():
    router = tr.ReLURouter(6, 4, losses=[losses.RouteLabelLoss(1.0)])
    x, tasks = torch.randn(10, 6), TASKS.abs()
    with torch.no_grad():
        router.weight.copy_(-x[0].expand(4, 6) * torch.rand(4, 1))
    r = router(x, task_ids=tasks)
    assert not r.used()[0].any()
    assert_close(r.aux_loss, F.cross_entropy(r.logits, tasks))


def test_route_label_loss_says_what_is_wrong():
    said = r"^RouteLabelLoss: expected experts_of_tasks in a list of integers >= -1, one per task, "
    for experts in [], [0, -2], [0, 1.0], [True], "01", {0: 1}, 3, torch.tensor([0, 1]):
        with pytest.raises(ValueError, match=said + r"got "):
            losses.RouteLabelLoss(1.0, experts_of_tasks=experts)
    loss = losses.RouteLabelLoss(1.0, experts_of_tasks=(0, 4))
    said = r"^RouteLabelLoss: expected experts_of_tasks in \[-1, num_experts=4\), got \[0, 4\]$"
    with pytest.raises(ValueError, match=said):
        tr.TopKRouter(6, 4, 2, losses=[loss])
    with pytest.raises(ValueError, match=said):
        loss(routing(torch.randn(2, 4)), task_ids=torch.zeros(2).long())
    assert tr.TopKRouter(6, 5, 2, losses=[loss]).losses[0] is loss

    router = tr.TopKRouter(6, 4, 2, losses=[losses.RouteLabelLoss(1.0)])
    said = r"^RouteLabelLoss: expected task_ids, got none\. Pass them by keyword to the router$"
    with pytest.raises(ValueError, match=said):
        router(torch.randn(3, 6))
    router.eval()(torch.randn(3, 6))  # where losses are not computed
    router.train()
    for ids in torch.zeros(3), torch.ones(3, dtype=torch.bool), torch.zeros(2).long():
        said = (
            r"^RouteLabelLoss: expected task_ids in integers of shape \[3\], or leading dimensions "
            rf"of it, got {ids.dtype} of shape \[{len(ids)}\]$"
        )
        with pytest.raises(ValueError, match=said):
            router(torch.randn(3, 6), task_ids=ids)
    with pytest.raises(ValueError, match=r"^RouteLabelLoss: expected a routing with logits, got"):
        losses.RouteLabelLoss(1.0)(tr.Routing(torch.rand(2, 4)), torch.zeros(2).long())


def test_preservation_is_the_squared_distance_from_what_experts_were():
    experts = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2).bfloat16()])
    before = [p.detach().clone().requires_grad_() for p in experts.parameters()]
    with torch.no_grad():
        for p in experts.parameters():
            p += torch.randn_like(p)
    loss = losses.expert_preservation(experts.parameters(), before)
    pairs = list(zip(experts.parameters(), before))
    expected = sum((p.double() - q.double()).square().sum() for p, q in pairs)
    assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    loss.backward()
    for p, q in pairs:
        assert q.grad is None
        assert_close(p.grad, (2 * (p.float() - q.float())).to(p.dtype).detach())
    assert losses.expert_preservation([], []) == 0
    x = double([1.0, 2.0])
    assert losses.expert_preservation([x], [torch.zeros(1, 2)]).dtype == torch.float64


@pytest.mark.parametrize("reference", [[], [torch.zeros(1, 3)], [torch.zeros(3)] * 2], ids=len)
def test_preservation_says_what_is_wrong(reference):
    shapes = str([list(p.shape) for p in reference])
    with pytest.raises(ValueError) as info:
        losses.expert_preservation([torch.zeros(3)], reference)
    said = f"expert_preservation: expected reference of the shapes [[3]], got {shapes}"
    assert str(info.value) == said


# ---- alignment -----------------------------------------------------------------------------------


def divergence(z, reference):
    p, q = reference.softmax(0), z.softmax(0)
    return sum(p[e] * (p[e] / q[e]).log() for e in range(len(p)))


def test_alignment_is_the_divergence_over_all_and_among_the_best_of_the_reference():
    z = torch.randn(10, 4, dtype=torch.float64)
    everywhere, best = [], []
    for token in range(10):
        kept = REFERENCE[token].argsort(descending=True)[:2]
        everywhere.append(divergence(z[token], REFERENCE[token]))
        best.append(divergence(z[token][kept], REFERENCE[token][kept]))
    assert_close(alignment(z), sum(everywhere) / 10)
    assert_close(alignment(z, top_k=2), (sum(everywhere) + sum(best)) / 10)
    assert_close(alignment(z, top_k=1), sum(everywhere) / 10)
    assert_close(alignment(z, top_k=4), 2 * sum(everywhere) / 10)


def test_alignment_moves_the_router_alone():
    z, reference = (x.requires_grad_() for x in torch.randn(2, 10, 4, dtype=torch.float64))
    loss = losses.router_alignment(z, reference)
    expected = (z.softmax(-1) - reference.softmax(-1)) / 10
    assert_close(gradient(loss, z), expected.detach())
    assert torch.autograd.grad(loss, reference, allow_unused=True)[0] is None


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_router_is_aligned_with_itself(top_k):
    z = (REFERENCE + 3).requires_grad_()
    loss = alignment(z, top_k=top_k)
    assert_close([loss, gradient(loss, z)], [torch.zeros(()).double(), torch.zeros(10, 4).double()])


def test_alignment_of_hidden_experts():
    inf = torch.inf
    reference = torch.tensor([[1.0, -inf, 0.0], [-inf, -inf, -inf], [0.0, 1.0, 2.0]])
    z = torch.tensor([[0.0, -inf, 0.0], [0.0, 1.0, 2.0], [-inf, -inf, -inf]], requires_grad=True)
    loss = losses.router_alignment(z, reference, top_k=2)
    expected = 2 * divergence(torch.zeros(2), torch.tensor([1.0, 0.0])) / 3
    assert_close(loss, expected)
    slope = gradient(loss, z)
    assert slope.isfinite().all() and (slope[1:] == 0).all()
    assert losses.router_alignment(z[:1], torch.zeros(1, 3)) == inf


def test_alignment_says_what_is_wrong():
    z = torch.zeros(2, 4)
    said = r"^router_alignment: expected reference of shape \[2, 4\], that of logits, got \[4\]$"
    with pytest.raises(ValueError, match=said):
        losses.router_alignment(z, z[0])
    for top_k in 0, 5:
        said = rf"^router_alignment: expected top_k in \[1, num_experts=4\], got {top_k}$"
        with pytest.raises(ValueError, match=said):
            losses.router_alignment(z, z, top_k=top_k)


# ---- the modules, in routers ---------------------------------------------------------------------

MODULES = [
    losses.MutualInformationLoss(0.5, 3),
    losses.MutualInformationLoss(0.5, 3, eps=0, scope="group", grad_reduction="mean"),
    losses.RouterOrthogonalityLoss(0.5),
    losses.RouterOrthogonalityLoss(0.5, form="cosine"),
    losses.VarianceLoss(0.5, axis="token"),
    losses.SpecializationLoss(0.5),
    losses.RouteLabelLoss(0.5),
    losses.RouteLabelLoss(0.5, experts_of_tasks=[3, -1, 0]),
]
each_module = pytest.mark.parametrize("loss", MODULES, ids=repr)


@each_module
def test_modules_survive_their_configuration_and_copies(loss):
    again = tr.from_config(json.loads(json.dumps(loss.config())))
    assert type(again) is type(loss) and again.config() == loss.config()
    for copied in copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)):
        assert copied.config() == loss.config()


@each_module
def test_routers_with_the_loss_compile_and_learn_by_every_delivery(loss):
    def moe():
        torch.manual_seed(1)
        router = tr.TopKRouter(6, 4, 2, losses=[copy.deepcopy(loss)])
        nn.init.normal_(router.weight)
        return tr.MoE(router, tr.SwiGLUExperts(4, 6, 5))

    x, mask = torch.randn(10, 6), MASK
    returned, attached, compiled, other = (moe() for _ in range(4))
    y, r = returned(x, return_routing=True, valid_mask=mask, task_ids=TASKS)
    (0 * y.sum() + r.aux_loss).backward()
    expected = returned.router.weight.grad
    assert expected.abs().max() > 1e-4

    deliver = tr.attach(attached)
    deliver(0 * attached(x, valid_mask=mask, task_ids=TASKS).sum()).backward()
    assert_close(attached.router.weight.grad, expected)

    call = torch.compile(compiled.router, fullgraph=True, backend="aot_eager")
    call(x, valid_mask=mask, task_ids=TASKS).aux_loss.backward()
    assert_close(compiled.router.weight.grad, expected)

    padding = x.where(mask.unsqueeze(1), torch.nan)
    other.router(padding, valid_mask=mask, task_ids=TASKS).aux_loss.backward()
    assert torch.equal(other.router.weight.grad, expected)


def test_a_router_gives_its_loss_the_tasks_of_the_call():
    router = tr.TopKRouter(6, 4, 2, losses=[losses.MutualInformationLoss(2.0, 3)])
    x = torch.randn(10, 6)
    r = router(x, valid_mask=MASK, task_ids=TASKS)
    expected = mutual_information(r.logits, MASK)
    assert_close(r.aux_loss, 2 * expected)
    assert_close(r.losses["mutual_information"], expected.detach())
    of_samples = router(x.view(2, 5, 6), task_ids=torch.tensor([2, 0])).aux_loss
    ids = torch.tensor([2, 0]).repeat_interleave(5)
    assert_close(of_samples, router(x, task_ids=ids).aux_loss)


def test_tokens_that_see_no_expert():
    """Their probabilities are 0; they are no tokens of a task."""
    z = torch.cat([torch.randn(5, 3, dtype=torch.float64), torch.full((1, 3), -torch.inf)])
    ids = torch.tensor([0, 1, 0, 1, 1, 0])
    z.requires_grad_()
    for loss, expected in (
        (losses.MutualInformationLoss(1.0, 2), losses.MutualInformationLoss(1.0, 2)),
        (losses.VarianceLoss(1.0), losses.VarianceLoss(5 / 6)),
        (losses.SpecializationLoss(1.0), None),
    ):
        given = {"task_ids": ids} if loss.needs else {}
        value = loss(routing(z), **given)
        if expected is not None:
            given = {"task_ids": ids[:5]} if loss.needs else {}
            assert_close(value, expected.weight * expected(routing(z[:5]), **given))
        assert value.isfinite() and gradient(value, z).isfinite().all()


# ---- balance inside groups -----------------------------------------------------------------------


def by_numbers(p, tasks, groups, delta):
    """Sample by sample and expert by expert, for ``p`` [samples, tokens, experts]."""
    z = []
    for sample, task in zip(p, tasks):
        for expert in range(p.shape[-1]):
            own = [1 + delta if expert in g else 1 - delta for g in groups]
            factor = own[task] if 0 <= task < len(groups) else 1
            z.append(factor * sum(float(row[expert]) for row in sample))
    mean = sum(z) / len(z)
    return sum((x - mean) ** 2 for x in z) / (len(z) - 1) / (mean**2 + 1e-10)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("groups", [None, [[0], [1, 3]], [[2], [0], [1]]], ids=str)
@pytest.mark.parametrize("delta", [0.1, -0.4])
def test_balance_in_groups_is_that_of_the_numbers(groups, delta, dtype):
    loss = losses.LocalizedBalanceLoss(2.0, groups=groups, delta=delta)
    router, x = tr.SoftRouter(6, 4, losses=[loss]).double(), torch.randn(3, 5, 6).double()
    torch.nn.init.normal_(router.weight)
    tasks = torch.tensor([1, 0, 9], dtype=dtype)  # the last is of no group
    given = router(x, task_ids=tasks)
    p, halves = given.logits.softmax(-1), [[2, 3], [0, 1]]
    expected = by_numbers(p, tasks.tolist(), groups or halves, delta)
    assert given.losses["localized_balance"].item() == pytest.approx(expected, rel=1e-9)
    given.aux_loss.backward()
    assert router.weight.grad.any()


def test_balance_in_groups_is_of_real_tokens():
    loss = losses.LocalizedBalanceLoss(1.0)
    router, x = tr.SoftRouter(6, 4, losses=[loss]).double(), torch.randn(3, 5, 6).double()
    torch.nn.init.normal_(router.weight)
    tasks, mask = torch.tensor([1, 0, 1]), torch.ones(3, 5, dtype=torch.bool)
    mask[0, 3:], mask[2] = False, False  # a sample has no token at all
    x[~mask] = torch.nan
    given = router(x, task_ids=tasks, valid_mask=mask)
    p = given.logits.softmax(-1)
    z = torch.stack([p[0, :3].sum(0), p[1].sum(0)])
    z = z * torch.tensor([[1.1, 1.1, 0.9, 0.9], [0.9, 0.9, 1.1, 1.1]]).double()
    expected = z.var() / (z.mean() ** 2 + 1e-10)
    assert_close(given.losses["localized_balance"], expected.detach())
    nothing = router(x, task_ids=tasks, valid_mask=torch.zeros_like(mask))
    assert nothing.losses["localized_balance"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": 1.0}, "expected delta in (-1, 1), got 1.0"),
        ({"groups": [[0, 4]]}, "expected groups of experts in [0, 4), got [4]"),
    ],
)
def test_groups_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(f"LocalizedBalanceLoss: {message}")):
        tr.SoftRouter(6, 4, losses=[losses.LocalizedBalanceLoss(1.0, **options)])


def test_halves_need_an_even_number_of_experts_and_labels():
    with pytest.raises(
        ValueError, match=r"LocalizedBalanceLoss: expected groups for an odd number"
    ):
        tr.SoftRouter(6, 5, losses=[losses.LocalizedBalanceLoss(1.0)])
    with pytest.raises(ValueError, match=r"LocalizedBalanceLoss: expected task_ids, got none"):
        tr.SoftRouter(6, 4, losses=[losses.LocalizedBalanceLoss(1.0)])(torch.randn(2, 3, 6))
