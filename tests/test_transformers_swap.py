"""Routers of the library in the models of Transformers, of 5 and of 4.57."""

import copy
import pickle
import sys

import pytest
import torch
from torch.testing import assert_close

import torch_routers as tr
from tiny_transformers import MODELS, VERSION, VOCAB, batch, blocks_of, gate_of, tiny
from torch_routers.integrations.transformers import register_experts, swap_routers

pytestmark = pytest.mark.transformers
CLOSE = {"atol": 2e-6, "rtol": 2e-5}

#: Routers that are not a `TopKRouter`, and what they need to be told.
OTHERS = {
    "AdaptiveKRouter": {},
    "EntmaxRouter": {},
    "EntropyRouter": {},
    "HashRouter": {"vocab_size": VOCAB, "top_k": 2},
    "NoisyTopKRouter": {},
    "PrototypeRouter": {},
    "ReLURouter": {},
    "SoftRouter": {},
    "TopPRouter": {"top_p": 0.9},
}


def loss_of(model, ids, **options):
    return model(ids, labels=ids, **options).loss


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def value_of_experts(block, x, weights):
    """The sum over all experts with these weights ``[tokens, num_experts]``, one by one."""
    total = torch.zeros_like(x)
    for e, weight in enumerate(weights.unbind(-1)):
        if isinstance(block.experts, torch.nn.ModuleList):
            y = block.experts[e](x)
        elif VERSION < 5:
            only = torch.nn.functional.one_hot(torch.full((len(x),), e), len(weights[0]))
            y = block.experts(x, torch.full((len(x), 1), e), only.to(x.dtype))
        else:
            y = block.experts(x, torch.full((len(x), 1), e), torch.ones(len(x), 1))
        total += weight[:, None] * y.view_as(x)
    return total


def shared_of(block, x):
    if hasattr(block, "shared_experts"):
        return block.shared_experts(x)
    if hasattr(block, "shared_expert"):
        return torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    return 0


# ---- the same model ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_swap_by_the_models_own_rule_changes_no_output_and_no_gradient(name):
    model, ids = tiny(name), batch()
    swapped = copy.deepcopy(model)
    report = swap_routers(swapped)
    assert len(report.names) == len(blocks_of(model))
    assert not report.added_keys and not report.unused_keys
    assert_close(swapped(ids).logits, model(ids).logits, **CLOSE)
    loss_of(model, ids).backward()
    loss_of(swapped, ids).backward()
    ours, theirs = gradients(swapped), gradients(model)
    for key, gradient in theirs.items():
        assert_close(ours[key], gradient, **CLOSE, msg=key)
    for key in set(ours) - set(theirs):  # experts that saw no token
        assert not ours[key].any()
    assert all(gate_of(block).weight.grad.any() for block in blocks_of(swapped))


@pytest.mark.parametrize("name", MODELS)
def test_names_of_parameters_and_keys_stay_and_load_both_ways(name):
    model, swapped = tiny(name), tiny(name)
    swap_routers(swapped, init="reset")
    assert list(swapped.state_dict()) == list(model.state_dict())
    names = [key for key, _ in model.named_parameters()]
    assert [key for key, _ in swapped.named_parameters()] == names
    assert not torch.equal(
        gate_of(blocks_of(swapped)[0]).weight, gate_of(blocks_of(model)[0]).weight
    )
    swapped.load_state_dict(model.state_dict())
    assert_close(swapped(batch()).logits, model(batch()).logits, **CLOSE)
    for value in swapped.state_dict().values():
        value.mul_(0.9)
    model.load_state_dict(swapped.state_dict())
    assert_close(model(batch()).logits, swapped(batch()).logits, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_restoring_leaves_no_trace(name):
    model, ids = tiny(name), batch()
    plain = copy.deepcopy(model)
    if hasattr(model.config, "router_aux_loss_coef"):
        model(ids, output_router_logits=True)  # Transformers leaves something behind
    report = swap_routers(model, "EntropyRouter", init="reset")
    assert not torch.equal(model(ids).logits, plain(ids).logits)
    report.restore()
    report.restore()
    assert torch.equal(model(ids).logits, plain(ids).logits)
    for ours, theirs in zip(model.modules(), plain.modules()):
        assert type(ours) is type(theirs)
        assert not ours._forward_pre_hooks
    if hasattr(model.config, "router_aux_loss_coef"):
        assert model(ids, output_router_logits=True).aux_loss == (
            plain(ids, output_router_logits=True).aux_loss
        )


@pytest.mark.parametrize("name", ["mixtral", "deepseek", "gpt_oss"])
def test_a_plain_model_reads_what_was_trained_and_saved(name, tmp_path):
    model, ids = tiny(name), batch()
    swap_routers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    loss_of(model, ids).backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    assert not hasattr(gate_of(blocks_of(plain)[0]), "route")
    assert_close(plain(ids).logits, model(ids).logits, **CLOSE)


@pytest.mark.parametrize("name", ["mixtral", "deepseek", "gpt_oss"])
def test_copies_and_pickles_route_alike_and_by_themselves(name):
    model, ids = tiny(name), batch()
    swap_routers(model)
    expected = model(ids).logits
    for other in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert torch.equal(other(ids).logits, expected)
        torch.nn.init.zeros_(gate_of(blocks_of(other)[0]).weight)
        assert not torch.equal(other(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)


def test_the_registry_does_not_know_that_routers_were_swapped():
    before, cls = tr.list_routers(), tr.TopKRouter
    model = tiny("mixtral")
    swap_routers(model)
    config = gate_of(blocks_of(model)[0]).config()
    assert tr.list_routers() == before
    assert type(tr.from_config(config)) is cls
    assert config["class"] == "TopKRouter"


@pytest.mark.parametrize("name", ["mixtral", "deepseek", "gpt_oss"])
def test_what_is_frozen_and_in_half_precision_stays_so(name):
    model = tiny(name, torch.bfloat16)
    gate = gate_of(blocks_of(model)[0])
    gate.weight.requires_grad_(False)
    dtypes = {key: value.dtype for key, value in model.state_dict().items()}
    swap_routers(model)
    now = {key: value.dtype for key, value in model.state_dict().items()}
    biases = {key for key in now if "e_score_correction_bias" in key}  # whose steps are small
    assert now == dtypes | dict.fromkeys(biases, torch.float32)
    assert not gate_of(blocks_of(model)[0]).weight.requires_grad
    assert model(batch()).logits.dtype == torch.bfloat16


# ---- other routers -------------------------------------------------------------------------------


@pytest.mark.parametrize("router", OTHERS)
@pytest.mark.parametrize("name", ["mixtral", "qwen2", "deepseek", "gpt_oss"])
def test_experts_get_the_weights_of_the_router(name, router):
    """Compared with each expert on all tokens, weighed by the routing that the router has."""
    model, ids = tiny(name), batch()
    if (name, router) == ("gpt_oss", "NoisyTopKRouter"):
        with pytest.raises(ValueError, match="expected a router with a bias, as the gate has one"):
            swap_routers(model, router)
        return
    swap_routers(model, router, **OTHERS[router])
    tr.follow_inputs(model)
    block = blocks_of(model)[-1]
    seen = []
    block.register_forward_hook(lambda block, args, y: seen.extend([args[0], y]))
    with tr.collect(model) as routings:
        model(ids)
    x, y = seen[0].flatten(0, 1), seen[1][0] if isinstance(seen[1], tuple) else seen[1]
    routing = routings[-1]
    weights = routing.weights.flatten(0, -2)
    if routing.indices is not None:
        indices = routing.indices.flatten(0, -2)
        dense = torch.zeros(len(x), routing.num_experts)
        weights = dense.scatter_add(-1, indices.clamp(min=0), weights * (indices >= 0))
    used = (weights != 0).sum(-1)
    assert used.max() > used.min() or router not in ("ReLURouter", "TopPRouter")
    scale = 2.5 if name == "deepseek" else 1.0  # the model's, which these routers do not know
    expected = scale * value_of_experts(block, x, weights) + shared_of(block, x)
    assert_close(y.reshape_as(x), expected, **CLOSE)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("router", ["ReLURouter", "TopKRouter"])
def test_empty_slots_name_an_expert_that_exists_with_weight_zero(name, router):
    model, ids = tiny(name), batch()
    swap_routers(model, router, **({"capacity": 1} if router == "TopKRouter" else {}))
    tr.follow_inputs(model)
    gate, seen = gate_of(blocks_of(model)[0]), []
    gate.register_forward_hook(lambda gate, args, answer: seen.append(answer))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with tr.collect(model) as routings:
        model(ids, attention_mask=mask)
    *_, weights, indices = seen[0]
    slots = gate.num_experts if router == "ReLURouter" else gate.top_k
    assert indices.shape == (ids.numel(), slots) and indices.dtype == torch.int64
    used = routings[0].used().sum(-1).flatten()
    assert used.min() == 0 and used.max() > 0
    empty = torch.arange(slots) >= used[:, None]
    if VERSION < 5 and name == "gpt_oss":  # dense weights; its experts pass over their number
        assert (indices == gate.num_experts).equal(empty)
        return
    assert ((indices >= 0) & (indices < gate.num_experts)).all()
    assert indices.masked_select(empty).equal(indices[:, :1].expand_as(indices)[empty])
    assert not weights[empty].any()
    assert_close(weights.sum(-1), routings[0].weights.sum(-1).flatten())


def test_top_k_says_the_number_of_slots():
    model, ids = tiny("mixtral"), batch()
    for router, top_k, slots in [
        ("TopKRouter", 3, 3), ("EntropyRouter", 2, 2), ("EntropyRouter", "keep", 4),
        ("AdaptiveKRouter", "keep", 2), ("NoisyTopKRouter", 3, 3),
    ]:  # fmt: skip
        report, seen = swap_routers(model, router, top_k=top_k), []
        gate = gate_of(blocks_of(model)[0])
        handle = gate.register_forward_hook(lambda gate, args, answer: seen.append(answer))  # noqa: B023
        with tr.collect(model) as routings:
            model(ids)
        weights = seen[0][1]
        assert weights.shape == (ids.numel(), slots)
        if routings[0].indices is None:
            largest = routings[0].weights.flatten(0, 1).topk(slots).values
            assert_close(weights, largest)
        handle.remove()
        report.restore()


def test_keys_that_a_router_adds_or_does_not_look_at_are_reported():
    model = tiny("deepseek")
    before = set(model.state_dict())
    report = swap_routers(model, "ReLURouter")
    gate = report.names[0]
    assert report.added_keys == [f"{gate}.gain"]
    assert report.unused_keys == [f"{gate}.e_score_correction_bias"]
    assert set(model.state_dict()) == before | {f"{gate}.gain"}
    report.restore()
    report = swap_routers(model, "HashRouter", vocab_size=VOCAB)
    assert report.unused_keys == [f"{gate}.weight", f"{gate}.e_score_correction_bias"]
    tr.follow_inputs(model)
    model.train()
    loss_of(model, batch()).backward()
    assert not model.get_parameter(f"{gate}.weight").requires_grad


@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_samples_of_a_batch_have_a_capacity_each(name):
    model, ids = tiny(name), batch()
    swap_routers(model, capacity=2)
    with tr.collect(model) as routings:
        together = model(ids).logits
    assert routings[0].counts.max() > 2
    assert_close(together, torch.cat([model(row[None]).logits for row in ids]), **CLOSE)


# ---- losses, masks, balancing --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "deepseek", "gpt_oss"])
def test_losses_are_delivered_or_missed(name):
    model, ids = tiny(name), batch()
    losses = [tr.losses.LoadBalanceLoss(0.1), tr.losses.ZLoss(0.01)]
    swap_routers(model, losses=losses)
    gates = [gate_of(block) for block in blocks_of(model)]
    assert len({loss for gate in gates for loss in gate.losses}) == 2 * len(gates)
    model(ids)  # in eval mode, as the model was: there are none
    model.train()
    with pytest.raises(RuntimeError, match="swap_routers: expected a destination for 2 losses"):
        model(ids)
    with tr.collect(model) as routings:
        loss = loss_of(model, ids)
    assert len(routings) == len(blocks_of(model))
    (0 * loss + routings.aux_loss()).backward()
    assert all(gate_of(block).weight.grad.any() for block in blocks_of(model))
    model.zero_grad()
    with tr.collect(model) as routings:
        loss = loss_of(model, ids)
    (loss + routings.aux_loss()).backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    new = hasattr(model, "activation_checkpointing_enable")
    getattr(model, f"{'activation' if new else 'gradient'}_checkpointing_enable")()
    tr.attach(model)(loss_of(model, ids)).backward()
    assert_close(gradients(model), expected, **CLOSE)


@pytest.mark.parametrize("followed", ["before", "after"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek", "gpt_oss"])
def test_the_content_of_padding_changes_nothing(name, followed):
    model, ids = tiny(name).train(), batch()
    if followed == "before":
        report = swap_routers(model)  # there is none to follow for without routers
        tr.follow_inputs(model)
        report.restore()
    swap_routers(model, losses=[tr.losses.LoadBalanceLoss(0.1)])
    if followed == "after":
        tr.follow_inputs(model)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    results = []
    for fill in 1, 9:
        filled = torch.where(mask.bool(), ids, fill)
        with tr.collect(model) as routings:
            logits = model(filled, attention_mask=mask).logits
        results.append((logits[mask.bool()], routings.aux_loss(), *(r.counts for r in routings)))
        assert all(r.counts.sum() == mask.sum() * r.weights.shape[-1] for r in routings)
    assert_close(*results, atol=0, rtol=0)


def test_a_controller_moves_the_bias_that_the_model_saves():
    model, plain, ids = tiny("deepseek").train(), tiny("deepseek"), batch()
    report = swap_routers(model)
    key = f"{report.names[0]}.e_score_correction_bias"
    before = model.state_dict()[key].clone()
    controller = tr.BalanceController(model, 0.3)
    loss_of(model, ids).backward()
    controller.step()
    assert not torch.equal(model.state_dict()[key], before)
    plain.load_state_dict(model.state_dict())
    assert_close(plain(ids).logits, model.eval()(ids).logits, **CLOSE)


# ---- the model's own loss ------------------------------------------------------------------------

WITH_LOSS = ["mixtral", "qwen2", "qwen3", "olmoe", "gpt_oss"]


@pytest.mark.parametrize("recorded", ["first", "before the swap too"])
@pytest.mark.parametrize("name", WITH_LOSS)
def test_the_models_own_loss_still_works(name, recorded):
    model, ids = tiny(name).train(), batch()
    expected = model(ids, labels=ids, output_router_logits=True)
    expected.loss.backward()
    swapped = copy.deepcopy(model) if recorded != "first" else tiny(name).train()
    swapped.zero_grad()
    swap_routers(swapped)
    result = swapped(ids, labels=ids, output_router_logits=True)
    assert_close(result.aux_loss, expected.aux_loss, **CLOSE)
    assert_close(result.router_logits, expected.router_logits, **CLOSE)
    result.aux_loss.backward()
    assert all(gate_of(block).weight.grad.any() for block in blocks_of(swapped))


@pytest.mark.parametrize(
    "options", [{"router": "EntmaxRouter"}, {"top_k": 3}, {"score": "sigmoid"}], ids=str
)
def test_the_models_own_loss_is_refused_where_it_would_measure_something_else(options):
    model, ids = tiny("mixtral"), batch()
    report = swap_routers(model, **options)
    model(ids)
    message = "swap_routers: expected output_router_logits=False with .*Router, which does not"
    with pytest.raises(ValueError, match=message):
        model(ids, output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match=message):
        model(ids)
    model(ids, output_router_logits=False)
    report.restore()
    assert model(ids).aux_loss > 0


# ---- generating ----------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["TopKRouter", "HashRouter"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek", "gpt_oss"])
def test_a_cache_changes_no_generated_token(name, router):
    model, ids = tiny(name), batch()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    plain = model.generate(ids, attention_mask=mask, **options)
    swap_routers(model, router, **OTHERS.get(router, {}))
    tr.follow_inputs(model)
    cached = model.generate(ids, attention_mask=mask, **options)
    assert cached.shape == (2, 12)
    assert cached.equal(model.generate(ids, attention_mask=mask, use_cache=False, **options))
    if router == "TopKRouter":
        assert cached.equal(plain)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("expected router among", {"router": "Router"}),
        ("expected a router that chooses experts .* got SMEARRouter", {"router": "SMEARRouter"}),
        ("expected a router that chooses .* got RecurrentRouter", {"router": "RecurrentRouter"}),
        (
            r"expected a router with a weight of shape \[4, 16\], .* got \[3, 4\] of PolyRouter",
            {"router": "PolyRouter", "num_tasks": 3},
        ),
        ("expected init among", {"init": "zeros"}),
        ("expected top_k >= 1 or 'keep', got 0", {"top_k": 0}),
        ("expected top_k >= 1 or 'keep', got 'all'", {"top_k": "all"}),
        ("expected top_k='keep', or at most 4", {"router": "EntropyRouter", "top_k": 5}),
        ("expected top_k='keep', or at most 4", {"router": "AdaptiveKRouter", "top_k": 2}),
        ("expected top_k in \\[1, num_experts=4\\], got 5", {"top_k": 5}),
        ("router_arguments without sizes, got \\['num_experts'\\]", {"num_experts": 8}),
        ("got \\['capacities', .*unexpected keyword", {"capacities": 1}),
    ],
)  # fmt: skip
def test_what_cannot_be_swapped_is_refused_and_nothing_changes(message, options):
    model = tiny("mixtral")
    with pytest.raises(ValueError, match=message):
        swap_routers(model, **options)
    assert not any(isinstance(module, tr.Router) for module in model.modules())


def test_models_without_experts_and_swapped_ones_are_refused():
    with pytest.raises(ValueError, match=r"expected a model with layers among .*, got Linear"):
        swap_routers(torch.nn.Linear(2, 2))
    model = tiny("qwen3")
    swap_routers(model)
    with pytest.raises(ValueError, match=r"with its own gates, got TopKRouter at .*0.mlp.gate"):
        swap_routers(model)
    with pytest.raises(ValueError, match=r"expected a router with a bias, .* Use gate_bias=True"):
        swap_routers(tiny("gpt_oss"), gate_bias=False)


def test_a_layer_that_chooses_besides_its_gate_is_refused():
    model = tiny("deepseek")
    blocks_of(model)[0].route_tokens_to_experts = None  # as in Transformers 5.0
    with pytest.raises(RuntimeError, match="expected DeepseekV3MoE to leave the choice of exp"):
        swap_routers(model)


def test_experts_of_transformers_4_have_one_way_to_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)  # as it is in 4
    with pytest.raises(RuntimeError, match=r"expected transformers >= 5, .*Run: pip install"):
        register_experts()
