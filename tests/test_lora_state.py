"""Mixtures of LoRAs: what one call, copy or mixture leaves for the next one."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torch_routers as tr
from tiny_lm import batch, tiny_lm

pytest.importorskip("safetensors")


def injected(mix="default", model=None, **options):
    model = tiny_lm() if model is None else model
    options = {
        "r": 2,
        "num_experts": 3,
        "target_modules": ["q_proj", "up_proj"],
        "init_lora_weights": False,
        **options,
    }
    torch.manual_seed(1)
    tr.lora.inject(model, tr.lora.RoutedLoraConfig(**options), mix)
    for module in model.modules():
        if isinstance(module, tr.Router):
            module.weight.data.normal_()
    return model


def layers_of(model):
    return [x for x in model.modules() if isinstance(x, tr.lora.RoutedLoraLinear)]


LOSSES = [tr.losses.LoadBalanceLoss(1e-2)]


@pytest.mark.parametrize("scope", ["block", "layer", "model"])
def test_what_is_not_active_is_not_routed(scope):
    """A reference without experts, and a second mixture, must not bring losses of the first."""
    model = injected(router_scope=scope, losses=LOSSES)
    ids, mask = batch()
    with tr.collect(model) as routings, tr.lora.disable(model):
        model(ids, attention_mask=mask)
    assert len(routings) == 0
    injected("other", model)
    with tr.collect(model) as routings:
        model(ids, attention_mask=mask)
    assert {name.rpartition(".")[2] for name in routings.names} == {"other"}


@pytest.mark.parametrize("scope", ["module", "block", "layer", "model"])
@pytest.mark.parametrize("router_input", ["token", "first_pass"])
def test_a_model_is_copied_and_pickled_after_a_call(scope, router_input):
    """What the call left has a graph; and passes of the copy are its own."""
    model = injected(router_scope=scope, router_input=router_input)
    if router_input == "first_pass":
        tr.lora.two_passes(model)
    model(batch()[0])
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    ids = batch(seed=2)[0]
    for other in copies:
        torch.testing.assert_close(other(ids), model(ids), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["v1.0", "", "keys"])
def test_names_of_mixtures(name):
    model = tiny_lm()
    with pytest.raises(ValueError, match=r"inject: expected mix .*got"):
        injected(name, model)
    assert all(p.requires_grad for p in model.parameters())
    assert not layers_of(model)


def test_a_second_mixture_is_the_active_one_everywhere():
    model = injected()
    injected("other", model, target_modules=["q_proj"])
    assert {layer.active_mix for layer in layers_of(model)} == {"other", None}


@pytest.mark.parametrize("unload", [False, True])
def test_a_later_mixture_follows_the_inputs_too(unload):
    model = injected()
    tr.follow_inputs(model)
    if unload:
        tr.lora.unload(model)
    injected("other", model)
    ids, mask = batch()
    with tr.collect(model) as routings:
        model(ids, attention_mask=mask)
    assert all(r.counts.sum() == 2 * mask.sum() for r in routings)


def test_experts_of_adapters_come_and_go(tmp_path):
    model = injected(expert_names=["sql", "med", "law"], ranks=[2, 3, 4])
    folders = {name: tmp_path / name for name in ("sql", "med", "law")}
    for name, folder in folders.items():
        tr.lora.export_expert(model, name, folder)
    mixture = tiny_lm()
    tr.lora.from_adapters(mixture, folders)
    tr.lora.add_expert(mixture, "new", rank=5)
    tr.lora.remove_expert(mixture, "med")
    for layer in layers_of(mixture):
        ranks = {e: a.weight.shape[0] for e, a in layer.routed_A["default"].items()}
        assert ranks == {"sql": 2, "law": 4, "new": 5}
        assert layer.scaling["default"] == {"sql": 4.0, "law": 2.0, "new": 1.6}
    tr.lora.save_adapter(mixture, tmp_path / "mix")
    other = tiny_lm()
    tr.lora.load_adapter(other, tmp_path / "mix")
    assert torch.equal(other(batch()[0]), mixture(batch()[0]))


def test_experts_are_named_in_a_list_and_known():
    model = injected()
    with pytest.raises(ValueError, match="set_trainable: expected a list of experts, got '12'"):
        tr.lora.set_trainable(model, experts="12")
    with pytest.raises(ValueError, match="expert_parameters: expected a list of experts, got '1'"):
        tr.lora.expert_parameters(model, "1")
    with pytest.raises(ValueError, match=r"expert_parameters: expected an expert among .*got 'no'"):
        tr.lora.expert_parameters(model, ["no"])


def test_the_mode_of_a_router_is_saved(tmp_path):
    """It is an attribute that training changes."""
    model = injected(router="SoftRouter", router_arguments={"top_k": 1})
    for layer in layers_of(model):
        layer.routed_gate["default"].mode = "soft_topk"
    tr.lora.save_adapter(model, tmp_path)
    other = tiny_lm()
    tr.lora.load_adapter(other, tmp_path)
    assert torch.equal(other(batch()[0]), model(batch()[0]))
    layers_of(model)[0].routed_gate["default"].mode = "soft"
    with pytest.raises(ValueError, match=r"expected one mode for all routers, got .*soft_topk"):
        tr.lora.save_adapter(model, tmp_path)


def test_routers_with_other_arguments_are_other_routers(tmp_path):
    tr.lora.save_adapter(injected(router_arguments={"top_k": 1}), tmp_path)
    with pytest.raises(ValueError, match=r"expected router_arguments .*'top_k': 2.*got .*: 1"):
        tr.lora.load_adapter(injected(), tmp_path)


def test_a_root_that_has_no_configuration_is_named(tmp_path):
    wrapped = nn.Sequential(injected())
    with pytest.raises(ValueError, match=r"save_adapter: expected the model .*got Sequential"):
        tr.lora.save_adapter(wrapped, tmp_path)
    with pytest.raises(ValueError, match=r"add_expert: expected the model .*got Sequential"):
        tr.lora.add_expert(wrapped, "new")


def test_losses_need_no_destination_where_nothing_is_trained():
    model = injected(losses=LOSSES)
    tr.lora.check_reach(model, batch()[0])
    tr.lora.bake_router(model, [(batch()[0],)])
    tr.lora.bake_router(model, [(batch()[0],)])  # one without parameters


def test_all_linear_means_linear_layers_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
    config = tr.lora.RoutedLoraConfig(target_modules="all-linear")
    assert tr.lora.match_modules(model, config).matched == ["0", "1.1"]


class Pooled(nn.Module):
    """Its last layer sees one row for each sample, as a pooler does."""

    def __init__(self):
        super().__init__()
        self.embed, self.dense, self.pooler = (
            nn.Embedding(20, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 4),
        )

    def forward(self, input_ids, attention_mask=None):
        return self.pooler(self.dense(self.embed(input_ids))[:, 0])


def test_a_layer_that_sees_other_tokens_than_the_mask_is_named():
    model = injected(model=Pooled(), target_modules="all-linear")
    tr.follow_inputs(model)
    ids, mask = batch()
    with pytest.raises(ValueError, match=r"lora: expected pooler .*\[3, 6\], got \[3\]. .*exclude"):
        model(ids, attention_mask=mask)


def test_a_base_of_four_bits_is_trained_around(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 32)
    base = bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    base.load_state_dict(plain.state_dict())
    model = nn.Sequential(base, nn.Linear(32, 8)).to("cpu")  # which is when weights become bits
    assert model[0].weight.dtype == torch.uint8
    bits, x = model[0].weight.clone(), torch.randn(9, 64)
    before = model(x)
    config = tr.lora.RoutedLoraConfig(r=4, num_experts=3, target_modules=["0"])
    tr.lora.inject(model, config)
    assert torch.equal(model(x), before)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(20):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == torch.float32 and p.grad is not None for p in trained)
    assert torch.equal(model[0].base_layer.weight, bits)
    with tr.lora.disable(model):
        assert torch.equal(model(x), before)
    message = "expected a layer with a weight of floating"
    with tr.lora.force(model, "1"), pytest.raises(tr.lora.MergeError, match=message):
        tr.lora.merge(model)
