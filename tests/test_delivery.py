"""The three deliveries, in every mode in which a model is trained."""

import copy
import itertools
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import torch_routers as tr

BATCHES = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def save_gemms(ctx, op, *args, **kwargs):
    gemms = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
    return CheckpointPolicy.MUST_SAVE if op in gemms else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "none": lambda f, x: f(x),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "selective": partial(
        checkpoint,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, save_gemms),
    ),
}


def with_losses():
    return tr.TopKRouter(8, 4, 2, losses=[tr.losses.LoadBalanceLoss(0.1), tr.losses.ZLoss(0.1)])


class Block(nn.Module):
    def __init__(self, checkpointing, router):
        super().__init__()
        nn.init.normal_(router.weight, std=0.5)
        self.norm, self.moe = nn.LayerNorm(8), tr.MoE(router, tr.SwiGLUExperts(4, 8, 6))
        self.checkpoint = CHECKPOINTS[checkpointing]

    def body(self, x):
        return x + self.moe(self.norm(x))

    def forward(self, x):
        return self.checkpoint(self.body, x) if self.training else self.body(x)


def model(checkpointing="none", router=with_losses):
    torch.manual_seed(0)
    blocks = (Block(checkpointing, router()) for _ in range(2))
    return nn.Sequential(nn.Linear(8, 8), *blocks)


def compiled(model, what, backend="aot_eager"):
    compile = partial(torch.compile, fullgraph=True, backend=backend)
    if what == "model":
        return compile(model)
    if what == "blocks":
        for block in model[1:]:
            block.body = compile(block.body)
    return model


def gradients(model):
    return [parameter.grad for parameter in model.parameters()]


def reference(batches, scales=(1.0, 1.0, 1.0)):
    """Eager, no checkpointing, losses returned by the modules themselves."""
    m, kept = model(), []
    for block in m[1:]:
        block.moe.router.register_forward_hook(lambda module, args, routing: kept.append(routing))
    for x, scale in zip(batches, scales):
        kept.clear()
        with tr.collect(m):  # a destination; what is kept is what the modules return
            y = m(x)
        ((y.square().mean() + sum(routing.aux_loss for routing in kept)) * scale).backward()
    return gradients(m)


# ---- attached ------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", CHECKPOINTS)
@pytest.mark.parametrize("compile", [None, "model", "blocks"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_attached_losses_are_right_in_every_mode(checkpointing, compile, micro_batches):
    """The scale changes between micro-batches, as GradScaler's does: a stale one would show."""
    scales, batches = (1024.0, 1.0, 64.0), BATCHES[:micro_batches]
    m = model(checkpointing)
    attached, forward = tr.attach(m), compiled(m, compile)
    for x, scale in zip(batches, scales):
        (attached(forward(x).square().mean()) * scale).backward()
    assert_close(gradients(m), reference(batches, scales), rtol=1e-4, atol=1e-4)


def test_attached_losses_with_inductor():
    m = model()
    attached, forward = tr.attach(m), compiled(m, "model", "inductor")
    for x, scale in zip(BATCHES, (8.0, 1.0, 2.0)):
        (attached(forward(x).square().mean()) * scale).backward()
    assert_close(gradients(m), reference(BATCHES, (8.0, 1.0, 2.0)), rtol=1e-4, atol=1e-5)


def test_attached_losses_when_all_forwards_come_first():
    m = model("non-reentrant")
    attached = tr.attach(m)
    losses = [attached(m(x).square().mean()) for x in BATCHES]
    for loss in losses:
        loss.backward()
    assert_close(gradients(m), reference(BATCHES), rtol=1e-4, atol=1e-6)


def test_attached_losses_with_a_gradient_scaler():
    m = model()
    attached, scaler = tr.attach(m), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(m.parameters(), lr=0)
    scaler.scale(attached(m(BATCHES[0]).square().mean())).backward()
    scaler.unscale_(optimizer)
    assert_close(gradients(m), reference(BATCHES[:1]))


@pytest.mark.parametrize("share", [0.25, torch.tensor(0.25)])
def test_a_share_multiplies_the_attached_losses_alone(share):
    """A quarter of the step's items, by which the task loss is divided already; scaled in place."""
    attached = tr.attach(m := model())
    loss = m(BATCHES[0]).square().mean() / 4
    found = attached(loss, share=share)
    assert torch.equal(loss, found)
    found *= 3
    found.backward()
    assert_close(gradients(m), reference(BATCHES[:1], (0.75,)))


def test_opcheck():
    op = torch.ops.torch_routers._read_after.default
    torch.library.opcheck(op, (torch.tensor(2.0), torch.ones(3)))


def test_attached_losses_cannot_be_added_again():
    tr.attach(m := model())
    with tr.collect(m) as routings:
        m(BATCHES[0])
    assert set(routings[0].losses) == {"load_balance", "z"}
    assert routings[0].aux_loss is None
    with pytest.raises(RuntimeError, match="`attach` already delivers"):
        routings.aux_loss()
    with pytest.raises(ValueError, match="attach: expected a model without attached losses"):
        tr.attach(m)


def test_detaching_gives_the_losses_back():
    attached = tr.attach(m := model())
    attached.remove()
    with tr.collect(m) as routings:
        m(BATCHES[0])
    assert routings.aux_loss() > 0


def test_forgetting_the_attached_loss_is_noticed():
    tr.attach(m := model())
    m(BATCHES[0]).sum().backward()
    assert m[1].moe.router.weight.grad.isnan().all()


# ---- collected -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "checkpointing, compile",
    [
        mode
        for mode in itertools.product(["none", "non-reentrant"], [None, "model"])
        if mode != ("non-reentrant", "model")  # an error: test_collecting_says_where_it_cannot_work
    ],
)
def test_collected_losses(checkpointing, compile):
    m = model(checkpointing)
    forward = compiled(m, compile)
    with tr.collect(m):
        forward(BATCHES[0])
    with tr.collect(m) as routings:
        y = forward(BATCHES[0])
        (y.square().mean() + routings.aux_loss()).backward()  # recomputes inside the block
    assert len(routings) == 2
    assert_close(gradients(m), reference(BATCHES[:1]))


def test_recomputation_after_the_block_is_no_lost_loss():
    m = model("non-reentrant")
    with tr.collect(m) as routings:
        loss = m(BATCHES[0]).square().mean() + routings.aux_loss()
    loss.backward()
    assert_close(gradients(m), reference(BATCHES[:1]))


def test_collecting_says_where_it_cannot_work():
    with tr.collect(m := model("reentrant")) as routings:
        m(BATCHES[0].clone().requires_grad_())
    with pytest.raises(RuntimeError, match="Reentrant checkpointing detaches"):
        routings.aux_loss()
    with tr.collect(m := model("non-reentrant")), pytest.raises(Exception, match="side effect"):
        compiled(m, "model")(BATCHES[0])
    with tr.collect(m := model().eval()) as routings:
        m(BATCHES[0])
    with pytest.raises(RuntimeError, match="got 2 of 2 without"):
        routings.aux_loss()
    with pytest.raises(ValueError, match="collect: expected a model with routers, got Linear"):
        tr.collect(nn.Linear(2, 2)).__enter__()


def test_collecting_nests_and_keeps_models_apart():
    a, b = model().eval(), model().eval()
    with tr.collect(a) as outer:
        a(BATCHES[0])
        with tr.collect(a) as inner, tr.collect(b) as other:
            a(BATCHES[0])
    a(BATCHES[0])
    assert (len(outer), len(inner), len(other)) == (4, 2, 0)


def test_collecting_compiles_twice_at_most():
    m = model().eval()
    forward = compiled(m, "model")
    forward(BATCHES[0])
    with tr.collect(m):
        forward(BATCHES[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for x in BATCHES:
            forward(x)
            with tr.collect(m) as routings:
                forward(x)
            assert len(routings) == 2


# ---- returned ------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", CHECKPOINTS)
def test_a_lost_loss_raises(checkpointing):
    """Reentrant checkpointing too, whose first forward runs without gradients."""
    m = model(checkpointing)
    with pytest.raises(RuntimeError) as info:
        m(BATCHES[0].clone().requires_grad_())
    assert str(info.value) == (
        "MoE: expected a destination for 2 losses, got none. "
        "Use return_routing=True, tr.collect or tr.attach"
    )
    m.eval()(BATCHES[0])


def test_logged_losses_train_nothing():
    m = model()
    with tr.collect(m) as routings:
        m(BATCHES[0])
    assert not any(loss.requires_grad for r in routings for loss in r.losses.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_routing_crosses_a_checkpoint(reentrant):
    a, b, x = model()[1].moe.router, model()[1].moe.router, BATCHES[0].clone().requires_grad_()
    routing = tr.Routing(*checkpoint(a, x, use_reentrant=reentrant))
    (routing.weights.square().sum() + routing.aux_loss).backward()
    expected = b(x)
    (expected.weights.square().sum() + expected.aux_loss).backward()
    assert_close(a.weight.grad, b.weight.grad)


# ---- context from the root -----------------------------------------------------------------------


class Root(nn.Module):
    """Called as models of Transformers are; its layer may flatten the tokens."""

    def __init__(self, flatten=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 8)
        self.moe = tr.MoE(tr.HashRouter(32, 4, 2), tr.SwiGLUExperts(4, 8, 6))
        self.flatten = flatten

    def forward(self, input_ids=None, *, attention_mask=None):
        x = self.embed(input_ids)
        return self.moe(x.flatten(0, 1)).view_as(x) if self.flatten else self.moe(x)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("compile", [False, True])
def test_routers_follow_the_inputs_of_the_root(flatten, compile):
    root, ids = Root(flatten), torch.arange(12).view(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    handle = tr.follow_inputs(root)
    forward = torch.compile(root, fullgraph=True, backend="aot_eager") if compile else root
    with tr.collect(root) as routings:
        forward(ids, attention_mask=mask)
        forward(input_ids=ids)
        forward(ids, attention_mask=torch.cat([mask, mask], 1)[:, 2:])  # of a cache and 6 tokens
    assert [int(routing.counts.sum()) for routing in routings] == [20, 24, 20]
    assert torch.equal(routings[1].indices.view(12, 2), root.moe.router.table[:12])
    if not compile:
        handle.remove()
        tr.collect(root)


class PositionalRoot(Root):
    def forward(self, input_ids, attention_mask):
        return self.moe(self.embed(input_ids))


def test_inputs_may_come_by_position_and_are_followed_in_a_copy():
    root, ids = PositionalRoot(), torch.arange(12).view(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    tr.follow_inputs(root)
    root(ids, mask)
    for model in root, copy.deepcopy(root), pickle.loads(pickle.dumps(root)):
        with tr.collect(model) as routings:
            model(ids + 12, 1 - mask)
        assert int(routings[0].counts.sum()) == 4


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_tasks_reach_the_losses_and_not_the_model(flatten, compile, per_token):
    root, ids = Root(flatten), torch.arange(12).view(2, 6)
    loss = tr.losses.MutualInformationLoss(1.0, num_tasks=3)
    root.moe = tr.MoE(tr.TopKRouter(8, 4, 2, losses=[loss]), tr.SwiGLUExperts(4, 8, 6))
    tr.follow_inputs(root)
    tasks = torch.tensor([2, 0])
    of_tokens = tasks[:, None].expand(2, 6).contiguous()
    forward = torch.compile(root, fullgraph=True, backend="aot_eager") if compile else root
    with tr.collect(root) as routings:
        forward(ids, routing_task_ids=of_tokens if per_token else tasks)
    x = root.embed(ids)
    expected = root.moe.router(x, task_ids=of_tokens).losses["mutual_information"]
    assert_close(routings[0].losses["mutual_information"], expected)
    assert expected != 0


def test_nothing_is_followed_after_removal():
    root, ids = Root(), torch.arange(4).view(1, 4)
    root.moe = tr.MoE(tr.TopKRouter(8, 4, 2), tr.SwiGLUExperts(4, 8, 6))
    x, mask = root.embed(ids), torch.tensor([[0, 1, 1, 1]])
    handle = tr.follow_inputs(root)
    root(ids, attention_mask=mask)
    assert root.moe.router(x).counts.sum() == 6
    handle.remove()
    assert root.moe.router(x).counts.sum() == 8  # not by the mask of the last call
    root(ids, attention_mask=mask)
    assert root.moe.router(x).counts.sum() == 8


@pytest.mark.parametrize("copied", [False, True])
def test_following_twice_is_following_once(copied):
    root, ids = Root(), torch.arange(4).view(1, 4)
    loss = tr.losses.MutualInformationLoss(1.0, num_tasks=3)
    root.moe = tr.MoE(tr.TopKRouter(8, 4, 2, losses=[loss]), tr.SwiGLUExperts(4, 8, 6))
    tr.follow_inputs(root)
    root = copy.deepcopy(root) if copied else root
    router = root.later = tr.TopKRouter(8, 4, 2)
    again = tr.follow_inputs(root)
    with tr.collect(root):
        root(ids, routing_task_ids=torch.tensor([2]), attention_mask=torch.tensor([[0, 1, 1, 1]]))
    assert router(root.embed(ids)).counts.sum() == 6
    again.remove()
    assert router(root.embed(ids)).counts.sum() == 8
    assert not root._forward_pre_hooks


def test_what_a_caller_passes_comes_first():
    root, ids = Root(), torch.arange(4).view(1, 4)
    tr.follow_inputs(root)
    root(ids)
    routing = root.moe.router(root.embed(ids), token_ids=ids + 7)
    assert torch.equal(routing.indices[0], root.moe.router.table[7:11])


def test_following_inputs_of_a_compiled_model_raises():
    with pytest.raises(RuntimeError, match="follow_inputs: expected a model that is not compiled"):
        tr.follow_inputs(torch.compile(Root()))
