"""Mixtures of LoRAs as a method of PEFT."""

import copy
import importlib
import inspect
import json
import pickle
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import torch_routers as tr

pytest.importorskip("peft", "0.21")
pytest.importorskip("transformers")

import peft
import peft.functional
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tiny_lm import batch, loss_of, tiny_lm
from torch_routers.integrations import peft as bridge
from torch_routers.integrations.peft import ROUTED_LORA, RoutedLoraPeftConfig
from torch_routers.integrations.transformers import attach_to_loss
from torch_routers.lora.inject import layers_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
IDS = torch.randint(1, 20, (3, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 6, [0] + [1] * 5, [0] * 2 + [1] * 4])


def config(**options):
    options = {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "expert_names": ["sql", "med", "law"],
        "ranks": [2, 3, 4],
        "lora_alpha": 8,
        "init_lora_weights": False,
        "router_arguments": {"top_k": 2},
        **options,
    }
    return RoutedLoraPeftConfig(**options)


def hugging_face(kind, **options):
    """A model of Transformers with the names of `tiny_lm`."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 20, "pad_token_id": 0}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.LlamaConfig(**sizes, **heads, **options))


#: Base models by the type of task; None is a plain module of torch.
BASES = {
    None: tiny_lm,
    "CAUSAL_LM": lambda: hugging_face("LlamaForCausalLM"),
    "SEQ_CLS": lambda: hugging_face("LlamaForSequenceClassification", num_labels=3),
    "TOKEN_CLS": lambda: hugging_face("LlamaForTokenClassification", num_labels=3),
}
#: Options that go with them, so that all scopes are seen.
OPTIONS = {
    None: {"router_scope": "model", "modules_to_save": ["lm_head"]},
    "CAUSAL_LM": {
        "router_scope": "block",
        "router_arguments": {"top_k": 2, "selection_bias": True},
    },
    "SEQ_CLS": {"router_scope": "layer", "router": "SoftRouter", "router_arguments": {}},
    "TOKEN_CLS": {"router_scope": "module", "use_rslora": True},
}


def adapted(task_type=None, adapter="default", seed=1, base=None, **options):
    """A PeftModel whose experts, routers and heads are not what they were."""
    model = BASES[task_type]() if base is None else base
    torch.manual_seed(seed)
    model = get_peft_model(model, config(task_type=task_type, **options), adapter)
    disturb(model, adapter)
    return model.eval()


def disturb(model, adapter="default"):
    for name, value in model.state_dict().items():
        ends = (f"routed_gate.{adapter}.weight", f"routed_gate.{adapter}.expert_bias")
        if name.endswith(ends) or f"modules_to_save.{adapter}." in name:
            value.normal_(std=0.5)


def logits(model, **inputs):
    with torch.no_grad():
        result = model.eval()(input_ids=IDS, attention_mask=MASK, **inputs)
    return result if isinstance(result, torch.Tensor) else result.logits


def same(model, other):
    return torch.equal(logits(model), logits(other))


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ---- the method and its configuration ------------------------------------------------------------


def test_the_name_is_a_plain_string_that_prints_as_a_type_of_peft():
    for name in ROUTED_LORA, copy.deepcopy(ROUTED_LORA), pickle.loads(pickle.dumps(ROUTED_LORA)):
        assert name == "ROUTED_LORA" and {name: 1} == {"ROUTED_LORA": 1}
        assert json.dumps(name) == '"ROUTED_LORA"' and str(name) == "PeftType.ROUTED_LORA"
        assert name.value == "ROUTED_LORA" and type(name.value) is str
    assert adapted().get_model_status().peft_types == {"default": "ROUTED_LORA"}


def test_the_configuration_is_that_of_tr_lora():
    ours = tr.lora.RoutedLoraConfig()
    assert RoutedLoraPeftConfig().routed() == ours
    options = {
        "losses": [tr.losses.ZLoss(1e-3)],
        "router": tr.SoftRouter,
        "mode": "soft_topk",
        "router_arguments": {"top_k": 2},
        "rank_pattern": {"q_proj": [1, 2, 3, 4]},
        "target_modules": {"b", "a"},
        "task_type": "CAUSAL_LM",
    }
    theirs = RoutedLoraPeftConfig(**options)
    assert theirs.routed() == tr.lora.RoutedLoraConfig(**options)
    for field in fields(ours):
        assert getattr(theirs, field.name) == getattr(theirs.routed(), field.name)


def test_the_configuration_comes_back_from_its_file(tmp_path):
    saved = config(losses=[tr.losses.LoadBalanceLoss(0.1)], router="SoftRouter", mode="soft")
    saved.save_pretrained(tmp_path)
    for kind in RoutedLoraPeftConfig, peft.PeftConfig:
        loaded = kind.from_pretrained(tmp_path)
        assert loaded == saved and type(loaded) is RoutedLoraPeftConfig
    values = json.loads((tmp_path / CONFIG).read_text())
    assert peft.get_peft_config(dict(values)) == saved
    (tmp_path / CONFIG).write_text(json.dumps(values | {"colour": "blue"}))
    with pytest.warns(UserWarning, match="colour"):
        assert RoutedLoraPeftConfig.from_pretrained(tmp_path) == saved


def test_values_that_do_not_fit_are_those_of_tr_lora():
    with pytest.raises(ValueError, match="RoutedLoraConfig: expected router_scope among"):
        config(router_scope="galaxy")
    with pytest.raises(ValueError, match="task type"):
        config(task_type="SINGING")


def test_models_that_peft_knows_have_default_targets():
    model = get_peft_model(BASES["CAUSAL_LM"](), config(target_modules=None, task_type="CAUSAL_LM"))
    ends = {name.rpartition(".")[2] for name in layers_of(model)}
    assert ends == {"q_proj", "v_proj"}
    assert [PREFIX + name for name in model.targeted_module_names] == list(layers_of(model))
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(tiny_lm(), config(target_modules=None))


def test_a_wrapped_model_does_what_it_did():
    model = get_peft_model(tiny_lm(), config(init_lora_weights=True))
    assert same(model, tiny_lm())
    assert not same(adapted(), tiny_lm())


def test_parameters_are_printed_as_by_tr_lora(capsys):
    model = adapted()
    model.print_trainable_parameters()
    theirs = capsys.readouterr().out
    tr.lora.print_trainable_parameters(model)
    ours = capsys.readouterr().out
    assert ours.startswith(theirs) and theirs.startswith("trainable params: ")


# ---- files ---------------------------------------------------------------------------------------

LOADING = """
import sys, torch
sys.path[:0] = [{tests!r}]
import test_peft as t
for task_type, make in t.BASES.items():
    model = t.PeftModel.from_pretrained(make(), f"{folder}/{{task_type}}")
    torch.save(t.logits(model), f"{folder}/{{task_type}}/logits")
"""


def test_another_process_loads_what_this_one_saved(tmp_path):
    expected = {}
    for task_type in BASES:
        model = adapted(task_type, **OPTIONS[task_type])
        expected[task_type] = logits(model)
        assert not torch.equal(expected[task_type], logits(BASES[task_type]()))
        model.save_pretrained(tmp_path / str(task_type))
    code = LOADING.format(tests=str(Path(__file__).parent), folder=tmp_path)
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=300)
    for task_type, value in expected.items():
        assert torch.equal(torch.load(tmp_path / str(task_type) / "logits"), value), task_type


@pytest.mark.parametrize("task_type", BASES)
def test_either_side_loads_the_folder_of_the_other(task_type, tmp_path):
    model = adapted(task_type, **OPTIONS[task_type])
    model.save_pretrained(tmp_path / "theirs")
    plain = BASES[task_type]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as of fields that are not known
        loaded = tr.lora.load_adapter(plain, tmp_path / "theirs")
    assert same(plain, model) and loaded.experts() == ["sql", "med", "law"]
    tr.lora.save_adapter(plain, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in ours)
    tr.lora.save_adapter(model, tmp_path / "direct")
    direct = load_file(tmp_path / "direct" / WEIGHTS)
    assert theirs.keys() == direct.keys() and all(torch.equal(direct[k], ours[k]) for k in ours)
    values, of_peft = (
        json.loads((tmp_path / name / CONFIG).read_text()) for name in ("ours", "theirs")
    )
    assert all(of_peft[name] == value for name, value in values.items())
    for folder in "ours", "direct":
        assert same(PeftModel.from_pretrained(BASES[task_type](), tmp_path / folder), model)


def test_functions_of_tr_lora_take_the_peft_model(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    tr.lora.save_adapter(model, tmp_path / "ours")
    assert same(PeftModel.from_pretrained(tiny_lm(), tmp_path / "ours"), model)
    other = adapted(modules_to_save=["lm_head"], seed=2)
    tr.lora.load_adapter(other, tmp_path / "ours")
    assert same(other, model)
    tr.lora.add_expert(model, "art", rank=5)
    tr.lora.remove_expert(model, "med")
    tr.lora.bake_router(model, [{"input_ids": IDS, "attention_mask": MASK}])
    model.save_pretrained(tmp_path / "changed")
    loaded = PeftModel.from_pretrained(tiny_lm(), tmp_path / "changed")
    assert same(loaded, model)
    assert loaded.peft_config["default"].expert_names == ["sql", "law", "art"]
    assert loaded.peft_config["default"].router == "ConstantRouter"
    assert model.get_base_model().routed_lora["default"].experts() == ["sql", "law", "art"]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapters_change_their_names(low_cpu_mem_usage, tmp_path):
    model = adapted("CAUSAL_LM", "first", **OPTIONS["CAUSAL_LM"])
    model.add_adapter("second", config(ranks=None, r=2))
    disturb(model, "second")
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"first", "second"}
    other = adapted("CAUSAL_LM", "second", seed=5, **OPTIONS["CAUSAL_LM"])
    for name in "first", "second":
        options = {"low_cpu_mem_usage": low_cpu_mem_usage}
        other.load_adapter(tmp_path / name, f"my {name}", **options)
        model.set_adapter(name)
        other.set_adapter(f"my {name}")
        assert same(model, other)
        factor = next(iter(layers_of(other).values())).routed_A[f"my {name}"]["sql"].weight
        assert not factor.is_meta


def test_keys_are_those_of_the_adapter_alone(tmp_path):
    model = adapted()
    model.add_adapter("other", config(expert_names=["a", "b", "c"]))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    for key, value in load_file(tmp_path / WEIGHTS).items():
        name, _, rest = key.removeprefix(PREFIX).partition(".routed_")
        kind, _, rest = rest.partition(".")
        own = getattr(model.get_base_model().get_submodule(name), f"routed_{kind}")["default"]
        assert torch.equal(own.state_dict()[rest], value)


def test_adapters_are_made_without_memory():
    model = adapted()
    model.add_adapter("second", config(), low_cpu_mem_usage=True)
    made = {n: p for n, p in model.named_parameters() if ".routed_" in n}
    assert all(p.is_meta == (".second." in name) for name, p in made.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(k for k in t if "routed_gate" in k)), "missing ones, .*routed_gate"),
        (lambda t: t.pop(next(k for k in t if "routed_A.med" in k)), "missing ones, .*routed_A"),
        (lambda t: t.update({PREFIX + "layers.0.routed_B.x.weight": torch.zeros(1)}),
         "unknown ones, .*layers.0.routed_B.x.weight"),
    ],
    ids=["router", "expert", "unknown"],
)  # fmt: skip
def test_files_have_all_keys_and_no_other(change, message, tmp_path):
    adapted().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"load_adapter: expected the keys .*{message}"):
        PeftModel.from_pretrained(tiny_lm(), tmp_path)


@pytest.mark.parametrize("autocast", [False, True])
def test_experts_of_a_half_precision_model_are_float32(autocast, tmp_path):
    options = {"autocast_adapter_dtype": autocast}
    model = get_peft_model(tiny_lm(torch.bfloat16), config(), **options)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_lm(torch.bfloat16), tmp_path, low_cpu_mem_usage=True, **options
    )
    for x in model, loaded:
        dtypes = {p.dtype for name, p in x.named_parameters() if ".routed_" in name}
        assert dtypes == {torch.float32} and logits(x).dtype == torch.bfloat16
    assert same(model, loaded)


@pytest.mark.parametrize("name", tr.lora.list_lora_presets())
def test_every_preset_is_saved_loaded_and_frozen(name, tmp_path):
    options = {
        "mola": {"experts_per_layer": [2, 4]},
        "hydralora": {"target_modules": ["q_proj", "up_proj", "down_proj"]},
    }.get(name, {})
    preset = tr.lora.lora_preset(name, init_lora_weights=False, **options)
    if preset.num_tasks is not None or name == "poly":
        options["num_tasks"] = 3
    mixture = RoutedLoraPeftConfig.from_routed(preset, **options)
    torch.manual_seed(1)
    model = get_peft_model(tiny_lm(), mixture)
    disturb(model)
    tr.follow_inputs(model)
    inputs = {"routing_task_ids": torch.tensor([0, 2, 1])}
    expected, everything = logits(model, **inputs), trained(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_lm(), tmp_path, is_trainable=True)
    tr.follow_inputs(loaded)
    assert torch.equal(logits(loaded, **inputs), expected)
    assert everything == {n for n, _ in model.named_parameters() if ".routed_" in n}
    assert trained(loaded) == everything
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, **inputs), logits(tiny_lm()))
    for experts, router in (False, True), (True, False), (False, False):
        tr.lora.set_trainable(model, experts=experts, router=router)
        left = trained(model)
        kinds = ("A", "B") * experts + ("gate", "tasks") * router
        assert left == {n for n in everything if any(f".routed_{kind}." in n for kind in kinds)}
        model.add_adapter("other", mixture)
        model.set_adapter("other")
        model.set_adapter("default")
        model.save_pretrained(tmp_path, selected_adapters=["default"])
        model.delete_adapter("other")
        again = PeftModel.from_pretrained(tiny_lm(), tmp_path, is_trainable=True)
        assert trained(again) == left == trained(model)


# ---- several adapters ----------------------------------------------------------------------------


def two_adapters(**options):
    """One with the embedding of the other's seed, so that each can be had alone."""
    model = adapted(**{"adapter": "first", **options})
    torch.manual_seed(2)
    model.add_adapter("second", config(target_modules=["k_proj", "q_proj"], expert_names=["a", "b"],
                                       ranks=[3, 3]))  # fmt: skip
    disturb(model, "second")
    return model


def test_one_of_several_adapters_is_active():
    model, alone = two_adapters(), adapted(adapter="first")
    assert model.active_adapters == ["first"] and same(model, alone)
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(first, second)
    status = model.get_model_status()
    assert status.active_adapters == ["second"] and status.num_adapter_layers == 8
    model.set_adapter("first")
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match=r"one adapter of each layer, got \['first', 'second'\]"):
        model.base_model.set_adapter(["first", "second"])


def test_adapters_of_different_layers_are_active_together():
    model = adapted(adapter="first", target_modules=["q_proj"])
    model.add_adapter("second", config(target_modules=["up_proj"]))
    model.base_model.set_adapter(["first", "second"])
    assert {layer.active_mix for layer in layers_of(model).values()} == {"first", "second"}
    assert trained(model) == {n for n, _ in model.named_parameters() if ".routed_" in n}
    both = logits(model)
    for name in "first", "second":
        model.set_adapter(name)
        assert not torch.equal(logits(model), both)


def test_deleted_adapters_are_gone():
    options = {"adapter": "first", "modules_to_save": ["lm_head"]}
    model, alone = two_adapters(**options), adapted(**options)
    model.delete_adapter("second")
    assert same(model, alone) and list(model.peft_config) == ["first"]
    assert len(layers_of(model)) == 6  # k_proj is what it was
    assert not any("second" in name for name in model.state_dict())
    model.add_adapter("second", config(r=2, ranks=None))
    with pytest.warns(UserWarning, match="'second' is active now"):
        model.delete_adapter("first")
    assert model.active_adapters == ["second"] and model.active_adapter == "second"
    assert not any("first" in name for name in model.state_dict())
    assert trained(model) == {n for n, _ in model.named_parameters() if ".second." in n}
    model.delete_adapter("second")
    assert same(model.base_model.model, tiny_lm())
    with pytest.raises(ValueError, match="Adapter second does not exist"):
        model.delete_adapter("second")


def test_an_adapter_has_nothing_of_a_deleted_one_of_its_name():
    model = two_adapters()
    tr.lora.set_trainable(model, experts=["a"], router=False, mix="second")
    model.delete_adapter("second")
    model.add_adapter("second", config(expert_names=["a", "b"], ranks=[3, 3]))
    assert trained(model) == {n for n, _ in model.named_parameters() if ".first." in n}
    model.set_adapter("second")
    assert trained(model) == {n for n, _ in model.named_parameters() if ".second." in n}


@pytest.mark.parametrize("task_type", BASES)
def test_disabled_adapters_leave_the_base_model_to_the_bit(task_type):
    losses = [tr.losses.LoadBalanceLoss(0.1)]
    model = adapted(task_type, **OPTIONS[task_type], losses=losses)
    before, parameters = logits(model), trained(model)
    with model.disable_adapter():
        model.train()
        assert torch.equal(logits(model), logits(BASES[task_type]()))
        assert model.get_model_status().enabled is False
        model.set_adapter("default")
        assert torch.equal(logits(model), logits(BASES[task_type]()))
    assert torch.equal(logits(model), before) and trained(model) == parameters


def test_names_of_adapters_are_not_those_of_experts(tmp_path):
    with pytest.raises(
        ValueError, match=r"expected adapters and experts of different .* \['sql'\]"
    ):
        adapted(adapter="sql")
    model = adapted(adapter="first")
    with pytest.raises(ValueError, match=r"different names, got \['first'\]"):
        model.add_adapter("second", config(expert_names=["first", "x", "y"]))
    assert list(model.peft_config) == ["first"] and same(model, adapted(adapter="first"))
    model.add_adapter("second", config())
    tr.lora.add_expert(model, "second", "first")
    with pytest.raises(ValueError, match=r"different names, got \['second'\]"):
        model.save_pretrained(tmp_path)


def test_rows_of_a_batch_have_the_same_adapter():
    with pytest.raises(ValueError, match=r"expected no adapter_names, got \['default'\]"):
        adapted()(IDS, adapter_names=["default"])


def test_mixtures_without_peft_are_not_mixed_with_those_of_peft():
    model = tiny_lm()
    tr.lora.inject(model, tr.lora.RoutedLoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"without mixtures of lora.inject, got \['default'\]"):
        get_peft_model(model, config())
    assert list(model.routed_lora) == ["default"]


def test_models_are_copied_and_pickled():
    model = adapted("CAUSAL_LM", **OPTIONS["CAUSAL_LM"])
    for other in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert same(model, other)
        disturb(other)
        assert not same(model, other)


# ---- what is trained -----------------------------------------------------------------------------


def test_the_active_adapter_is_trained_and_nothing_else():
    model = two_adapters(modules_to_save=["lm_head"])
    for name in "first", "second", "first":
        model.set_adapter(name)
        assert trained(model) == {n for n, _ in model.named_parameters() if f".{name}." in n}
    model.set_adapter("first", inference_mode=True)
    assert not trained(model)


def frozen_but_for_law(model, mix="default"):
    tr.lora.set_trainable(model, experts=["law"], router=False, mix=mix)
    return {
        name
        for name, _ in model.named_parameters()
        if f".{mix}.law." in name or f"modules_to_save.{mix}" in name
    }


DETOURS = {
    "set_adapter": lambda m, _: m.set_adapter("default"),
    "inference and back": lambda m, _: (
        m.set_adapter("default", inference_mode=True), m.set_adapter("default")),
    "another adapter and back": lambda m, _: (
        m.add_adapter("b", config()), m.set_adapter("b"), m.set_adapter("default")),
    "another adapter that goes": lambda m, _: (
        m.add_adapter("b", config()), m.set_adapter("b"), m.delete_adapter("b")),
    "disabled and enabled": lambda m, _: (m.disable_adapter_layers(), m.enable_adapter_layers()),
    "set_requires_grad": lambda m, _: (
        m.set_requires_grad("default", False), m.set_requires_grad("default")),
    "load": lambda m, folder: (
        m.save_pretrained(folder), m.load_adapter(folder, "default", is_trainable=True)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:delete_adapter")
@pytest.mark.parametrize("detour", DETOURS)
def test_frozen_experts_stay_frozen(detour, tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    expected = frozen_but_for_law(model)
    assert trained(model) == expected
    DETOURS[detour](model, tmp_path)
    assert trained(model) == expected
    before = {name: p.clone() for name, p in model.named_parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    ids, mask = batch()
    loss_of(model(ids, mask), ids, mask).backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == expected


def test_what_was_frozen_is_frozen_after_loading(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    expected = frozen_but_for_law(model)
    model.save_pretrained(tmp_path / "theirs")
    tr.lora.save_adapter(model, tmp_path / "ours")
    for folder in "theirs", "ours":
        other = PeftModel.from_pretrained(tiny_lm(), tmp_path / folder, is_trainable=True)
        assert trained(other) == expected
        idle = PeftModel.from_pretrained(tiny_lm(), tmp_path / folder)
        assert not trained(idle)
        idle.save_pretrained(tmp_path / "again")
        saved = json.loads((tmp_path / "again" / CONFIG).read_text())
        assert saved["frozen"] == {"experts": ["sql", "med"], "router": True}
        idle.set_adapter("default")
        assert trained(idle) == expected
        plain = tiny_lm()
        tr.lora.load_adapter(plain, tmp_path / folder)
        names = {name for name in trained(plain) if "lm_head" not in name}
        assert {PREFIX + name for name in names} == {n for n in expected if "lm_head" not in n}


def test_what_is_trained_is_said_of_an_adapter_that_is_not_active():
    model = adapted(adapter="first", modules_to_save=["lm_head"])
    before = trained(model)
    model.add_adapter("second", config())
    assert trained(model) == before
    expected = frozen_but_for_law(model, "second")
    assert trained(model) == before
    model.set_adapter("second")
    assert trained(model) == expected


def test_what_is_trained_is_said_of_an_adapter_for_inference(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_lm(), tmp_path)
    assert trained(model) == set() != frozen_but_for_law(model) == trained(model)


# ---- merging -------------------------------------------------------------------------------------


def test_routing_that_depends_on_the_input_is_not_merged():
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for merge in model.merge_and_unload, model.merge_adapter:
        with pytest.raises(tr.lora.MergeError, match="merge"):
            merge()
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in after)


@pytest.mark.parametrize("constant", ["forced", "one expert", "baked"])
def test_constant_routing_is_merged(constant):
    options = {"expert_names": ["sql"], "ranks": [2], "router_arguments": {"top_k": 1}}
    model = adapted(modules_to_save=["lm_head"], **(options if constant == "one expert" else {}))
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    if constant == "baked":
        tr.lora.bake_router(model, [inputs])
    if constant == "forced":
        with tr.lora.force(model, "med"):
            expected, merged = logits(model), model.merge_and_unload()
    else:
        expected, merged = logits(model), model.merge_and_unload(safe_merge=True)
    assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert list(merged.state_dict()) == list(tiny_lm().state_dict())
    assert not hasattr(merged, "peft_config")


def test_one_adapter_is_merged():
    model = two_adapters()
    with pytest.raises(ValueError, match="merge_and_unload: expected one adapter, got"):
        model.merge_and_unload(adapter_names=["first", "second"])


def test_an_unloaded_model_is_the_base_model():
    model = two_adapters(router_scope="block", losses=[tr.losses.LoadBalanceLoss(0.1)])
    base = model.unload()
    assert type(base) is type(tiny_lm()) and same(base, tiny_lm())
    assert list(base.state_dict()) == list(tiny_lm().state_dict())
    assert same(adapted(adapter="first", base=base), adapted(adapter="first"))


# ---- without a PeftModel -------------------------------------------------------------------------


def test_adapters_are_injected_into_a_model():
    model, other = BASES["CAUSAL_LM"]().eval(), BASES["CAUSAL_LM"]().eval()
    torch.manual_seed(1)
    peft.inject_adapter_in_model(config(), model, "first")
    disturb(model, "first")
    first = logits(model)
    peft.inject_adapter_in_model(config(), model, "second")
    assert not torch.equal(logits(model), first)
    peft.functional.set_adapter(model, "first")
    assert torch.equal(logits(model), first)
    state = peft.get_peft_model_state_dict(model, adapter_name="first")
    peft.inject_adapter_in_model(config(), other, "mine")
    for prefix in "", PREFIX:
        disturb(other, "mine")
        keyed = {prefix + key: value for key, value in state.items()}
        result = peft.set_peft_model_state_dict(other, keyed, adapter_name="mine")
        assert not result.unexpected_keys and torch.equal(logits(other), first)


def test_keys_of_a_state_say_which_layers_get_experts():
    model = tiny_lm()
    key = "layers.1.mlp.up_proj.routed_A.sql.weight"
    options = {"target_modules": "all-linear", "exclude_modules": ["up_proj"]}
    for name, prefix in ("first", ""), ("second", PREFIX):
        state = {prefix + key: torch.zeros(1)}
        peft.inject_adapter_in_model(config(**options), model, name, state_dict=state)
        assert list(layers_of(model, name)) == ["layers.1.mlp.up_proj"]


def test_functions_of_peft_delete_adapters_layer_by_layer():
    model = tiny_lm()
    peft.inject_adapter_in_model(config(router_scope="block"), model, "first")
    peft.inject_adapter_in_model(config(router_scope="block"), model, "second")
    for name in "second", "first":
        peft.functional.delete_adapter(model, name, "routed_")
    assert same(model, tiny_lm())
    assert not any(module._forward_pre_hooks for module in model.modules())
    peft.inject_adapter_in_model(config(), model, "first")
    assert list(layers_of(model, "first")) and not same(model, tiny_lm())


# ---- inputs, losses, training --------------------------------------------------------------------


@pytest.mark.parametrize("task_type", BASES)
def test_tasks_of_a_call_reach_the_routers(task_type):
    options = {**OPTIONS[task_type], "router_input": "task", "num_tasks": 3}
    model = adapted(task_type, **options)
    tr.follow_inputs(model)
    seen = []
    for router in (m for m in model.modules() if isinstance(m, tr.Router)):
        router.register_forward_pre_hook(
            lambda module, args: seen.append(module.with_followed(args[0], {})["task_ids"])
        )
    tasks = torch.tensor([2, 0, 1])
    first = logits(model, routing_task_ids=tasks)
    assert seen and all(torch.equal(x, tasks[:, None].expand(3, 6)) for x in seen)
    other = logits(model, routing_task_ids=tasks[[0, 2, 1]])
    assert torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


def test_padding_reaches_the_routers_of_later_adapters_and_of_generation():
    model = adapted("CAUSAL_LM", adapter="first")
    tr.follow_inputs(model)
    model.add_adapter("second", config())
    for name in "first", "second":
        model.set_adapter(name)
        with tr.collect(model) as routings:
            model(IDS, MASK)
        assert len(routings) == 6
        assert all((routing.weights[MASK == 0] == 0).all() for routing in routings)
        options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
        with tr.collect(model) as routings:
            model.generate(input_ids=IDS, attention_mask=MASK, **options)
        prefills = [r for r in routings if r.weights.shape[:2] == IDS.shape]
        assert len(prefills) == 6
        assert all((routing.weights[MASK == 0] == 0).all() for routing in prefills)


def test_positional_inputs_reach_the_routers():
    model = adapted()
    tr.follow_inputs(model)
    with tr.collect(model) as routings:
        model(IDS, MASK)
    assert all((routing.weights[MASK == 0] == 0).all() for routing in routings)


ROWS = [{"input_ids": row, "labels": row, "attention_mask": m} for row, m in zip(IDS, MASK)] * 2


def trainer_of(model, folder, **options):
    """The stock Trainer of Transformers."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=7,
        **{"save_strategy": "no", "max_steps": 1, "weight_decay": 0.1, **options},
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=ROWS)


def test_the_stock_trainer_saves_and_resumes_the_adapter_alone(tmp_path):
    def model(seed=1):
        model = adapted("CAUSAL_LM", seed=seed, **OPTIONS["CAUSAL_LM"])
        frozen_but_for_law(model)
        return model.train()

    whole, resumed = model(), model(seed=2)
    before = {name: p.clone() for name, p in whole.named_parameters()}
    trainer_of(whole, tmp_path, save_strategy="steps", save_steps=2, max_steps=4).train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {WEIGHTS, CONFIG, "optimizer.pt"} <= names
    assert not any(name.startswith(("model", "pytorch_model")) for name in names)
    keys = load_file(tmp_path / "checkpoint-2" / WEIGHTS)
    assert all(".routed_" in key for key in keys)
    changed = {n for n, p in whole.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {name for name in before if ".default.law." in name}
    trainer = trainer_of(resumed, tmp_path / "again", max_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    state = resumed.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())


@pytest.mark.transformers
def test_the_stock_trainer_delivers_attached_losses(tmp_path):
    """Experts that add nothing yet give routers no gradient: what moves them is the loss."""
    moved = {}
    for weight in None, 0.1:
        losses = [] if weight is None else [tr.losses.LoadBalanceLoss(weight)]
        model = adapted("CAUSAL_LM", init_lora_weights=True, losses=losses)
        gates = {n: p for n, p in model.named_parameters() if "routed_gate" in n}
        before = {name: p.clone() for name, p in gates.items()}
        options = {"weight_decay": 0.0, "gradient_checkpointing": True}
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}  # not so in 4
        trainer = trainer_of(model, tmp_path, **options)
        attached = attach_to_loss(model) if losses else None
        trainer.train()
        moved[weight] = [not torch.equal(gates[name], before[name]) for name in gates]
    assert len(moved[0.1]) == 6 and all(moved[0.1]) and not any(moved[None])
    assert not attached.scale.isnan()


# ---- quantised models ----------------------------------------------------------------------------


class Opaque(nn.Module):
    """A linear layer whose weight is not one: eight bits, and a scale for each row."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        packed = (linear.weight.detach() / scale).round().to(torch.int8)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.added = None if linear.bias is None else nn.Parameter(linear.bias.detach())

    def forward(self, x):
        return nn.functional.linear(x, self.packed * self.scale, self.added)


def quantised(model):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name.endswith("_proj"):
                setattr(module, name, Opaque(child))
    return model


def test_layers_without_a_weight_are_adapted_trained_and_saved(tmp_path):
    model = adapted(base=quantised(tiny_lm()))
    packed = [p.clone() for n, p in model.named_parameters() if n.endswith("packed")]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    ids, mask = batch()
    before = logits(model)
    loss_of(model.train()(ids, mask), ids, mask).backward()
    optimizer.step()
    assert not torch.equal(logits(model), before)
    assert all(map(torch.equal, packed, [p for n, p in model.named_parameters() if "packed" in n]))
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in False, True:
        base = quantised(tiny_lm())
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert same(loaded, model)
    with tr.lora.force(model, "sql"), pytest.raises(tr.lora.MergeError, match="Opaque"):
        model.merge_and_unload()
    assert same(model.unload(), quantised(tiny_lm()))


def test_the_trainer_takes_a_quantised_model_with_adapters_only(tmp_path):
    model = quantised(BASES["CAUSAL_LM"]())
    model.is_quantized = True
    model.hf_quantizer = type("Quantizer", (), {"is_trainable": True})()
    with pytest.raises(ValueError, match="quantized"):
        trainer_of(model, tmp_path)
    trainer_of(adapted("CAUSAL_LM", base=model), tmp_path)


# ---- what of PEFT is used ------------------------------------------------------------------------

#: Parameters of what is called or replaced, as they are in PEFT 0.21.
USED = {
    "peft.tuners.tuners_utils:BaseTuner.__init__": "self, model, peft_config, adapter_name, "
    "low_cpu_mem_usage, state_dict",
    "peft.tuners.tuners_utils:BaseTuner.inject_adapter": "self, model, adapter_name, "
    "autocast_adapter_dtype, low_cpu_mem_usage, state_dict",
    "peft.tuners.tuners_utils:BaseTuner._create_and_replace": "self, peft_config, adapter_name, "
    "target, target_name, parent, current_key, parameter_name",
    "peft.tuners.tuners_utils:BaseTuner._prepare_adapter_config": "self, peft_config, model_config",
    "peft.tuners.tuners_utils:BaseTuner.get_model_config": "model",
    "peft.tuners.tuners_utils:BaseTuner.set_adapter": "self, adapter_name, inference_mode",
    "peft.tuners.tuners_utils:BaseTuner.delete_adapter": "self, adapter_name",
    "peft.tuners.tuners_utils:BaseTuner.merge_adapter": "self, adapter_names, safe_merge",
    "peft.tuners.tuners_utils:BaseTuner._unload_and_optionally_merge": "self, merge, progressbar, "
    "safe_merge, adapter_names",
    "peft.tuners.tuners_utils:BaseTuner._get_adapter_state_dict": "model, config, adapter_name, "
    "state_dict, unwanted_adapter_names",
    "peft.tuners.tuners_utils:BaseTuner._remove_adapter_name_from_key": "key, adapter_name",
    "peft.tuners.tuners_utils:BaseTuner._remap_adapter_state_dict_for_load": "model, config, "
    "adapter_name, state_dict",
    "peft.tuners.tuners_utils:BaseTunerLayer.set_adapter": "self, adapter_names, inference_mode",
    "peft.tuners.tuners_utils:BaseTunerLayer.enable_adapters": "self, enabled",
    "peft.tuners.tuners_utils:BaseTunerLayer.set_requires_grad": "self, adapter_names, "
    "requires_grad",
    "peft.tuners.tuners_utils:BaseTunerLayer.delete_adapter": "self, adapter_name",
    "peft.tuners.tuners_utils:BaseTunerLayer.merge": "self, safe_merge, adapter_names",
    "peft.tuners.tuners_utils:BaseTunerLayer._move_adapter_to_device_of_base_layer": "self, "
    "adapter_name, device",
    "peft.tuners.tuners_utils:_delete_auxiliary_adapter": "model, adapter_name, "
    "new_active_adapters",
    "peft.utils.other:set_additional_trainable_modules": "model, peft_config, model_config, "
    "adapter_name, activate_adapter",
    "peft.peft_model:PeftModel._enable_peft_forward_hooks": "self, args, kwargs",
}


@pytest.mark.parametrize("name", USED)
def test_what_is_used_of_peft_is_as_it_was(name):
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        assert hasattr(found, part), f"peft {peft.__version__} has no {name}"
        found = getattr(found, part)
    parameters = ", ".join(inspect.signature(found).parameters)
    assert parameters == USED[name], f"peft {peft.__version__}: {name} takes ({parameters})"


def test_an_older_peft_is_named(monkeypatch):
    monkeypatch.delattr("peft.tuners.tuners_utils.BaseTuner._get_adapter_state_dict")
    with pytest.raises(
        ImportError, match=r"BaseTuner with \['_get_adapter_state_dict'\].*got peft"
    ):
        importlib.reload(bridge)
    monkeypatch.undo()
    monkeypatch.delattr("peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING")
    with pytest.raises(ImportError, match=r"PREFIX_MAPPING.* in peft 0"):
        importlib.reload(bridge)
