"""Several ranks decide, count and learn as one process does that sees all their tokens."""

import copy
import os
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import torch_routers as tr
from ranks import Ranks

H = 8


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as ranks:
        yield ranks


# ---- the fixture itself --------------------------------------------------------------------------


def fail_on_one_rank():
    assert dist.get_rank() == 0, "rank 1 failed on purpose"


def sleep_on_one_rank(file):
    if dist.get_rank() == 1:
        with open(file, "w") as f:
            f.write(str(os.getpid()))
        time.sleep(1000)


def test_a_rank_that_fails_fails_the_test(ranks):
    begin = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1 failed on purpose"):
        ranks(fail_on_one_rank, 2)
    assert time.monotonic() - begin < 50  # no wait for the timeout of rank 0, which goes on


def test_a_rank_that_hangs_is_killed(ranks, tmp_path):
    begin = time.monotonic()
    with pytest.raises(AssertionError, match=r"Timeout[^$]*in sleep_on_one_rank"):
        ranks(sleep_on_one_rank, 2, timeout=4, file=str(tmp_path / "pid"))
    assert time.monotonic() - begin < 50
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# ---- training ------------------------------------------------------------------------------------


#: Counts of this rank alone, and counts of all ranks.
LOSSES = {"local": tr.losses.LoadBalanceLoss, "global": tr.losses.GlobalBalanceLoss}


class Block(nn.Module):
    def __init__(self, num_experts, balance):
        super().__init__()
        losses = [balance(0.1), tr.losses.ZLoss(0.1)]
        router = tr.TopKRouter(
            H, num_experts, 2, score="sigmoid", selection_bias=True, losses=losses
        )
        nn.init.normal_(router.weight, std=0.5)
        self.norm, self.moe = nn.LayerNorm(H), tr.MoE(router, tr.SwiGLUExperts(num_experts, H, 6))

    def forward(self, x, valid_mask=None):
        return x + self.moe(self.norm(x), valid_mask=valid_mask)


class Model(nn.Module):
    def __init__(self, num_experts, balance=tr.losses.LoadBalanceLoss):
        torch.manual_seed(0)
        super().__init__()
        self.embed = nn.Linear(H, H)
        self.blocks = nn.ModuleList(Block(num_experts, balance) for _ in range(2))
        self.double()

    def forward(self, x, valid_mask=None):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, valid_mask)
        return x

    def routers(self):
        return [block.moe.router for block in self.blocks]


def ddp(model):
    return DistributedDataParallel(model)


def fsdp2(model, **options):
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def batch(step, tokens):
    return torch.randn(tokens, H, dtype=torch.float64, generator=torch.manual_seed(step))


def optimizer_of(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for module in model.modules():
        if isinstance(module, tr.losses.GlobalBalanceLoss):
            optimizer.register_step_post_hook(lambda *_, loss=module: loss.reset())
    return optimizer


RATE = 0.05


def single_step(model, optimizer, parts):
    """One process: the mean over all tokens, with the losses of each part by themselves."""
    total, kept = sum(map(len, parts)), []
    for x in parts:
        with tr.collect(model) as routings:
            y = model(x)
        mean = y.square().sum() / max(1, len(x))
        ((mean + routings.aux_loss()) * (len(x) / total)).backward()
        kept.append(routings)
    optimizer.step()
    with torch.no_grad():
        for router, routings in zip(model.routers(), zip(*kept)):
            counts = sum(routing.counts for routing in routings)
            router.expert_bias += RATE * (counts.double().mean() - counts).sign().float()
    return [torch.cat([r.indices for r in routings]) for routings in zip(*kept)]


def train(wrap, tokens, delivery, balance, padded=False):
    """Three steps on the ranks, and the same in one process: it must be the same training."""
    rank, world_size, total = dist.get_rank(), dist.get_world_size(), sum(tokens)
    num_experts = 4 if world_size == 2 else 3  # fewer than ranks: some have no row of the weight
    single = Model(num_experts)
    model = Model(num_experts, LOSSES[balance])
    forward = globals()[wrap](model)
    attached = tr.attach(forward) if delivery == "attached" else None
    controller = tr.BalanceController(forward, RATE)
    optimizer, single_optimizer = optimizer_of(forward), optimizer_of(single)
    begin = sum(tokens[:rank])
    for step in range(3):
        x = batch(step, total)
        single_optimizer.zero_grad()
        parts = x.split(tokens) if balance == "local" else [x]
        expected = single_step(single, single_optimizer, parts)

        x, valid_mask = x[begin : begin + tokens[rank]], None
        if padded:
            valid_mask = torch.arange(max(tokens)) < len(x)
            x = torch.cat([x, torch.full((max(tokens) - len(x), H), 1e3)])
        optimizer.zero_grad()
        with tr.collect(forward) as routings:
            y = forward(x, valid_mask)
        y = y if valid_mask is None else y[valid_mask]
        loss, weight = y.square().sum() / max(1, len(y)), len(y) * world_size / total
        loss = attached(loss) if attached else loss + routings.aux_loss()
        (loss * weight).backward()
        optimizer.step()
        controller.step()

        for routing, router, other, indices in zip(
            routings, model.routers(), single.routers(), expected
        ):
            here = routing.indices if valid_mask is None else routing.indices[valid_mask]
            assert here.equal(indices[begin : begin + len(y)])
            assert routing.counts.equal(here.flatten().bincount(minlength=num_experts))
            assert router.expert_bias.equal(other.expert_bias)
            assert step > 0 or router.expert_bias.any()
        for (name, p), q in zip(model.named_parameters(), single.parameters()):
            error = (whole(p.grad) - q.grad).norm() / q.grad.norm()
            assert error <= 1e-12, (step, name, error)


EQUAL, UNEVEN, EMPTY = [6, 6], [9, 4], [11, 0]
OF_FOUR = [[3, 3, 3, 3], [5, 0, 4, 3]]
WRAPS = pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])


@pytest.mark.parametrize("balance", LOSSES)
@pytest.mark.parametrize("delivery", ["collected", "attached"])
@pytest.mark.parametrize("tokens", [EQUAL, UNEVEN, EMPTY, *OF_FOUR], ids=str)
@WRAPS
def test_ranks_train_as_one_process(ranks, wrap, tokens, delivery, balance):
    ranks(train, len(tokens), wrap=wrap, tokens=tokens, delivery=delivery, balance=balance)


@pytest.mark.parametrize("tokens", [UNEVEN, EMPTY], ids=str)
@WRAPS
def test_padded_ranks_train_as_one_process(ranks, wrap, tokens):
    options = {"delivery": "attached", "balance": "global", "padded": True}
    ranks(train, 2, wrap=wrap, tokens=tokens, **options)


def train_modules_as_experts():
    rank, x = dist.get_rank(), batch(0, 5)
    torch.manual_seed(0)
    experts = [nn.Linear(H, H) for _ in range(4)]
    moe = tr.MoE(tr.TopKRouter(H, 4, 2, renormalize=False), experts).double()
    expected = torch.autograd.grad(moe(x).sum(), list(moe.parameters()), materialize_grads=True)
    forward = ddp(moe)
    for _ in range(2):  # the second forward complains of gradients that the first backward lacked
        moe.zero_grad()
        (forward(x if rank == 0 else x[:0]).sum() * 2).backward()
    for p, gradient in zip(moe.parameters(), expected):
        torch.testing.assert_close(p.grad, gradient)


def test_modules_as_experts_have_gradients_on_a_rank_without_tokens(ranks):
    ranks(train_modules_as_experts, 2)


def balance_in_pairs():
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    router = Model(4).routers()[0]
    controller = tr.BalanceController(router, RATE, group=pairs[rank // 2])
    counts = []
    for r in range(4):
        counts.append(router(batch(r, 7)).counts)
        if r == rank:
            router(batch(r, 7)).weights.sum().backward()
    controller.step()
    first = rank // 2 * 2
    counts = counts[first] + counts[first + 1]
    expected = RATE * (counts.double().mean() - counts).sign().float()
    assert expected.any() and router.expert_bias.equal(expected)


def test_counts_are_added_up_over_the_group(ranks):
    ranks(balance_in_pairs, 4)


# ---- the dtype of a router in FSDP2 --------------------------------------------------------------


def route_in_bfloat16(separate):
    model = Model(4).float()
    controller = tr.BalanceController(model)
    for router in model.routers():
        router.expert_bias += 1 + 1e-3  # not a bfloat16
        if separate:
            fully_shard(router)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fsdp2(model, mp_policy=policy)
    seen = []
    for router in model.routers():
        router.register_forward_hook(lambda module, args, routing: seen.append((*args, routing)))
    attached = tr.attach(model)
    attached(model(batch(dist.get_rank(), 6).float()).float().square().mean()).backward()
    for router, (x, routing) in zip(model.routers(), seen):
        weight = whole(router.weight.detach())
        assert x.dtype == torch.bfloat16 and weight.dtype == torch.float32
        assert not weight.equal(weight.bfloat16().float())
        if not separate:
            weight = weight.bfloat16().float()
        assert routing.logits.equal(nn.functional.linear(x.float(), weight))
        assert whole(router.weight.grad).abs().sum() > 0
        assert router.expert_bias.equal(torch.full((4,), 1 + 1e-3))
    controller.step()
    for router in model.routers():
        assert {round(b, 4) for b in router.expert_bias.tolist()} <= {1.0, 1.001, 1.002}
        assert router.expert_bias.unique().numel() > 1


@pytest.mark.parametrize("separate", [True, False])
def test_a_router_sharded_by_itself_keeps_float32(ranks, separate):
    ranks(route_in_bfloat16, 2, separate=separate)


# ---- checkpoints ---------------------------------------------------------------------------------


def plain(model):
    return model


def decisions(forward):
    """What the trained routers decide about tokens that they have not seen."""
    with torch.no_grad(), tr.collect(forward.eval()) as routings:
        y = forward(batch(100, 32))
    return [y, *(x for r in routings for x in (r.indices, r.weights, r.logits, r.counts))]


def save(wrap, folder):
    model = Model(4)
    forward = globals()[wrap](model)
    attached, controller = tr.attach(forward), tr.BalanceController(forward, RATE)
    optimizer = optimizer_of(forward)
    for step in range(3):
        optimizer.zero_grad()
        attached(forward(batch(dist.get_rank() + 2 * step, 6)).square().mean()).backward()
        optimizer.step()
        controller.step()
    expected = decisions(forward)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(forward, options=options)
    dcp.save(get_model_state_dict(forward), checkpoint_id=f"{folder}/sharded")
    if dist.get_rank() == 0:
        assert state.keys() == Model(4).state_dict().keys()
        torch.save(state, f"{folder}/full.pt")
        torch.save(expected, f"{folder}/expected.pt")


def load(wrap, folder, form):
    model = Model(4)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().fill_(torch.nan)
    forward = globals()[wrap](model)
    if form == "full":
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(forward, torch.load(f"{folder}/full.pt"), options=options)
    else:
        state = get_model_state_dict(forward)
        dcp.load(state, checkpoint_id=f"{folder}/sharded")
        set_model_state_dict(forward, state)
    assert all(
        r.expert_bias.dtype == torch.float32 and r.expert_bias.any() for r in model.routers()
    )
    for actual, expected in zip(decisions(forward), torch.load(f"{folder}/expected.pt")):
        assert actual.equal(expected)


@WRAPS
def test_a_checkpoint_of_two_ranks_routes_alike_on_others(ranks, tmp_path, wrap):
    ranks(save, 2, wrap=wrap, folder=str(tmp_path))
    for form in "full", "sharded":
        for other, world_size in ("plain", 1), ("ddp", 2), ("fsdp2", 1), ("fsdp2", 4):
            ranks(load, world_size, wrap=other, folder=str(tmp_path), form=form)


# ---- copies of a router --------------------------------------------------------------------------


def diverge(wrap, name):
    """By one bit, on one rank, in one tensor and then in a later one."""
    rank = dist.get_rank()
    model = Model(4)
    forward = globals()[wrap](model)
    tr.assert_replicated(forward)
    router, tensor = name.rsplit(".", 1)
    for module in dict.fromkeys([router, "blocks.1.moe.router"]):
        value = getattr(model.get_submodule(module), tensor)
        with torch.no_grad():
            bits = value.view(torch.int64 if value.dtype == torch.float64 else torch.int32)
            bits[(-1,) * bits.dim()] ^= rank
        with pytest.raises(ValueError, match=f"got different {tensor!r} of {router!r}"):
            tr.assert_replicated(forward)
    alone = [dist.new_group([r]) for r in range(dist.get_world_size())]
    tr.assert_replicated(forward, alone[rank])


@pytest.mark.parametrize("name", ["blocks.0.moe.router.weight", "blocks.1.moe.router.expert_bias"])
def test_ranks_whose_routers_differ_are_told_where(ranks, name):
    ranks(diverge, 2, wrap="plain", name=name)
    if name.endswith("expert_bias"):
        ranks(diverge, 4, wrap="fsdp2", name=name)  # its weights are sharded


def differ_in_shape():
    router = tr.TopKRouter(H, 4 + dist.get_rank(), 2)
    with pytest.raises(ValueError, match="expected routers with the same tensors on all ranks"):
        tr.assert_replicated(router)
    permuted = tr.TopKRouter(4, 4, 2)
    nn.init.eye_(permuted.weight)
    if dist.get_rank() == 1:
        permuted.weight.data = permuted.weight.data.flip(0)
    with pytest.raises(ValueError, match="got different 'weight' of ''"):
        tr.assert_replicated(permuted)


def test_ranks_with_other_routers_or_rows_in_another_order_are_told(ranks):
    ranks(differ_in_shape, 2)


# ---- the balance loss of the global batch --------------------------------------------------------


def balance_gradient(x, loss, call=lambda router: router):
    torch.manual_seed(1)
    router = tr.TopKRouter(6, 4, 2, losses=[loss]).double()
    call(router)(x).aux_loss.backward()
    return router.weight.grad


def global_balance_on_a_rank():
    rank, tokens = dist.get_rank(), torch.Generator().manual_seed(0)
    all_tokens = torch.randn(12, 6, generator=tokens, dtype=torch.float64)
    mine = all_tokens[:3] if rank == 0 else all_tokens[3:]
    compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
    expected = balance_gradient(all_tokens, tr.losses.LoadBalanceLoss(1.0))
    for call in compiled, lambda router: router:
        actual = balance_gradient(mine, tr.losses.GlobalBalanceLoss(1.0), call)
        actual *= len(mine) * 2 / len(all_tokens)
        dist.all_reduce(actual)
        assert_close(actual / 2, expected)

    groups = [dist.new_group([0]), dist.new_group([1])]
    alone = tr.losses.GlobalBalanceLoss(1.0)
    alone.group = groups[rank]
    expected = balance_gradient(mine, tr.losses.LoadBalanceLoss(1.0))
    assert_close(balance_gradient(mine, alone), expected)
    assert copy.deepcopy(alone).group is groups[rank]
    assert tr.from_config(alone.config()).group is None


def reduced_on_ranks(scope, reduction, tokens):
    """In pairs of ranks, with two micro-batches and padding."""
    rank, pairs = dist.get_rank(), len(tokens) // 2
    groups = [dist.new_group([2 * p, 2 * p + 1]) for p in range(pairs)]
    pair, begin = rank // 2, sum(tokens[:rank])
    batches = [batch(step, sum(tokens)) for step in range(2)]
    torch.manual_seed(1)
    loss = tr.losses.GlobalBalanceLoss(0.7, scope=scope, grad_reduction=reduction)
    loss.group = groups[pair]
    router = tr.TopKRouter(H, 4, 2, losses=[loss]).double()
    both = slice(sum(tokens[: 2 * pair]), sum(tokens[: 2 * pair + 2]))
    single = tr.TopKRouter(H, 4, 2, losses=[tr.losses.GlobalBalanceLoss(0.7)]).double()
    single.losses[0].group = dist.new_group([rank], use_local_synchronization=True)
    single.load_state_dict(router.state_dict())
    for x in batches:
        expected = single(x[both]).aux_loss
        mine = torch.cat([x[begin : begin + tokens[rank]], torch.full((3, H), torch.nan)])
        routing = router(mine, valid_mask=torch.arange(len(mine)) < tokens[rank])
        value = routing.aux_loss.detach().clone()
        gradient = torch.autograd.grad(routing.aux_loss, router.weight)[0]
        for reduced in value, gradient:
            dist.all_reduce(reduced, group=groups[pair])
            reduced /= 2 if reduction == "mean" else 1
        assert_close(value, expected.detach(), rtol=1e-12, atol=0)
        expected = torch.autograd.grad(expected, single.weight)[0]
        assert (gradient - expected).norm() <= 1e-12 * expected.norm()
        if scope == "group":
            single.losses[0].reset()


@pytest.mark.parametrize("tokens", [EQUAL, UNEVEN, EMPTY, [5, 2, 0, 6]], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scope", ["group", "global_batch"])
def test_reduced_gradients_of_balance_are_those_of_one_process(ranks, scope, reduction, tokens):
    ranks(reduced_on_ranks, len(tokens), scope=scope, reduction=reduction, tokens=tokens)


def weigh_the_task_alone(wrap, delivery):
    """The loss of the router brings its own factor, that of the task has it from here."""
    rank, tokens = dist.get_rank(), UNEVEN
    x = batch(0, sum(tokens))
    single, model = Model(4), Model(4)
    for router in single.routers():
        router.losses = nn.ModuleList([tr.losses.LoadBalanceLoss(0.1)])
    for router in model.routers():
        loss = tr.losses.GlobalBalanceLoss(0.1, grad_reduction="mean")
        router.losses = nn.ModuleList([loss])
    with tr.collect(single) as routings:
        y = single(x)
    (y.square().mean() + routings.aux_loss()).backward()
    forward = globals()[wrap](model)
    attached = tr.attach(forward) if delivery == "attached" else None
    with tr.collect(forward) as routings:
        y = forward(x.split(tokens)[rank])
    loss = y.square().mean() * (2 * len(y) / len(x))
    loss = attached(loss) if attached else loss + routings.aux_loss()
    loss.backward()
    for p, q in zip(model.parameters(), single.parameters()):
        assert (whole(p.grad) - q.grad).norm() <= 1e-12 * q.grad.norm()


@pytest.mark.parametrize("delivery", ["collected", "attached"])
@WRAPS
def test_a_loss_with_its_own_factor_leaves_the_task_its(ranks, wrap, delivery):
    ranks(weigh_the_task_alone, 2, wrap=wrap, delivery=delivery)


def test_global_balance_of_two_ranks_with_different_numbers_of_tokens(ranks):
    """Gradients that are averaged over the ranks are those of one rank with all tokens."""
    ranks(global_balance_on_a_rank, 2)


# ---- tasks that are spread over ranks ------------------------------------------------------------


def information_on_ranks(reduction, tokens):
    """Each rank has other tasks, and padding."""
    rank, x = dist.get_rank(), batch(0, sum(tokens))
    task_ids = torch.arange(len(x)) * 3 // len(x)
    torch.manual_seed(1)
    options = {"scope": "group", "grad_reduction": reduction}
    single, router, compiled = (
        tr.TopKRouter(H, 4, 2, losses=[tr.losses.MutualInformationLoss(0.7, 3, **o)]).double()
        for o in ({}, options, options)
    )
    for other in router, compiled:
        other.load_state_dict(single.state_dict())
    together = single(x, task_ids=task_ids).aux_loss
    expected = torch.autograd.grad(together, single.weight)[0]
    mine = torch.cat([x.split(tokens)[rank], torch.full((3, H), torch.nan)])
    context = {
        "valid_mask": torch.arange(len(mine)) < tokens[rank],
        "task_ids": torch.cat([task_ids.split(tokens)[rank], torch.tensor([0, 1, 2])]),
    }
    for call in router, torch.compile(compiled, fullgraph=True, backend="aot_eager"):
        value = call(mine, **context).aux_loss
        assert_close(value, together, rtol=1e-12, atol=0)
        share = tokens[rank] * len(tokens) / len(x) if reduction is None else 1
        gradient = torch.autograd.grad(share * value, call.weight)[0]
        dist.all_reduce(gradient)
        gradient /= 1 if reduction == "sum" else len(tokens)
        assert (gradient - expected).norm() <= 1e-12 * expected.norm()

    alone = tr.losses.MutualInformationLoss(0.7, 3, **options)
    groups = [dist.new_group([r]) for r in range(len(tokens))]
    alone.group = groups[rank]
    assert copy.deepcopy(alone).group is groups[rank]
    router.losses = nn.ModuleList([alone])
    here = single(mine, **context)
    assert_close(router(mine, **context).aux_loss, here.aux_loss)


@pytest.mark.parametrize("tokens", [UNEVEN, EMPTY], ids=str)
@pytest.mark.parametrize("reduction", [None, "mean", "sum"])
def test_information_of_ranks_is_that_of_one_process(ranks, reduction, tokens):
    ranks(information_on_ranks, len(tokens), reduction=reduction, tokens=tokens)


# ---- metrics -------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Two routers that differ in their number of experts, the second without logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.learned, self.hashed = tr.TopKRouter(H, 4, 2), tr.HashRouter(32, 6)
        self.idle = tr.TopKRouter(H, 3, 1)

    def forward(self, x):
        self.hashed(x, token_ids=(x[:, 0] * 100).long() % 32)
        self.learned(x)


def meter_all_ranks():
    model = Layers()
    meter, whole = tr.metrics.RoutingMeter(model), tr.metrics.RoutingMeter(model)
    for rank in range(2):  # the third sees nothing
        with whole.observe():
            model(batch(rank, 5 + rank).float())
        if rank == dist.get_rank():
            with meter.observe():
                model(batch(rank, 5 + rank).float())
    meter.all_reduce()
    assert list(meter.totals) == ["learned", "hashed"]
    assert_close(meter.compute(), whole.compute())
    assert meter.totals["hashed"].lse is None
    assert torch.equal(meter.totals["learned"].counts, whole.totals["learned"].counts)


def test_a_meter_of_all_ranks_is_that_of_all_their_tokens(ranks):
    ranks(meter_all_ranks, 3)
