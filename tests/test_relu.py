"""Worked examples of the ReLU router's operator and losses, and what only they promise."""

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
    for loss in losses.ActivationLocalityLoss(1), losses.ReLUSparsityLoss(1, 2):
        with pytest.raises(ValueError, match="expected a dense routing with logits"):
            loss(routing)
