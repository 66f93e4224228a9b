"""Worked examples of the ReLU router's operator and losses, and what only they promise."""

import json
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

import torch_routers as tr
from torch_routers import losses, ops


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


def close(actual, expected):
    assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=6e-8)


def test_gate():
    z = double(0.6, -0.2, 0.3, 0.0)
    gain = torch.tensor([1.0, 1, 0.5, -1], dtype=torch.float64, requires_grad=True)
    y, inverse, counts = ops.relu_rms_gate(z, gain)
    close(y, [1.7887749, 0, 0.4471937, 0])
    close(inverse, 2.9812915)
    assert counts.tolist() == [1, 0, 1, 0]
    y.backward(torch.tensor([0.5, 1, -1, 2], dtype=torch.float64))
    close(z.grad, [0.8944404, 0, -1.7887484, 0])
    close(gain.grad, [0.8943874, 0, -0.8943874, 0])
    close(losses.activation_probs(z.detach()), [0.6666642, 0, 0.3333321, 0])


def test_activity_does_not_depend_on_the_gain():
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    for gain in -1.0, 0.0, 2.0:
        counts = ops.relu_rms_gate(logits, torch.full((8,), gain)).counts
        assert torch.equal(counts, (logits > 0).sum(0))


def test_weights_do_not_depend_on_the_scale_of_logits():
    logits, gain = torch.randn(9, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    one, other = (ops.relu_rms_gate(c * logits, gain, eps=1e-20).weights for c in (1, 1000))
    assert_close(one, other)
    assert (one.square().mean(-1) <= 1 + 1e-12).all()


def test_activation_locality():
    z = double([0.5, -0.3], [0.2, 0.4], [-0.1, 0.6])
    loss = losses.activation_locality(z, sharpness=2)
    close(loss, 0.7138191)
    first = [0.0661855, -0.1678154]
    close(
        torch.autograd.grad(loss, z)[0],
        [first, [-0.0458695, 0.0248978], [-0.0495033, -0.0711578]],
    )
    loss = losses.activation_locality(z, sharpness=2, detach_target=True)
    close(torch.autograd.grad(loss, z)[0], [first, [0.0742608, -0.0392752], [0, 0]])


def test_activation_locality_leaves_out_pairs_of_padding_and_across_documents():
    z = torch.randn(6, 4, dtype=torch.float64)
    documents, both = torch.tensor([0, 0, 0, 1, 1, 1]), [z[:3], z[3:]]
    expected = sum(losses.activation_locality(part) for part in both) / 2
    assert_close(losses.activation_locality(z, group_ids=documents), expected)
    padded = torch.cat([z, torch.full((2, 4), torch.nan)]).requires_grad_()
    mask = torch.arange(8) < 6
    loss = losses.activation_locality(padded, valid_mask=mask)
    assert_close(loss, losses.activation_locality(z))
    assert (torch.autograd.grad(loss, padded)[0][6:] == 0).all()


def test_chunk_sparsification():
    p = double([0.7, 0.3, 0], [0.5, 0, 0.5], [0, 1, 0], [0.2, 0.8, 0])
    loss = losses.chunk_sparsification(p, chunk_size=2)
    close(loss, 0.4749867)
    close(
        torch.autograd.grad(loss, p)[0],
        [
            [0.0833350, 0.1666683, 0.0833350],
            [0.0500017, 0.1166683, 0.1666683],
            [0.1333350, 0.0333350, 0.1666683],
            [0.1666683, 0.0000017, 0.1666683],
        ],
    )
    mask = torch.tensor([True, True, True, False])
    close(losses.chunk_sparsification(p, chunk_size=2, valid_mask=mask), 0.4416517)


def test_chunk_sparsification_of_certainty_in_bfloat16():
    p = torch.eye(3, dtype=torch.bfloat16).repeat(6, 1).requires_grad_()
    losses.chunk_sparsification(p, chunk_size=9).backward()
    assert p.grad.isfinite().all()


def test_chunk_sparsification_of_tails_and_padding():
    p = torch.rand(10, 4, dtype=torch.float64).softmax(-1)

    def loss(p, **options):
        return losses.chunk_sparsification(p, chunk_size=4, **options)

    assert_close(loss(p, tail="drop"), loss(p[:8]))
    assert_close(loss(p), (2 * loss(p[:8]) + loss(p[8:])) / 3)
    with pytest.raises(ValueError, match="expected tokens in whole chunks of 4, got 10"):
        loss(p, tail="error")
    padded = torch.cat([p, torch.full((6, 4), torch.nan)])
    mask = torch.arange(16) < 10
    assert_close(loss(padded, valid_mask=mask), loss(p))
    assert loss(padded, valid_mask=mask, reference=True) < loss(p)
    assert loss(p[:0]) == loss(p, valid_mask=torch.zeros(10, dtype=torch.bool)) == 0


DOCUMENTS = torch.tensor([0] * 5 + [1] + [2] * 11 + [0] * 3 + [7] * 4)  # 0 comes again


def documents(*tensors):
    """The rows of each document."""
    ends = [0, 5, 6, 17, 20, 24]
    return [[tensor[a:b] for tensor in tensors] for a, b in pairwise(ends)]


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 7, 8, 64])
@pytest.mark.parametrize("tail", ["pad", "drop"])
@pytest.mark.parametrize("reference", [False, True])
def test_chunks_never_cross_documents(chunk_size, tail, reference):
    """Value and gradient are those of the documents apart, weighed by their chunks."""
    p = torch.rand(24, 4, dtype=torch.float64).softmax(-1).requires_grad_()
    mask = (torch.arange(24) % 9 != 3) & (torch.arange(24) < 20)  # the last document is padding
    options = {"chunk_size": chunk_size, "tail": tail, "reference": reference}
    value = losses.chunk_sparsification(p, valid_mask=mask, group_ids=DOCUMENTS, **options)
    total, chunks = 0 * p.sum(), 0
    for rows, valid in documents(p, mask):
        parts = [valid[i : i + chunk_size] for i in range(0, len(valid), chunk_size)]
        parts = [part for part in parts if tail == "pad" or len(part) == chunk_size]
        count = sum(reference or bool(part.any()) for part in parts)
        total = total + count * losses.chunk_sparsification(rows, valid_mask=valid, **options)
        chunks += count
    assert_close(value, total / max(1, chunks))
    direction = torch.autograd.grad(value, p)[0]
    assert_close(direction, torch.autograd.grad(total / max(1, chunks), p)[0])
    assert (direction[~mask] == 0).all()


def test_one_document_is_a_sequence():
    p = torch.rand(3, 10, 4, dtype=torch.float64).softmax(-1).requires_grad_()
    ids = torch.arange(3).unsqueeze(-1).expand(3, 10)
    results = []
    for of in {}, {"group_ids": ids}:
        value = losses.chunk_sparsification(p, chunk_size=4, **of)
        results.append((value.detach(), torch.autograd.grad(value, p)[0]))
    assert_close(results[1], results[0])
    check = partial(losses.chunk_sparsification, chunk_size=4, group_ids=ids)
    assert torch.autograd.gradcheck(check, p)


def test_chunks_of_documents_of_a_worked_example():
    p = double([0.7, 0.3, 0], [0.5, 0, 0.5], [0, 1, 0], [0.2, 0.8, 0])
    ids = torch.tensor([0, 0, 1, 1])
    close(losses.chunk_sparsification(p, chunk_size=2, group_ids=ids), 0.4749867)
    ids = torch.tensor([0, 1, 1, 2])  # 1/3, 2/3, 1/3 but for 1e-5
    value = losses.chunk_sparsification(p, chunk_size=2, group_ids=ids)
    assert_close(value, torch.tensor(4 / 9, dtype=torch.float64), rtol=0, atol=3e-5)


def test_chunks_of_documents_with_certainty_and_padding():
    p = torch.eye(3, dtype=torch.bfloat16).repeat(6, 1)
    p[4] = torch.nan
    p.requires_grad_()
    mask = torch.arange(18) != 4
    value = losses.chunk_sparsification(p, chunk_size=9, valid_mask=mask, group_ids=mask.long())
    value.backward()
    assert value.isfinite() and p.grad.isfinite().all()


def test_whole_chunks_of_documents_are_not_checked():
    said = (
        r"^chunk_sparsification: expected tail among \['pad', 'drop'\] with group_ids, got 'error'$"
    )
    with pytest.raises(ValueError, match=said):
        losses.chunk_sparsification(torch.rand(8, 3), tail="error", group_ids=torch.zeros(8))
    for tail, size, said in ("crop", 4, "tail among"), ("pad", 0, "chunk_size >= 1, got 0"):
        for make in (
            partial(losses.ChunkSparsificationLoss, 1.0),
            partial(losses.chunk_sparsification, torch.rand(8, 3)),
        ):
            with pytest.raises(ValueError, match=f"expected {said}"):
                make(chunk_size=size, tail=tail)


def token_balance_by_loop(z, mask, ids, sharpness):
    changes = []
    for t in range(1, len(z)):
        if mask[t - 1] and mask[t] and ids[t - 1] == ids[t]:
            before, now = (sharpness * z[t - 1]).sigmoid(), (sharpness * z[t]).sigmoid()
            changes.append((before.mean() - now.mean()) ** 2)
    return sum(changes) / len(changes)


def test_token_balance_equals_a_loop():
    z = torch.randn(24, 4, dtype=torch.float64).requires_grad_()
    mask = torch.arange(24) % 9 != 3
    z.data[~mask] = torch.nan
    value = losses.token_balance(z, sharpness=2, valid_mask=mask, group_ids=DOCUMENTS)
    clean = torch.where(mask.unsqueeze(-1), z, 0)
    expected = token_balance_by_loop(clean, mask, DOCUMENTS, 2)
    assert_close(value, expected)
    gradient = torch.autograd.grad(value, z)[0]
    assert_close(gradient, torch.autograd.grad(expected, z)[0].nan_to_num(0))
    assert (gradient[~mask] == 0).all()
    assert losses.token_balance(z[:1]) == losses.token_balance(z[:0]) == 0


def test_token_balance_pushes_both_tokens_of_a_pair():
    """n = (.7310586 + .5) / 2 and (.8807971 + .5) / 2."""
    z = double([0.5, 0.0], [1.0, 0.0])
    value = losses.token_balance(z, sharpness=2)
    close(value, (0.8807971 - 0.7310586) ** 2 / 4)
    before, now = torch.autograd.grad(value, z)[0]
    assert before[0] < 0 < now[0] and (before[1], now[1]) == (-now[1], now[1])


def test_activation_entropy_of_a_worked_example():
    p = double([0.6666642, 0, 0.3333321, 0])
    value = losses.activation_entropy(p)
    close(value, 0.6364955)
    slope = -((p + 1e-5).log() + p / (p + 1e-5))
    assert_close(torch.autograd.grad(value, p)[0], slope.detach())
    z = double([0.6, -0.2, 0.3, 0.0], [torch.nan] * 4)
    mask = torch.tensor([True, False])
    close(losses.activation_entropy(losses.activation_probs(z, mask), valid_mask=mask), 0.6364955)
    assert losses.activation_entropy(p[:0]) == 0
    assert losses.activation_entropy(p.detach().bfloat16()).dtype == torch.float32


def relu_router(*of, experts=6):
    torch.manual_seed(0)
    router = tr.ReLURouter(8, experts, losses=of).double()
    router.gain.data.normal_()
    return router


def of_router(router, tokens=24, **options):
    x = torch.randn(tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return router(x, **options)


def test_load_balance_of_a_relu_router_is_the_balance_of_blockffn():
    routing = of_router(relu_router(losses.LoadBalanceLoss(1.0)))
    p = losses.activation_probs(routing.logits)
    counts = (p > 0).sum(0)
    expected = 6 * (p.mean(0) * counts / (counts.sum() + 1e-5)).sum()
    assert_close(routing.losses["load_balance"], expected, rtol=1e-6, atol=0)
    gradient, by_hand = (
        torch.autograd.grad(loss, routing.logits, retain_graph=True)[0]
        for loss in (routing.aux_loss, expected)
    )
    assert_close(gradient, by_hand, rtol=1e-6, atol=0)


def test_losses_of_a_relu_router_equal_their_functions():
    of = [
        losses.TokenBalanceLoss(0.5, sharpness=3.0),
        losses.ActivationEntropyLoss(0.25),
        losses.WeightL1Loss(1e-8),
    ]
    mask = torch.arange(24) % 5 != 2
    routing = of_router(relu_router(*of), valid_mask=mask)
    logits = routing.logits.detach()
    values = {
        "token_balance": losses.token_balance(logits, sharpness=3.0, valid_mask=mask),
        "activation_entropy": losses.activation_entropy(
            losses.activation_probs(logits, mask), valid_mask=mask
        ),
        "weight_l1": routing.weights.detach()[mask].abs().sum(),
    }
    assert_close(routing.losses, values)
    weights = torch.tensor([0.5, 0.25, 1e-8], dtype=torch.float64)
    assert_close(routing.aux_loss.detach(), (weights * torch.stack(list(values.values()))).sum())


ALL = [
    losses.ActivationLocalityLoss(0.5, 10.0),
    losses.ChunkSparsificationLoss(0.5, 4),
    losses.TokenBalanceLoss(0.5, sharpness=10.0),
    losses.ActivationEntropyLoss(0.5, eps=1e-6),
    losses.ReLUSparsityLoss(0.5, 2),
    losses.WeightL1Loss(0.5),
]


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.name)
def test_losses_of_a_relu_router(loss):
    again = tr.from_config(json.loads(json.dumps(loss.config())))
    assert type(again) is type(loss) and again.config() == loss.config()
    # Padding at the end, whatever it holds, is no token.
    router, results = relu_router(loss), []
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    valid = torch.arange(10).expand(2, 10) < 7
    for content in None, 0.0, torch.nan:
        router.zero_grad()
        if content is None:
            routing = router(x[:, :7])
        else:
            routing = router(torch.where(valid.unsqueeze(-1), x, content), valid_mask=valid)
        routing.aux_loss.backward()
        results.append([routing.aux_loss.detach(), router.weight.grad.clone()])
    for compacted, zero, nan in zip(*results):
        assert torch.equal(zero, nan)
        assert_close(zero, compacted, rtol=1e-6, atol=1e-12)
    for tokens, mask in (0, None), (3, torch.zeros(3, dtype=torch.bool)):
        routing = of_router(router, tokens, valid_mask=mask)
        assert routing.aux_loss == 0
        assert (torch.autograd.grad(routing.aux_loss, router.weight)[0] == 0).all()
    one = of_router(relu_router(loss, experts=1))
    assert one.aux_loss.isfinite()
    single = router(x[0, 0])  # a token alone has no neighbour
    assert single.aux_loss.isfinite()


def test_losses_of_a_relu_router_compile():
    router = relu_router(*ALL)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    for offsets in None, torch.tensor([0, 5, 24]):
        actual, expected = (of_router(r, group_offsets=offsets) for r in (compiled, router))
        assert_close(actual.losses, expected.losses)


def test_losses_of_documents_see_half_types():
    x = torch.randn(24, 8).bfloat16()
    routing = relu_router(*ALL).bfloat16()(x, group_offsets=torch.tensor([0, 5, 24]))
    assert all(value.dtype == torch.float32 for value in routing.losses.values())


def test_relu_sparsity():
    z = torch.randn(7, 5, dtype=torch.float64)
    expected = sum(5 / (49 * 2) * z[:, e].relu().sum() * (z[:, e] > 0).sum() for e in range(5))
    assert_close(losses.relu_sparsity(z, 2), expected)


@pytest.mark.parametrize(
    "before, now, weight", [(0.40, 0.42, 0.0525), (0.42, 0.30, 0.0357143), (0.40, 0.402, 0.05125)]
)
def test_adaptive_factor(before, now, weight):
    loss = losses.ChunkSparsificationLoss(0.05)
    factor = losses.AdaptiveFactor([loss], 0.05, warmup=20, window=10)
    for value in [before] * 10 + [now] * 10:
        factor.step(value)
        assert loss.weight == 0.05
    seen = []
    for _ in range(10):
        factor.step(now)
        seen.append(loss.weight)
    assert seen[4] == pytest.approx((0.05 + weight) / 2, abs=1e-7)  # in a line
    assert seen[9] == pytest.approx(weight, abs=1e-7)


def test_adaptive_sparsity():
    loss = losses.ReLUSparsityLoss(1.0, top_k=2)
    adaptive = losses.AdaptiveSparsity([loss], 0.25, floor=True)
    assert loss.weight == 1e-8
    adaptive.step(0.5)
    assert loss.weight == pytest.approx(1.2e-8)
    for _ in range(3):
        adaptive.step(0.1)
    assert loss.weight == 1e-8


def test_losses_read_a_dense_routing():
    routing = tr.TopKRouter(8, 4, 2)(torch.randn(3, 8))
    for loss in ALL[:-1]:
        said = f"^{type(loss).__name__}: expected a dense routing with logits"
        with pytest.raises(ValueError, match=said):
            loss(routing)
