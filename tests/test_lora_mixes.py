"""Mixtures of LoRAs by what is weighed, and the presets of the literature."""

from types import SimpleNamespace

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from torch import nn
from torch.testing import assert_close

import torch_routers as tr
from tiny_lm import HIDDEN, batch, loss_of, tiny_lm
from torch_routers.lora.inject import layers_of

OPTIONS = {
    "mola": {"experts_per_layer": [2, 4]},
    "moelora": {"num_tasks": 3},
    "poly": {"num_tasks": 3},
    "hydralora": {"target_modules": ["q_proj", "up_proj", "down_proj"]},
}
TASKS = torch.tensor([0, 2, 1])


def with_preset(name, *, init=False, train=True, dtype=torch.float64, **options):
    """The small model with experts that do something, by default."""
    model = tiny_lm(dtype)
    torch.manual_seed(2)
    options = {"init_lora_weights": init, "lora_dropout": 0.0, **OPTIONS.get(name, {}), **options}
    tr.lora.inject(model, tr.lora.lora_preset(name, **options))
    for layer in model.modules():  # routers that tell tokens apart
        if isinstance(layer, tr.Router) and hasattr(layer, "weight"):
            nn.init.normal_(layer.weight)
    tr.follow_inputs(model)
    return model.to(dtype).train(train)


def call(model, ids, mask):
    return model(ids, attention_mask=mask, routing_task_ids=TASKS)


every_preset = pytest.mark.parametrize("name", tr.lora.list_lora_presets())


@every_preset
def test_a_fresh_mixture_changes_nothing(name):
    ids, mask = batch()
    expected = tiny_lm()(ids, attention_mask=mask)
    model = with_preset(name, init=True, train=False, dtype=torch.float32)
    y = call(model, ids, mask)
    if name == "mixlora":  # a sum of equal results, whose weights sum to one
        assert_close(y[mask.bool()], expected[mask.bool()])
    else:
        assert torch.equal(y, expected)
    with tr.lora.disable(model):
        assert torch.equal(call(model, ids, mask), expected)


@every_preset
def test_everything_that_is_trained_has_a_gradient(name):
    model = with_preset(name)
    ids, mask = batch()
    attached = tr.attach(model)
    attached(loss_of(call(model, ids, mask), ids, mask)).backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        if parameter.requires_grad and ".routed_" in key:
            assert parameter.grad.isfinite().all(), key
    trained = {
        key.split(".routed_")[1].split(".")[0]
        for key, p in model.named_parameters()
        if (p.grad is not None and p.grad.any())
    }
    expected = {"A", "B", "gate"}
    assert trained - {"tasks"} == (expected - {"A", "gate"} if name == "flylora" else expected)


@every_preset
def test_what_is_padded_changes_nothing(name):
    model = with_preset(name)
    ids, mask = batch()
    other = torch.where(mask.bool(), ids, 7)
    results = []
    for these in ids, other:
        torch.manual_seed(3)  # of Poly's draws
        with tr.collect(model) as routings:
            y = call(model, these, mask)
        results.append((loss_of(y, ids, mask), sum(r.counts.sum() for r in routings)))
    assert torch.equal(*(loss for loss, _ in results))
    assert torch.equal(*(counts for _, counts in results))


@every_preset
def test_a_saved_mixture_is_the_same_elsewhere(name, tmp_path):
    model = with_preset(name, train=False, dtype=torch.float32)
    ids, mask = batch()
    expected = call(model, ids, mask)
    tr.lora.save_adapter(model, tmp_path)
    other = tiny_lm().eval()
    tr.lora.load_adapter(other, tmp_path)
    tr.follow_inputs(other)
    assert torch.equal(call(other, ids, mask), expected)
    assert not torch.equal(expected, tiny_lm()(ids, attention_mask=mask))


def linear(**options):
    """One linear layer with experts that do something."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6)).double()
    options = {"num_experts": 4, "r": 3, "lora_alpha": 6, **options}
    config = tr.lora.RoutedLoraConfig(target_modules=["0"], init_lora_weights=False, **options)
    tr.lora.inject(model, config)
    return model.double()


def by_loop(layer, x, weights):
    """The experts one by one, token by token."""
    rows = []
    for token, of_token in zip(x, weights):
        y = layer.base_layer(token)
        for expert, weight in zip(layer.experts("default"), of_token):
            a, b = layer.factors("default", expert)
            y = y + weight * layer.scaling["default"][expert] * (b @ (a @ token))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("router", ["SoftRouter", "TopKRouter"])
def test_a_shared_factor_is_that_of_every_expert(router):
    model, x = linear(mix="shared_a", router=router), torch.randn(5, 8).double()
    weights = model[0].scope("default").router(x).of_experts(4)
    assert_close(model(x), by_loop(model[0], x, weights))
    assert len(model[0].routed_A["default"]) == 1 and len(model[0].routed_B["default"]) == 4
    with tr.lora.force(model, "2"):
        assert_close(model(x), by_loop(model[0], x, torch.eye(4)[[2] * 5].double()))


STRAIGHT_THROUGH = {
    "router": "SoftRouter",
    "router_arguments": {"mode": "st_topk", "top_k": 1},
    "losses": [],
}


def test_a_router_learns_from_experts_that_it_left_out():
    model = linear(mix="shared_a", **STRAIGHT_THROUGH)
    model(torch.randn(1, 8).double()).sum().backward()
    assert (model[0].scope("default").router.weight.grad != 0).any(1).all()
    mlp = with_preset("mixlora", **STRAIGHT_THROUGH).layers[0].mlp
    mlp(torch.randn(1, HIDDEN).double()).sum().backward()
    assert (mlp.up_proj.scope("default").router.weight.grad != 0).any(1).all()


def test_nothing_leaks_from_an_expert_that_no_token_has():
    model, x = linear(mix="shared_a", router="TopKRouter"), torch.randn(1, 8).double()
    used = model[0].scope("default").router(x).indices.flatten().tolist()
    for expert in set(range(4)) - set(used):
        nn.init.constant_(model[0].routed_B["default"][str(expert)].weight, torch.nan)
    assert model(x).isfinite().all()


def test_a_router_with_a_factor_is_not_baked():
    with pytest.raises(ValueError, match="bake_router: expected routers without a factor"):
        tr.lora.bake_router(with_preset("flylora"), [])


@pytest.mark.parametrize("name", ["hydralora", "poly"])
def test_constant_weights_are_one_lora(name):
    model = with_preset(name, train=False)
    ids, mask = batch()
    mask = torch.ones_like(mask)
    tr.lora.bake_router(model, [{"input_ids": ids, "routing_task_ids": TASKS}])
    expected = call(model, ids, mask)
    tr.lora.merge(model)
    assert_close(model(ids, attention_mask=mask), expected)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("tasks", [[0, 2], [1, 1]])
def test_mixed_factors_are_those_of_peft(splits, tasks):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6))
    options = {"target_modules": ["0"], "r": 4, "n_tasks": 3, "n_skills": 5, "n_splits": splits}
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 6)), peft.PolyConfig(init_weights=False, **options)
    )
    layer = theirs.base_model.model[0]
    layer.base_layer.load_state_dict(base[0].state_dict())
    nn.init.normal_(layer.poly_router["default"].module_logits)
    config = tr.lora.lora_preset(
        "poly", target_modules=["0"], r=4, num_tasks=3, num_experts=5,
        router_arguments={"num_splits": splits},
    )  # fmt: skip
    tr.lora.inject(base, config)
    ours = base[0]
    with torch.no_grad():
        ours.scope("default").router.weight.copy_(layer.poly_router["default"].module_logits)
        for e in range(5):  # theirs are [splits, skills, features, r] and [.., r, features]
            a, b = layer.poly_lora_A["default"][:, e], layer.poly_lora_B["default"][:, e]
            ours.routed_A["default"][str(e)].weight.copy_(a.flatten(0, 1).T)
            ours.routed_B["default"][str(e)].weight.copy_(b.mT.flatten(0, 1))
    tr.follow_inputs(base)
    x, tasks = torch.randn(2, 3, 8), torch.tensor(tasks)
    expected = layer.eval()(x, task_ids=tasks)
    assert_close(base.eval()(x, routing_task_ids=tasks[:, None].expand(2, 3)), expected)


def test_features_that_cannot_be_split_are_refused():
    with pytest.raises(ValueError, match=r"inject: expected features that num_splits=5 divides"):
        linear(
            mix="factors", router="PolyRouter", router_input="task", num_tasks=2,
            router_arguments={"num_splits": 5},
        )  # fmt: skip


def ranks(top_k):
    options = {"router": "RankRouter", "router_arguments": {"top_k": top_k}}
    return linear(mix="ranks", r=1, lora_alpha=2, num_experts=6, **options)


def test_ranks_are_chosen_by_the_projection():
    model = ranks(top_k=2)
    layer, x = model[0], torch.randn(7, 8).double()
    router = layer.scope("default").router
    router.expert_bias[3], router.expert_bias[1] = 5.0, -5.0  # far from 0, of either sign
    z = x @ router.projection.double().T
    chosen = (z + router.expert_bias).abs().topk(2).indices
    kept = torch.zeros_like(z).scatter(1, chosen, z.gather(1, chosen))
    expected = layer.base_layer(x) + 2 * kept @ layer.routed_B["default"].shared.weight.T
    assert_close(model(x), expected)
    assert (chosen.sort(1).values == torch.tensor([1, 3])).all()  # by the bias, not in the sum
    assert not any(name.endswith("projection") for name, _ in model.named_parameters())


def test_all_ranks_are_a_lora_whose_first_factor_is_frozen():
    model = ranks(top_k=6)
    layer, x = model[0], torch.randn(7, 8).double()
    a, b = layer.scope("default").router.projection, layer.routed_B["default"].shared.weight
    assert_close(model(x), layer.base_layer(x) + 2 * x @ a.T @ b.T)


@pytest.mark.parametrize("checkpoints", [None, "reentrant", "other"])
def test_a_controller_moves_the_bias_of_ranks(checkpoints):
    model = with_preset("flylora", num_experts=8, router_arguments={"top_k": 2})
    model.checkpoints = checkpoints
    model.embed_tokens.weight.requires_grad_()  # reentrant checkpoints need it
    controller = tr.BalanceController(model)
    ids, mask = batch()
    with tr.collect(model) as routings:
        loss = loss_of(call(model, ids, mask), ids, mask)
    loss.backward()
    router = model.layers[0].self_attn.q_proj.scope("default").router
    assert torch.equal(router._load, routings[0].counts)
    controller.step()
    counts = routings[0].counts
    expected = 1e-3 * (counts.sum() - counts * 8).sign()
    assert_close(router.expert_bias, expected.float())
    assert expected.any()


def networks(model, x, experts=range(8)):
    """What the feed-forward network gives with each expert, ``[experts, tokens, features]``."""
    mlp = model.layers[0].mlp
    results = []
    for expert in map(str, experts):
        up, down = (
            (layer, *layer.factors("default", expert), layer.scaling["default"][expert])
            for layer in (mlp.up_proj, mlp.down_proj)
        )
        hidden = F.silu(up[0].base_layer(x) + up[3] * x @ up[1].T @ up[2].T)
        results.append(down[0].base_layer(hidden) + down[3] * hidden @ down[1].T @ down[2].T)
    return torch.stack(results)


@pytest.mark.parametrize(
    ("router", "arguments"),
    [("TopKRouter", {"top_k": 2}), ("SoftRouter", {}), ("EntropyRouter", {})],
)
def test_a_network_is_an_expert(router, arguments):
    model = with_preset("mixlora", router=router, router_arguments=arguments, losses=[])
    x = torch.randn(5, HIDDEN).double()
    mlp = model.layers[0].mlp
    weights = mlp.up_proj.scope("default").router(x).of_experts(8)
    expected = torch.einsum("te,eth->th", weights, networks(model, x))
    assert_close(mlp(x), expected)
    with tr.lora.force(model, "3"):
        assert_close(mlp(x), networks(model, x)[3])


def test_networks_as_experts_have_every_derivative():
    model = with_preset("mixlora", losses=[])
    mlp, x = model.layers[0].mlp, torch.randn(3, HIDDEN).double().requires_grad_()
    torch.autograd.gradcheck(mlp, (x,))
    parameters = {k: p for k, p in mlp.named_parameters() if p.requires_grad}
    y = mlp(x).square().sum()
    grads = torch.autograd.grad(y, parameters.values(), materialize_grads=True)
    weights = mlp.up_proj.scope("default").router(x).of_experts(8)
    loop = torch.einsum("te,eth->th", weights, networks(model, x)).square().sum()
    expected = torch.autograd.grad(loop, parameters.values(), materialize_grads=True)
    for name, grad, there in zip(parameters, grads, expected):
        assert_close(grad, there, msg=name)


def test_what_experts_have_in_common_is_computed_once():
    """As one product: with a dimension of slots it would be one of each token, and as many copies
    of the matrix."""
    model = with_preset("mixlora")
    seen = []
    base = model.layers[0].mlp.up_proj.base_layer
    base.register_forward_hook(lambda _, args, y: seen.append(args[0].shape[:-1]))
    ids, mask = batch()
    with tr.collect(model):
        call(model, ids, mask)
    assert seen == [ids.shape]


def test_a_token_without_experts_gets_what_the_network_gives():
    model = with_preset("mixlora", losses=[])
    mlp = model.layers[0].mlp
    seen = []
    mlp.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    ids, mask = batch()
    call(model, ids, mask)
    ((x, y),) = seen[:1]
    x = x[..., 0, :] if x.dim() == 4 else x
    base = mlp.down_proj.base_layer(F.silu(mlp.up_proj.base_layer(x)))
    assert_close(y[mask == 0], base[mask == 0])
    assert not torch.allclose(y[mask == 1], base[mask == 1])


def test_networks_of_several_experts_are_no_lora():
    model = with_preset("mixlora", train=False)
    with pytest.raises(ValueError, match='one expert of weight 1 with mix="block"'):
        tr.lora.collapse_to_lora(model, [0.5, 0.5, 0, 0, 0, 0, 0, 0])
    ids, mask = batch()
    with tr.lora.force(model, "5"):
        expected = call(model, ids, mask)
        tr.lora.merge(model)
    assert_close(model(ids, attention_mask=mask), expected)


def test_a_block_that_returns_more_than_hidden_states_is_refused():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj = nn.Linear(4, 4)

        def forward(self, x):
            return self.up_proj(x), None

    model = nn.Sequential(Pair())
    tr.lora.inject(model, tr.lora.lora_preset("mixlora", losses=[]))
    with pytest.raises(
        ValueError, match=r'lora: expected a Tensor of .* for mix="block", got tuple'
    ):
        model(torch.randn(3, 4))


def test_layers_have_as_many_experts_as_they_are_told():
    model = with_preset("mola")
    sizes = [layer.mlp.up_proj.scope("default").router.num_experts for layer in model.layers]
    assert sizes == [2, 4]
    assert model.layers[0].mlp.up_proj.experts("default") == ["0", "1"]
    tr.lora.set_trainable(model, experts=["3"])
    assert not any(p.requires_grad for p in model.layers[0].mlp.up_proj.routed_B.parameters())
    with pytest.raises(ValueError, match="expected an expert with factors of its own in every"):
        tr.lora.force(model, "3")
    with pytest.raises(
        ValueError, match="add_expert: expected a mixture whose layers have the same"
    ):
        tr.lora.add_expert(model, "more")
    lora = tr.lora.collapse_to_lora(model, [0.1, 0.2, 0.3, 0.4])
    assert {f.A.shape[0] for name, f in lora.layers.items() if name.startswith("layers.0")} == {16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": "sum"}, "expected mix among"),
        (
            {"mix": "factors"},
            r"expected router_input among \['sequence', 'task'\] with mix='factors'",
        ),
        ({"mix": "block"}, r"expected router_scope among \['block'\] with mix='block'"),
        ({"mix": "ranks"}, r"expected router among \['RankRouter'\] with mix='ranks'"),
        ({"router": "RankRouter"}, "expected mix 'ranks' with router='RankRouter'"),
        ({"mix": "shared_a", "ranks": [1, 2]}, "that are the same for all experts"),
        ({"experts_per_layer": [2, 0]}, "expected experts_per_layer an integer >= 1, got 0"),
        ({"experts_per_layer": [2], "num_experts": 3}, "of which num_experts=3 is the largest"),
        (
            {"experts_per_layer": [2], "router_scope": "model"},
            "expected router_scope other than 'model' with experts_per_layer",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(options, message):
    with pytest.raises(ValueError, match=f"RoutedLoraConfig: .*{message}|{message}"):
        tr.lora.RoutedLoraConfig(target_modules=["0"], **options)


def test_a_layer_that_no_number_is_for_is_refused():
    with pytest.raises(ValueError, match=r"got 1 numbers, and none for layers\.1"):
        with_preset("mola", experts_per_layer=[2])
    with pytest.raises(ValueError, match="expected experts_per_layer for 'mola'"):
        tr.lora.lora_preset("mola")


@pytest.mark.parametrize("scope", ["module", "block"])
def test_a_router_may_look_at_token_ids_alone(scope):
    model = tiny_lm(torch.float64)
    config = tr.lora.RoutedLoraConfig(
        num_experts=4,
        target_modules=["up_proj"],
        router="HashRouter",
        router_arguments={"vocab_size": 20},
        router_scope=scope,
        init_lora_weights=False,
    )
    tr.lora.inject(model, config)
    model.double()
    layer, seen = model.layers[0].mlp.up_proj, []
    layer.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    ids, _ = batch()
    with pytest.raises(ValueError, match="HashRouter: expected token_ids, got none"):
        model(ids)
    tr.follow_inputs(model)
    model(ids)
    ((x, y),) = seen
    weights = F.one_hot(layer.scope("default").router.table[ids, 0], 4).double()
    assert_close(y.flatten(0, 1), by_loop(layer, x.flatten(0, 1), weights.flatten(0, 1)))


def test_mixtures_of_different_layers_are_active_together():
    model = with_preset("mixlora", train=False)
    options = {"num_experts": 1, "router": "SoftRouter", "init_lora_weights": False}
    config = tr.lora.RoutedLoraConfig(target_modules=["q_proj"], **options)
    tr.lora.inject(model, config, "attention")
    model.double()
    ids, mask = batch()
    results = []
    for names in ["attention", "default", ["attention", "default"], None]:
        tr.lora.set_mix(model, names)
        results.append(call(model, ids, mask))
    assert len({y.sum().item() for y in results}) == 4


# ---- LoRAs that exist ----------------------------------------------------------------------------


def folders(tmp_path, count=3, spread=5.0):
    """LoRAs of PEFT whose first singular values stand out."""
    found = {}
    for number in range(count):
        model = peft.get_peft_model(
            tiny_lm(), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"])
        )
        torch.manual_seed(10 + number)  # after the model, which has a seed of its own
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
                if "lora_A" in name:
                    parameter.data[0] *= spread
        model.save_pretrained(tmp_path / str(number))
        found[f"task{number}"] = tmp_path / str(number)
    return found


def test_arrow_is_that_of_peft(tmp_path):
    model = tiny_lm()
    tr.lora.from_adapters(model, folders(tmp_path, 4), **tr.lora.adapter_preset("arrow"))
    layer = model.layers[0].self_attn.q_proj
    names = layer.experts("default")
    config = SimpleNamespace(
        top_k=3, router_temperature=1.0, rng_seed=0, task_adapter_names=names, use_gks=False,
        gks_adapter_names=[],
    )  # fmt: skip
    factors = [
        {name: SimpleNamespace(weight=layer.factors("default", name)[i]) for name in names}
        for i in range(2)
    ]
    theirs = ArrowLoraLinearLayer(HIDDEN, config)
    theirs.build_prototypes(*factors)
    ours = layer.scope("default").router.prototypes
    cosine = F.cosine_similarity(ours, theirs.prototypes).abs()
    assert (cosine > 0.999).all()
    x = torch.randn(2, 5, HIDDEN)
    expected = theirs(x, *factors, nn.Identity(), layer.scaling["default"])
    assert_close(layer(x) - layer.base_layer(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("count", "arguments", "top_k"),
    [(2, None, 2), (4, None, 3), (4, {"score": "normalized"}, 2), (4, {"top_k": 1}, 1)],
)
def test_a_prototype_router_chooses_as_many_as_in_its_paper(count, arguments, top_k):
    names = [f"task{e}" for e in range(count)]
    config = tr.lora.RoutedLoraConfig(
        target_modules=["0"],
        expert_names=names,
        router="PrototypeRouter",
        router_arguments=arguments,
    )
    assert config.router_arguments["top_k"] == top_k
    assert tr.lora.RoutedLoraConfig.from_json(config.to_json()) == config


def test_a_prototype_is_the_first_singular_vector(tmp_path):
    model = tiny_lm()
    tr.lora.from_adapters(model, folders(tmp_path, spread=1.0), init="arrow")
    layer = model.layers[1].mlp.up_proj
    for e, expert in enumerate(layer.experts("default")):
        a, b = layer.factors("default", expert)
        expected = torch.linalg.svd((b @ a).double()).Vh[0]
        got = layer.scope("default").router.prototypes[e].double()
        assert_close((got @ expected).abs(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-5)
        assert got[got.abs().argmax()] > 0


def test_prototypes_follow_the_experts(tmp_path):
    model = tiny_lm()
    tr.lora.from_adapters(model, folders(tmp_path), init="arrow")
    tr.lora.add_expert(model, "new")
    layer = model.layers[0].self_attn.q_proj
    assert not layer.scope("default").router.prototypes[3].any()
    nn.init.normal_(layer.routed_B["default"].new.weight)
    tr.lora.arrow_prototypes(model)
    assert_close(layer.scope("default").router.prototypes.norm(dim=1), torch.ones(4))


def test_general_knowledge_is_subtracted(tmp_path):
    read = folders(tmp_path)
    model = tiny_lm()
    tr.lora.from_adapters(model, {"a": read["task0"]}, general=[read["task1"], read["task2"]])
    adapters = [tr.lora.read_peft_adapter(folder) for folder in read.values()]
    name = "layers.0.self_attn.q_proj"
    factors = [adapter.layers[name] for adapter in adapters]
    a, b = model.get_submodule(name).factors("default", "a")
    assert_close(a.detach(), factors[0].A - (factors[1].A + factors[2].A) / 2)
    assert_close(b.detach(), factors[0].B - (factors[1].B + factors[2].B) / 2)


def test_gates_that_were_trained_alone_choose_together(tmp_path):
    read = {}
    for number in range(3):
        model = tiny_lm()
        torch.manual_seed(number)
        config = tr.lora.RoutedLoraConfig(
            r=3, num_experts=1, target_modules=["q_proj"], router="TopKRouter",
            router_arguments={"top_k": 1, "score": "sigmoid", "renormalize": False},
            init_lora_weights=False,
        )  # fmt: skip
        tr.lora.inject(model, config)
        tr.lora.save_adapter(model, tmp_path / str(number))
        read[str(number)] = tmp_path / str(number)
        last = model
    mixed = tiny_lm()
    tr.lora.from_adapters(mixed, read, **tr.lora.adapter_preset("phatgoose"))
    layer, alone = mixed.layers[0].self_attn.q_proj, last.layers[0].self_attn.q_proj
    router = layer.scope("default").router
    assert_close(router.prototypes[2], alone.scope("default").router.weight[0].detach())
    assert all(
        torch.equal(*pair)
        for pair in zip(layer.factors("default", "2"), alone.factors("default", "0"))
    )
    x = torch.randn(4, HIDDEN)
    logits = F.layer_norm(x, (HIDDEN,)) @ F.layer_norm(router.prototypes, (HIDDEN,)).T / 4
    top = logits.topk(2)
    assert torch.equal(router(x).indices, top.indices)
    assert_close(router(x).weights, top.values.softmax(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "arrow", "router": "TopKRouter"}, "with init='arrow', got 'TopKRouter' and"),
        ({"init": "arrow", "router_scope": "block"}, "got 'PrototypeRouter' and 'block'"),
        ({"init": "gates"}, 'expected a gate of .* for init="gates", got None in'),
    ],
)
def test_a_beginning_that_does_not_fit_leaves_the_model_alone(tmp_path, options, message):
    model = tiny_lm()
    with pytest.raises(ValueError, match=f"from_adapters: .*{message}"):
        tr.lora.from_adapters(model, folders(tmp_path), **options)
    assert not any(isinstance(m, tr.lora.RoutedLoraLinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_mixture_of_several_experts_is_no_adapter(tmp_path):
    model = with_preset("molora", dtype=torch.float32)
    tr.lora.save_adapter(model, tmp_path)
    with pytest.raises(
        ValueError, match="from_adapters: expected a mixture with one expert, got 10"
    ):
        tr.lora.from_adapters(tiny_lm(), {"a": tmp_path})


def test_a_router_may_begin_with_zeros(tmp_path):
    model = tiny_lm()
    tr.lora.from_adapters(model, folders(tmp_path), router="SoftRouter", init="zeros")
    router = model.layers[0].self_attn.q_proj.scope("default").router
    assert_close(router(torch.randn(2, HIDDEN)).weights, torch.full((2, 3), 1 / 3))


def test_gates_come_from_samples(tmp_path):
    model = tiny_lm()
    tr.lora.from_adapters(model, folders(tmp_path, 2))
    tr.follow_inputs(model)
    layer = model.layers[0].self_attn.q_proj
    samples, seen = {}, {}
    for e, expert in enumerate(layer.experts("default")):
        ids, mask = batch(seed=e)
        samples[expert] = [{"input_ids": ids, "attention_mask": mask}]
        with torch.no_grad():
            x = model.layers[0].norm1(model.embed_tokens(ids))
        seen[expert] = x[mask.bool()].mean(0)
    tr.lora.gates_from_samples(model, samples)
    for row, mean in zip(layer.scope("default").router.weight, seen.values()):
        assert_close(row.detach(), mean / mean.norm())
    with pytest.raises(ValueError, match="gates_from_samples: expected samples for"):
        tr.lora.gates_from_samples(model, {"task0": []})


def test_a_mixture_collapses_to_the_mean_of_its_data():
    model = with_preset("molora", train=False, target_modules=["q_proj", "up_proj"])
    ids, mask = batch()
    data = [{"input_ids": ids, "attention_mask": mask}]
    lora = tr.lora.collapse_to_lora(model, "mean", data=data)
    tr.lora.bake_router(model, data)
    for name, layer in layers_of(model).items():
        weights = layer.scope("default").router.constant_weights.tolist()
        whole = sum(
            weight * layer.scaling["default"][e] * b @ a
            for e, weight in zip(layer.experts("default"), weights)
            for a, b in [layer.factors("default", e)]
        )
        assert_close(
            lora.layers[name].B @ lora.layers[name].A, whole.detach(), rtol=1e-5, atol=1e-5
        )


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("scope", ["module", "model"])
def test_the_last_hidden_state_of_a_first_pass_is_what_is_routed(scope):
    model = tiny_llama()
    config = tr.lora.RoutedLoraConfig(
        num_experts=3, target_modules=["q_proj", "up_proj"], router="SoftRouter",
        router_input="last_hidden", router_scope=scope, init_lora_weights=False,
    )  # fmt: skip
    ids = torch.arange(8).view(2, 4)
    expected = model.model(ids).last_hidden_state
    tr.lora.inject(model, config)
    with pytest.raises(RuntimeError, match=r'expected a first pass .* router_input="last_hidden"'):
        model(ids)
    tr.lora.two_passes(model)
    seen = []
    router = model.model.layers[0].self_attn.q_proj.scope("default").router
    router.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids)
    assert len(seen) == 1
    assert_close(seen[0], expected.detach())
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(
        model.generate(ids, use_cache=True, **options),
        model.generate(ids, use_cache=False, **options),
    )


def test_a_model_without_a_body_has_no_last_hidden_state():
    with pytest.raises(ValueError, match="expected a model of Transformers with a head"):
        linear(router="SoftRouter", router_input="last_hidden")


@pytest.mark.parametrize("name", ["mixlora", "hydralora", "poly", "flylora"])
def test_every_way_of_mixing_compiles_whole(name):
    model = with_preset(name, train=False)
    ids, mask = batch()
    expected = call(model, ids, mask)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(call(compiled, ids, mask), expected)


@pytest.mark.parametrize("name", ["mixlora", "hydralora", "poly", "flylora"])
@pytest.mark.parametrize("checkpoints", ["reentrant", "other"])
def test_checkpoints_change_no_gradient(name, checkpoints):
    grads = []
    for kind in None, checkpoints:
        model = with_preset(name)
        model.checkpoints = kind
        model.embed_tokens.weight.requires_grad_()
        ids, mask = batch()
        torch.manual_seed(5)
        attached = tr.attach(model)
        attached(loss_of(call(model, ids, mask), ids, mask)).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert_close(*grads)


@pytest.mark.parametrize("name", ["mixlora", "hydralora", "poly", "flylora"])
def test_a_model_in_half_precision_has_results_in_it(name):
    model = with_preset(name, dtype=torch.float32, train=False)
    ids, mask = batch()
    expected = call(model, ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(model, ids, mask)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), expected, atol=0.1, rtol=0.1)
    half = tiny_lm(torch.bfloat16)
    tr.lora.inject(half, tr.lora.lora_preset(name, **OPTIONS.get(name, {})))
    tr.follow_inputs(half)
    factors = [p for n, p in half.named_parameters() if ".routed_" in n]
    assert {p.dtype for p in factors} == {torch.float32}
    attached = tr.attach(half.train())
    attached(call(half, ids, mask).float().square().mean()).backward()
    assert all(p.grad is not None for p in factors if p.requires_grad)
