"""Mixtures of LoRAs in a model: what they do to it, and what they leave alone."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import torch_routers as tr
from cases.op_case import seeded
from tiny_lm import HIDDEN, batch, loss_of, tiny_lm

SCOPES = ("module", "block", "layer", "model")
INPUTS = ("token", "sequence", "task", "first_pass")
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def config(**options):
    options = {
        "r": 4,
        "lora_alpha": 8,
        "num_experts": 3,
        "target_modules": TARGETS,
        "router": "TopKRouter",
        "router_arguments": {"top_k": 2},
        "losses": [tr.losses.LoadBalanceLoss(1e-2)],
        **options,
    }
    return tr.lora.RoutedLoraConfig(**options)


def injected(dtype=torch.float32, busy=True, checkpoints=None, **options):
    """A model with experts; busy ones do something, idle ones are as they come."""
    model = tiny_lm(dtype)
    model.checkpoints = checkpoints
    if busy:
        options["init_lora_weights"] = False
    torch.manual_seed(2)
    tr.lora.inject(model, config(**options))
    if options.get("router_input") == "first_pass":
        tr.lora.two_passes(model)
    tr.follow_inputs(model)
    for module in model.modules():
        if isinstance(module, tr.Router):
            module.weight.data.mul_(30)
    return model.to(dtype) if dtype == torch.float64 else model


def call(model, ids, mask, **context):
    """Logits, and the losses of the routers."""
    with tr.collect(model) as routings:
        logits = model(ids, attention_mask=mask, **context)
    return logits, routings


def train(model, ids, mask, **context):
    logits, routings = call(model, ids, mask, **context)
    loss = loss_of(logits, ids, mask)
    (loss + routings.aux_loss()).backward()
    return loss


@torch.no_grad()
def test_a_layer_in_evaluation_says_that_it_is_for_inference():
    """In training it may be a checkpoint, which computes the same again."""
    model = nn.Sequential(nn.Linear(64, 48))
    options = {"init_lora_weights": False, "losses": []}
    tr.lora.inject(model, config(target_modules=["0"], r=16, **options))
    layer, x = model[0], seeded(20, 64).float()
    routing = layer.scope("default").router(x)
    factors = zip(*(layer.factors("default", expert) for expert in layer.experts("default")))
    a, b = map(list, factors)
    scaling = list(layer.scaling["default"].values())

    def expected(inference):
        added = tr.ops.lora_mix(
            x, a, b, routing.weights, routing.indices, scaling=scaling, inference=inference
        )
        return layer.base_layer(x) + added

    assert not torch.equal(expected(True), expected(False))  # or this test says nothing
    for training in True, False:
        assert torch.equal(model.train(training)(x), expected(not training))


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model):
    return {name: p.grad for name, p in trained(model).items()}


TASKS = {"routing_task_ids": torch.tensor([1, 0, 2])}
OF_TASKS = {"num_tasks": 3, "task_embedding_size": 5}


def context_of(router_input):
    return TASKS if router_input == "task" else {}


def options_of(router_input):
    return {"router_input": router_input} | (OF_TASKS if router_input == "task" else {})


# ---- what is not changed -------------------------------------------------------------------------


@pytest.mark.parametrize("router_input", INPUTS)
@pytest.mark.parametrize("scope", SCOPES)
def test_at_first_nothing_changes(scope, router_input):
    ids, mask = batch()
    expected = tiny_lm()(ids, mask)
    model = injected(busy=False, router_scope=scope, **options_of(router_input))
    logits, _ = call(model, ids, mask, **context_of(router_input))
    assert torch.equal(logits, expected)


def test_disabled_is_the_base_model_to_the_bit():
    ids, mask = batch()
    expected, model = tiny_lm()(ids, mask), injected().eval()
    assert not torch.allclose(model(ids, mask), expected)
    with tr.lora.disable(model):
        assert torch.equal(model(ids, mask), expected)
    assert not torch.allclose(model(ids, mask), expected)
    assert torch.equal(tr.lora.unload(model)(ids, mask), expected)
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in tiny_lm().named_parameters()]


def test_only_experts_and_routers_are_trained():
    model = injected()
    assert all("routed_" in name for name in trained(model))
    assert not any("lora_" in name for name in trained(model))
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, *batch())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_an_error_leaves_the_model_as_it_was():
    model = tiny_lm()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="TopKRouter: expected top_k in"):
        tr.lora.inject(model, config(router_arguments={"top_k": 9}))
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_experts_and_routers_get_the_mode_of_their_layer(training):
    model = tiny_lm().train(training)
    tr.lora.inject(model, config())
    assert all(module.training == training for module in model.modules())


def test_modules_to_save_are_trained_too():
    model = injected(modules_to_save=["lm_head"])
    assert "lm_head.weight" in trained(model)


# ---- what is computed ----------------------------------------------------------------------------


def loop(layer, mix, x, routing):
    """What the experts of a layer add, token by token and expert by expert."""
    experts = layer.experts(mix)
    rows = x.reshape(-1, x.shape[-1])
    weights = routing.weights.reshape(len(rows), -1)
    slots = (
        [[*range(len(experts))]] * len(rows)
        if routing.indices is None
        else routing.indices.reshape(len(rows), -1).tolist()
    )
    result = []
    for t, row in enumerate(rows):
        added = row.new_zeros(layer.out_features)
        for slot, e in enumerate(slots[t]):
            if e >= 0:
                a, b = (f[mix][experts[e]].weight for f in (layer.routed_A, layer.routed_B))
                factor = layer.scaling[mix][experts[e]] * weights[t, slot]
                added = added + factor * (b @ (a @ row))
        result.append(added)
    return torch.stack(result).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("router", ["TopKRouter", "SoftRouter", "EntropyRouter"])
@pytest.mark.parametrize("scope", SCOPES)
def test_every_layer_adds_what_a_loop_over_experts_adds(scope, router):
    arguments = {"top_k": 2} if router == "TopKRouter" else {}
    model = injected(
        torch.float64, router=router, router_arguments=arguments, router_scope=scope, losses=[]
    )
    seen = {}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, tr.lora.RoutedLoraLinear)
    }

    def note(name):
        return lambda module, args, y: seen.update({name: (args[0], y)})

    for name, layer in layers.items():
        layer.register_forward_hook(note(name))
    _, routings = call(model, *batch())
    assert len(layers) == 10 and len(seen) == 10
    assert len(routings) == {"module": 10, "block": 4, "layer": 2, "model": 1}[scope]
    by_router = dict(zip(routings.names, routings))
    owner = None
    for name, layer in layers.items():
        owner = f"{name}.routed_gate.default" if layer.routed_gate else owner
        x, y = seen[name]
        assert_close(y - layer.base_layer(x), loop(layer, "default", x, by_router[owner]))


def test_a_block_is_routed_by_what_it_gets():
    model = injected(router_scope="block", losses=[])
    seen = {}
    attention = model.layers[0].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    ids, mask = batch()
    _, routings = call(model, ids, mask)
    routing = dict(zip(routings.names, routings))["layers.0.self_attn.q_proj.routed_gate.default"]
    alone = attention.q_proj.routed_gate["default"](seen["hidden_states"], valid_mask=mask.bool())
    assert torch.equal(routing.weights, alone.weights)


def test_sequences_are_routed_by_the_mean_of_their_real_tokens():
    ids, mask = batch()
    model = injected(router_input="sequence", router_scope="layer", losses=[])
    _, routings = call(model, ids, mask)
    x = model.embed_tokens(ids)
    for sample in range(3):
        mean = x[sample][mask[sample].bool()].mean(0)
        expected = routings_alone(model, mean)
        assert_close(routings[0].weights[sample], expected.weights)
        assert torch.equal(routings[0].indices[sample], expected.indices)


def routings_alone(model, x):
    router = next(m for m in model.modules() if isinstance(m, tr.Router))
    inputs, router._inputs = router._inputs, None
    try:
        return router(x)
    finally:
        router._inputs = inputs


def test_tasks_are_routed_alike():
    ids, mask = batch()
    ids[1] = ids[0]
    mask[:] = 1
    model = injected(router_scope="model", **options_of("task"))
    same, _ = call(model, ids, mask, routing_task_ids=torch.tensor([2, 2, 0]))
    other, _ = call(model, ids, mask, routing_task_ids=torch.tensor([2, 1, 0]))
    assert torch.equal(same[0], same[1])
    assert not torch.allclose(other[0], other[1])
    with pytest.raises(ValueError, match=r"lora: expected task_ids of shape .* routing_task_ids"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"expected task_ids in \[0, num_tasks=3\), got 0 to 3"):
        model(ids, attention_mask=mask, routing_task_ids=torch.tensor([2, 3, 0]))


def test_a_first_pass_shows_routers_what_the_base_model_computes():
    ids, mask = batch()
    seen = []
    base = tiny_lm()
    base.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    base(ids, mask)
    model = injected(router_input="first_pass", router_scope="layer", losses=[])
    _, routings = call(model, ids, mask)
    router = model.layers[1].self_attn.q_proj.routed_gate["default"]
    assert len(routings) == 2
    assert torch.equal(routings[1].logits, router(seen[0], valid_mask=mask.bool()).logits)
    handle = tr.lora.two_passes(model)
    handle.remove()


def test_hard_labels_train_their_expert_alone():
    arguments = {"mode": "hard"}
    model = injected(router="SoftRouter", router_arguments=arguments, losses=[])
    ids, mask = batch()
    logits = model(ids, attention_mask=mask, routing_task_ids=torch.tensor([1, 1, 1]))
    loss_of(logits, ids, mask).backward()
    for name, grad in gradients(model).items():
        assert grad is not None and bool(grad.any()) == (".default.1.weight" in name), name


def test_straight_through_reaches_the_logits_of_all_experts():
    def slopes(mode):
        arguments = {"mode": mode, "top_k": 1, "renormalize": False}
        model = injected(torch.float64, router="SoftRouter", router_arguments=arguments, losses=[])
        loss_of(model(*batch()), *batch()).backward()
        return {name: grad for name, grad in gradients(model).items() if "gate" in name}

    straight, chosen = slopes("st_topk"), slopes("soft_topk")
    assert all(grad.any(1).all() for grad in straight.values())
    assert not all(torch.allclose(straight[name], chosen[name]) for name in straight)


def test_one_expert_is_lora():
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "down_proj"]
    reference = peft.get_peft_model(
        tiny_lm(),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False),
    )
    model = injected(
        num_experts=1, target_modules=targets, router="SoftRouter", router_arguments={}, losses=[]
    )
    theirs = dict(reference.named_parameters())
    for name, parameter in trained(model).items():
        for ours, name_there in ("routed_A", "lora_A"), ("routed_B", "lora_B"):
            if ours in name:
                there = name.replace(f"{ours}.default.0", f"{name_there}.default")
                parameter.data.copy_(theirs[f"base_model.model.{there}"])
    ids, mask = batch()
    real = mask.bool()  # padding has no experts here
    assert_close(model(ids, mask)[real], reference(ids, mask)[real], atol=1e-6, rtol=1e-6)


class Quantized(nn.Module):
    """Its weight is no parameter, and has no floating numbers."""

    in_features, out_features = 4, 5

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randint(-8, 8, (5, 4), dtype=torch.int8))

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) / 8).T


def test_a_base_layer_is_called_and_not_looked_into():
    model = nn.Sequential(Quantized())
    x = seeded(3, 4).float().requires_grad_()
    expected = model(x)
    tr.lora.inject(model, config(target_modules=["0"], losses=[]))
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert all(grad is not None for grad in gradients(model).values())


def test_forcing_an_expert_asks_no_router():
    model = injected().eval()
    ids, mask = batch()
    with tr.lora.force(model, "1"), tr.collect(model) as routings:
        forced = model(ids, mask)
    assert len(routings) == 0
    for layer in model.modules():
        if isinstance(layer, tr.lora.RoutedLoraLinear):
            for expert in "0", "2":
                layer.routed_A["default"][expert].weight.data.fill_(3e38)
    with tr.lora.force(model, "1"):
        assert torch.equal(model(ids, mask), forced)
    with pytest.raises(ValueError, match=r"force: expected an expert among \['0', '1', '2'\], got"):
        tr.lora.force(model, "sql")


# ---- masks, modes, gradients ---------------------------------------------------------------------


@pytest.mark.parametrize("router_input", INPUTS)
@pytest.mark.parametrize("scope", SCOPES)
def test_the_content_of_padding_changes_nothing(scope, router_input):
    model = injected(router_scope=scope, **options_of(router_input))
    ids, mask = batch()
    others = torch.where(mask.bool(), ids, (ids + 7) % 20)
    results = []
    for tokens in ids, others:
        model.zero_grad()
        loss = train(model, tokens, mask, **context_of(router_input))
        results.append((loss.detach(), gradients(model)))
    (loss, slopes), (other_loss, other_slopes) = results
    assert torch.equal(loss, other_loss)
    for name, grad in slopes.items():
        assert torch.equal(grad, other_slopes[name]), name


@pytest.mark.parametrize("scope", ["module", "block", "layer"])
@pytest.mark.parametrize("checkpoints", ["reentrant", "other"])
def test_checkpoints_change_nothing(checkpoints, scope):
    results = []
    for kind in None, checkpoints:
        model = injected(torch.float64, checkpoints=kind, router_scope=scope)
        model.embed_tokens.weight.requires_grad_(kind == "reentrant")  # as Transformers has it
        attached = tr.attach(model)
        ids, mask = batch()
        attached(loss_of(model(ids, attention_mask=mask), ids, mask)).backward()
        model.embed_tokens.weight.requires_grad_(False)
        results.append(gradients(model))
    for name, grad in results[0].items():
        assert_close(results[1][name], grad)


def test_micro_batches_add_up_to_a_batch():
    ids, mask = batch(4)
    mask[:] = 1
    results = []
    for micro_batches in 1, 4:
        model = injected(torch.float64, losses=[tr.losses.ZLoss(1e-2)])
        attached = tr.attach(model)
        for rows in torch.arange(4).chunk(micro_batches):
            loss = loss_of(model(ids[rows], mask[rows]), ids[rows], mask[rows])
            (attached(loss) / micro_batches).backward()
        results.append(gradients(model))
    for name, grad in results[0].items():
        assert_close(results[1][name], grad)


def test_experts_without_tokens_have_a_gradient_of_zero():
    model = injected()
    for router in model.modules():
        if isinstance(router, tr.Router):
            router.weight.data.zero_()  # ties: the first two experts of every token
    train(model, *batch())
    for name, grad in gradients(model).items():
        assert grad is not None and (".default.2." not in name or not grad.any()), name


def test_an_expert_that_is_not_chosen_may_overflow():
    model = injected(losses=[])
    for module in model.modules():
        if isinstance(module, tr.Router):
            module.weight.data.zero_()
        if isinstance(module, tr.lora.RoutedLoraLinear):
            module.routed_A["default"]["2"].weight.data.fill_(3e38)
    ids, mask = batch()
    loss_of(model(ids, mask), ids, mask).backward()
    for name, grad in gradients(model).items():
        assert ".default.2." in name or grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_experts_stay_in_float32(dtype):
    torch.manual_seed(0)
    model = tiny_lm(dtype)
    tr.lora.inject(model, config(init_lora_weights=False, losses=[]))
    for name, parameter in trained(model).items():
        assert parameter.dtype == torch.float32, name
    ids, mask = batch()
    logits, routings = call(model, ids, mask)
    assert logits.dtype == dtype and routings[0].logits.dtype == torch.float32
    loss_of(logits.float(), ids, mask).backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def test_autocast():
    model = injected(losses=[], router="SoftRouter", router_arguments={})  # of which none flips
    ids, mask = batch()
    with torch.autocast("cpu", torch.bfloat16):
        logits, routings = call(model, ids, mask)
    assert_close(logits.float(), model(ids, mask), atol=0.1, rtol=0.1)
    assert routings[0].logits.dtype == torch.float32


@pytest.mark.parametrize("scope", SCOPES)
def test_compiles_in_one_graph(scope):
    model = injected(router_scope=scope, losses=[]).eval()
    expected = [model(*batch(samples)) for samples in (2, 3, 4)]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for samples, logits in zip((2, 3, 4), expected):
        assert_close(compiled(*batch(samples)), logits)


def test_the_mixture_is_copied_and_pickled_with_the_model():
    ids, mask = batch()
    model = injected(router_scope="block").eval()
    expected = model(ids, attention_mask=mask)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for module in model.modules():
        if isinstance(module, tr.Router):
            module.weight.data.neg_()
    assert not torch.allclose(model(ids, attention_mask=mask), expected)
    for other in copied, pickled:
        assert torch.equal(other(ids, attention_mask=mask), expected)


def test_state_dicts_are_strict_and_hold_a_shared_router_once():
    model = injected(router_scope="block")
    state = model.state_dict()
    assert sum("routed_gate" in name for name in state) == 4
    other = injected(router_scope="block")
    for parameter in trained(other).values():
        parameter.data.zero_()
    other.load_state_dict(state)
    ids, mask = batch()
    assert torch.equal(other.eval()(ids, mask), model.eval()(ids, mask))


# ---- degenerate sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize("experts, top_k", [(1, 1), (3, 3)])
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0), (2, 3)])
def test_sizes(shape, experts, top_k):
    layer, router = nn.Sequential(nn.Linear(4, 5)), {"top_k": top_k, "renormalize": False}
    options = {"num_experts": experts, "target_modules": ["0"], "router_arguments": router}
    tr.lora.inject(layer, config(losses=[], init_lora_weights=False, **options))
    x = seeded(*shape, 4).float().requires_grad_()
    y = layer(x)
    assert y.shape == (*shape, 5)
    y.sum().backward()
    assert all(grad is not None for grad in gradients(layer).values())


def test_a_batch_of_padding_alone():
    model = injected()
    ids, mask = batch()
    mask[:] = 0
    expected = tiny_lm()(ids, mask)
    logits, routings = call(model, ids, mask)
    assert torch.equal(logits, expected)
    (logits.sum() + routings.aux_loss()).backward()
    assert not any(grad.any() for grad in gradients(model).values())


def test_strides_do_not_matter():
    layer = nn.Sequential(nn.Linear(4, 5))
    tr.lora.inject(layer, config(target_modules=["0"], losses=[], init_lora_weights=False))
    x = seeded(4, 3, seed=4).float()
    assert_close(layer(x.T), layer(x.T.contiguous()))


# ---- experts and mixtures ------------------------------------------------------------------------


def test_frozen_experts_stay_frozen():
    model = injected()
    tr.lora.set_trainable(model, experts=["1"], router=False)
    assert all(".default.1." in name for name in trained(model))
    tr.lora.inject(model, config(), mix="second")
    tr.lora.set_mix(model, "default")
    names = [name for name in trained(model) if ".default." in name]
    assert names and all(".default.1." in name for name in names)
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids, mask = batch()
    logits, _ = call(model, ids, mask)
    loss_of(logits, ids, mask).backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".default.1." not in name), name


def test_mixtures_have_names():
    model, (ids, mask) = injected().eval(), batch()
    first = model(ids, mask)
    tr.lora.inject(model, config(init_lora_weights=False, num_experts=2), mix="second")
    model.eval()
    second = model(ids, mask)
    assert not torch.allclose(first, second)
    tr.lora.set_mix(model, "default")
    assert torch.equal(model(ids, mask), first)
    tr.lora.set_mix(model, None)
    assert torch.equal(model(ids, mask), tiny_lm()(ids, mask))
    tr.lora.unload(model, "default")
    tr.lora.set_mix(model, "second")
    assert torch.equal(model(ids, mask), second)
    with pytest.raises(ValueError, match="set_mix: expected a model with a mixture 'default'"):
        tr.lora.set_mix(model, "default")
    with pytest.raises(ValueError, match="inject: expected a new name of a mixture, got 'second'"):
        tr.lora.inject(model, config(), mix="second")


@pytest.mark.parametrize("scope", ["module", "block"])
def test_experts_come_and_go(scope):
    arguments = {"top_k": 1, "renormalize": False}
    model, (ids, mask) = injected(router_scope=scope, router_arguments=arguments).eval(), batch()
    before = model(ids, attention_mask=mask)
    tr.lora.add_expert(model, "legal")
    router = model.layers[0].self_attn.q_proj.routed_gate["default"]
    assert router.num_experts == 4 and router.weight.shape == (4, HIDDEN)
    assert model.routed_lora["default"].expert_names == ["0", "1", "2", "legal"]
    with tr.lora.force(model, "legal"):  # it does something at once, as these are initialised
        assert not torch.allclose(model(ids, attention_mask=mask), before)
    tr.lora.remove_expert(model, "legal")
    assert torch.equal(model(ids, attention_mask=mask), before)
    tr.lora.remove_expert(model, "0")
    assert model.routed_lora["default"].expert_names == ["1", "2"]
    with pytest.raises(ValueError, match="remove_expert: expected an expert among"):
        tr.lora.remove_expert(model, "0")
    tr.lora.remove_expert(model, "1")
    tr.lora.add_expert(model, "small", rank=2)
    assert model.layers[0].mlp.up_proj.routed_A["default"]["small"].weight.shape == (2, HIDDEN)
    assert model.layers[0].mlp.up_proj.scaling["default"] == {"2": 2.0, "small": 4.0}
    assert model.routed_lora["default"].ranks == [4, 2]
    tr.lora.remove_expert(model, "small")
    with pytest.raises(ValueError, match="remove_expert: expected another expert besides '2'"):
        tr.lora.remove_expert(model, "2")


def test_what_is_trained_is_printed(capsys):
    model = injected(router_scope="block")
    tr.lora.set_trainable(model, experts=["1", "2"])
    counts = tr.lora.trainable_parameters(model)
    of_experts = 2 * 2 * (3 * 4 * 2 * HIDDEN + 2 * 4 * (HIDDEN + 24))
    assert counts["experts"] == of_experts and counts["frozen_experts"] == of_experts // 2
    assert counts["routers"] == 4 * 3 * HIDDEN
    assert counts["trainable"] == of_experts + counts["routers"]
    assert counts["all"] == sum(p.numel() for p in model.parameters())
    tr.lora.print_trainable_parameters(model)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"trainable params: {counts['trainable']:,d} || all params: ")
    assert second.startswith("routers: 192 || experts: ")


# ---- what does not fit ---------------------------------------------------------------------------


class Fused(nn.Module):
    """Reads the weight of its layer, as the kernels of state space models do."""

    def __init__(self):
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(self.in_proj(x), self.out_proj.weight, self.out_proj.bias)


def test_a_layer_that_is_never_called_is_found():
    model = nn.Sequential(Fused())
    tr.lora.inject(model, config(target_modules=["in_proj", "out_proj"], losses=[]))
    with pytest.raises(ValueError, match=r"check_reach: expected .* got none of \['0.out_proj'\]"):
        tr.lora.check_reach(model, torch.zeros(2, 4))
    tr.lora.check_reach(injected(losses=[]), *batch())


def test_losses_without_a_destination_raise():
    with pytest.raises(RuntimeError, match="lora: expected a destination for 1 losses, got none"):
        injected()(*batch())


def test_a_container_must_be_called():
    model = injected(router_scope="block", losses=[])
    with pytest.raises(RuntimeError, match=r"lora: expected a call of layers\.0\.mlp, whose input"):
        model.layers[0].mlp.up_proj(torch.zeros(2, HIDDEN))


def test_scopes_that_do_not_exist():
    options = config(target_modules=["0"], losses=[], router_scope="layer")
    with pytest.raises(ValueError, match=r"inject: expected layers in a list, .* got first"):
        model = nn.ModuleDict({"first": nn.Linear(4, 4)})
        tr.lora.inject(model, config(target_modules=["first"], router_scope="layer"))
    assert options.router_scope == "layer"


def test_presets():
    assert {"lora_mixer", "molora"} < set(tr.lora.list_lora_presets())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        molora = tr.lora.lora_preset("molora", target_modules=TARGETS)
    model = tiny_lm()
    report = tr.lora.inject(model, molora)
    layer = model.layers[0].mlp.up_proj
    assert len(report.matched) == 10 and len(layer.experts("default")) == 10
    assert set(layer.scaling["default"].values()) == {4.0}
    assert layer.routed_A["default"]["3"].weight.std() < 0.04
    assert not layer.routed_B["default"]["3"].weight.any()
    mixer = tr.lora.lora_preset("lora_mixer")
    model = tiny_lm()
    tr.lora.inject(model, mixer)
    assert isinstance(model.layers[0].self_attn.q_proj.routed_gate["default"], tr.SoftRouter)
    train(model, *batch())
    with pytest.raises(ValueError, match="lora_preset: expected name among"):
        tr.lora.lora_preset("lora_mix")
