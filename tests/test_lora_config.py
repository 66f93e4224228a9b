"""Configurations of mixtures of LoRAs, and which layers they mean: PEFT's rules."""

import dataclasses
import json
import math
import random
import warnings

import pytest
import torch
from torch import nn

import torch_routers as tr
from torch_routers.lora.config import RoutedLoraConfig
from torch_routers.lora.matching import match_modules


class Conv1D(nn.Module):
    """As in Transformers: linear, with a weight [in, out]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.zeros(nx, nf)), nn.Parameter(torch.zeros(nf))


class Quantized(nn.Module):
    """As a layer of four bits: linear, with a weight that does not tell."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(in_features * out_features // 2, 1))

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], self.out_features)


def model_of(**modules):
    """A model whose modules have these names; dots are written as __."""
    model = nn.Module()
    for name, module in modules.items():
        *path, last = name.split("__")
        parent = model
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, module)
    return model


def decoder(layers=3):
    modules = {"embed": nn.Embedding(8, 4)}
    for i in range(layers):
        modules[f"model__layers__{i}__attn__q_proj"] = nn.Linear(4, 4)
        modules[f"model__layers__{i}__attn__v_proj"] = nn.Linear(4, 4)
        modules[f"model__layers__{i}__norm"] = nn.LayerNorm(4)
        for e in range(2):
            modules[f"model__layers__{i}__mlp__experts__{e}__up_proj"] = nn.Linear(4, 8)
    return model_of(**modules, lm_head=nn.Linear(4, 8))


def matched(model, **options):
    return match_modules(model, RoutedLoraConfig(**options)).matched


# ---- the configuration ---------------------------------------------------------------------------


FULL = {
    "r": 4,
    "lora_alpha": 16.0,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": "lm_head",
    "layers_to_transform": [0, 2],
    "layers_pattern": ["layers"],
    "rank_pattern": {"q_proj": 2, "v_proj": [1, 2, 0]},
    "alpha_pattern": {"v_proj": [1.0, 2.5, 3.0]},
    "modules_to_save": ["lm_head"],
    "use_rslora": True,
    "init_lora_weights": "normal",
    "task_type": "CAUSAL_LM",
    "expert_names": ["sql", "med", "law"],
    "ranks": [1, 2, 3],
    "router": "EntropyRouter",
    "router_arguments": {"threshold": 0.5},
    "router_scope": "block",
    "router_input": "task",
    "num_tasks": 5,
    "losses": [tr.losses.LoadBalanceLoss(1e-2), {"class": "ZLoss", "weight": 1e-3}],
}


def test_files_give_back_the_configuration(tmp_path):
    config = RoutedLoraConfig(**FULL)
    assert RoutedLoraConfig.from_dict(config.to_dict()) == config
    assert RoutedLoraConfig.from_json(config.to_json()) == config
    config.to_json(tmp_path / "adapter_config.json")
    read = RoutedLoraConfig.from_json(tmp_path / "adapter_config.json")
    assert read == config == RoutedLoraConfig.from_json(str(tmp_path / "adapter_config.json"))
    assert [type(tr.from_config(loss)).__name__ for loss in read.losses] == [
        "LoadBalanceLoss",
        "ZLoss",
    ]
    values = json.loads(config.to_json())
    assert values["schema_version"] == 1 and values["layout"] == "expert_major"
    for name, value in FULL.items():
        assert name == "losses" or values[name] == value


def test_defaults_are_those_of_peft():
    peft = pytest.importorskip("peft")
    ours = RoutedLoraConfig(target_modules=["q_proj"]).to_dict()
    theirs = peft.LoraConfig(target_modules=["q_proj"]).to_dict()
    common = set(ours) & set(theirs) - {"peft_type", "target_modules"}
    assert {"r", "lora_alpha", "layers_pattern", "bias", "rank_pattern", "task_type"} <= common
    for name in common:
        assert ours[name] == theirs[name], name


def test_unknown_fields_of_a_file_are_ignored_with_a_warning():
    values = RoutedLoraConfig(r=3).to_dict() | {"colour": "blue"}
    with pytest.warns(UserWarning, match=r"RoutedLoraConfig: .*\['colour'\]"):
        assert RoutedLoraConfig.from_dict(values).r == 3
    with pytest.raises(TypeError, match="colour"):
        RoutedLoraConfig(colour="blue")


def test_known_fields_of_a_file_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RoutedLoraConfig.from_json(RoutedLoraConfig(**FULL).to_json())


def test_a_configuration_does_not_change_but_is_replaced():
    config = RoutedLoraConfig(num_experts=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 5
    other = dataclasses.replace(config, num_experts=3, expert_names=["a", "b", "c"])
    assert (other.experts(), config.experts()) == (["a", "b", "c"], ["0", "1"])


def test_what_is_given_may_have_other_types():
    config = RoutedLoraConfig(
        target_modules={"b", "a"},
        exclude_modules=("c",),
        ranks=(1, 2),
        router=tr.TopKRouter,
        router_arguments={"top_k": 1},
    )
    assert config.target_modules == ["a", "b"] and config.exclude_modules == ["c"]
    assert config.num_experts == 2 and config.router == "TopKRouter"
    assert RoutedLoraConfig.from_json(config.to_json()) == config


def test_the_first_pattern_that_matches_counts_in_files_too():
    patterns = {"z": 1, "a": 2, r".*\.z": 3, ".*": 4}
    config = RoutedLoraConfig(rank_pattern=patterns)
    for read in config, RoutedLoraConfig.from_json(config.to_json()):
        names = ["z", "b.z", "a", "c"]
        assert [read.rank_of(name, 0) for name in names] == [1, 1, 2, 4]
        assert list(read.rank_pattern) == list(patterns)


def test_mode_is_an_argument_of_the_router():
    config = RoutedLoraConfig(router_arguments={"top_k": 3, "mode": "soft"})
    assert config.mode == "soft"
    config = dataclasses.replace(config, mode="hard")
    assert config.router_arguments == {"top_k": 3, "mode": "hard"}
    assert RoutedLoraConfig.from_json(config.to_json()) == config


def test_ranks_and_scalings_of_experts():
    config = RoutedLoraConfig(**{**FULL, "use_rslora": False})
    assert [config.rank_of("layers.0.k_proj", e) for e in range(3)] == [1, 2, 3]
    assert [config.rank_of("layers.0.q_proj", e) for e in range(3)] == [2, 2, 2]
    assert [config.rank_of("layers.0.v_proj", e) for e in range(3)] == [1, 2, 0]
    assert [config.rank_of("layers.0.not_v_proj", e) for e in range(3)] == [1, 2, 3]
    assert [config.scaling_of("layers.0.v_proj", e) for e in range(3)] == [1.0, 1.25, 0.0]
    assert config.scaling_of("layers.0.q_proj", 0) == 8.0
    rooted = RoutedLoraConfig(**FULL)
    assert rooted.scaling_of("layers.0.q_proj", 0) == 16 / math.sqrt(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "expected r an integer >= 1, got 0"),
        ({"r": 2.0}, "expected r an integer >= 1, got 2.0"),
        ({"num_experts": True}, "expected num_experts an integer >= 1, got True"),
        ({"lora_alpha": "8"}, "expected lora_alpha a number, got '8'"),
        ({"lora_alpha": math.nan}, "expected lora_alpha a number, got nan"),
        ({"lora_dropout": 1.0}, r"expected lora_dropout in \[0, 1\), got 1.0"),
        ({"bias": "all"}, "expected bias 'none', got 'all'"),
        ({"init_lora_weights": "pissa"}, "expected init_lora_weights .* got 'pissa'"),
        ({"init_lora_weights": 0}, "expected init_lora_weights .* got 0"),
        ({"use_rslora": 1}, "expected use_rslora True or False, got 1"),
        ({"ranks": [1, 2], "num_experts": 3}, r"expected ranks for num_experts=3 .* got \[1, 2\]"),
        ({"ranks": [-1]}, "expected ranks an integer >= 0, got -1"),
        ({"ranks": 3}, "expected ranks a list, got 3"),
        ({"expert_names": "sql"}, "expected expert_names a list, got 'sql'"),
        ({"expert_names": ["a", "a"]}, r"expected expert_names distinct, got \['a', 'a'\]"),
        ({"expert_names": ["a.b"]}, r"expected expert_names names without dots, got \['a.b'\]"),
        ({"expert_names": ["keys"]}, "expected expert_names other than attributes .* got 'keys'"),
        ({"rank_pattern": {"q": [1, 2]}}, r"rank_pattern with num_experts=4 values in a list, got"),
        ({"rank_pattern": {"q": 1.5}}, "expected rank_pattern an integer >= 0, got 1.5"),
        ({"rank_pattern": {"(": 1}}, r"expected rank_pattern a regular expression, got '\('"),
        ({"alpha_pattern": {"q": "1"}}, "expected alpha_pattern with numbers, got '1'"),
        ({"alpha_pattern": [1]}, r"expected alpha_pattern a dict with names, got \[1\]"),
        ({"target_modules": "("}, r"expected target_modules a regular expression, got '\('"),
        ({"target_modules": [1]}, r"expected target_modules a list of names, got \[1\]"),
        ({"modules_to_save": "head"}, "expected modules_to_save a list, got 'head'"),
        ({"target_modules": "q", "layers_to_transform": 1}, "expected layers_to_transform None"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "expected layers_pattern None without"),
        ({"layers_to_transform": [-1]}, "expected layers_to_transform an integer >= 0, got -1"),
        ({"router": "Oracle"}, "expected router among .* got 'Oracle'"),
        ({"router": nn.Linear}, "expected router among .* got <class"),
        ({"router_arguments": {"hidden_size": 4}}, r"without sizes and losses, got \['hidden_siz"),
        ({"router_arguments": {"f": object()}}, "expected router_arguments with numbers, .* got"),
        ({"router_input": "task"}, "expected num_tasks an integer >= 1, got None"),
        ({"router_scope": "head"}, "expected router_scope among .* got 'head'"),
        ({"mode": "cold"}, "expected mode among .* got 'cold'"),
        ({"mix": "sum"}, "expected mix among .* got 'sum'"),
        ({"layout": "rank_major"}, "expected layout among .* got 'rank_major'"),
        ({"losses": [nn.Linear(1, 1)]}, "from_config: expected config"),
        ({"losses": [{"class": "SMEARRouter", "hidden_size": 2, "num_experts": 2}]},
         "expected losses with losses or their configurations"),
        ({"schema_version": 2}, "expected schema_version 1, got 2. It is of another version"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        RoutedLoraConfig(**options)


def test_files_of_something_else_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"expected peft_type 'ROUTED_LORA', got 'LORA'"):
        RoutedLoraConfig.from_dict({"peft_type": "LORA", "r": 8})
    for text in "[1]", "{r: 8}":
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"expected (a )?JSON.*config\.json"):
            RoutedLoraConfig.from_json(tmp_path / "config.json")


# ---- which layers --------------------------------------------------------------------------------


def test_what_is_linear():
    model = model_of(a=nn.Linear(2, 3), b=Conv1D(4, 2), c=Quantized(2, 6), d=nn.Embedding(2, 4))
    report = match_modules(model, RoutedLoraConfig(target_modules="all-linear"))
    assert report.matched == ["a", "b", "c"] and report.coverage == 1
    assert matched(model, target_modules="ALL-LINEAR") == ["a", "b", "c"]
    assert match_modules(model, RoutedLoraConfig(target_modules=["b"])).coverage == 8 / 26
    assert match_modules(model, RoutedLoraConfig(target_modules=["c"])).coverage == 12 / 26


def test_matched_modules_that_are_not_linear():
    model, config = decoder(), RoutedLoraConfig(target_modules=["q_proj", "norm"])
    message = r"match_modules: expected linear layers.* model\.layers\.0\.norm of type LayerNorm"
    with pytest.raises(ValueError, match=message):
        match_modules(model, config)
    report = match_modules(model, config, strict=False)
    assert report.unsupported == {f"model.layers.{i}.norm": "LayerNorm" for i in range(3)}
    assert report.matched == [f"model.layers.{i}.attn.q_proj" for i in range(3)]
    assert "model.layers.2.norm (LayerNorm)" in str(report)


def test_nothing_to_match():
    with pytest.raises(ValueError, match=r"match_modules: expected layers that match \['k_proj'\]"):
        matched(decoder(), target_modules=["k_proj"])
    with pytest.raises(ValueError, match=r"got none: exclude_modules .* take out \['lm_head'\]"):
        matched(decoder(), target_modules=["lm_head"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"got none\. layers_to_transform is 7"):
        matched(decoder(), target_modules=["q_proj"], layers_to_transform=7)
    for nothing in None, []:
        with pytest.raises(ValueError, match="match_modules: expected target_modules, got"):
            matched(decoder(), target_modules=nothing)


def test_the_first_number_in_a_name_is_that_of_the_layer():
    model = decoder()
    first = [f"model.layers.1.mlp.experts.{e}.up_proj" for e in range(2)]
    for pattern in None, "layers", ["h", "layers"]:
        options = {"layers_to_transform": 1, "layers_pattern": pattern}
        assert matched(model, target_modules=["up_proj"], **options) == first
    nested = model_of(m__h__1__h__2__q=nn.Linear(2, 2), m__h__2__h__1__q=nn.Linear(2, 2))
    options = {"layers_to_transform": [2], "layers_pattern": "h"}
    assert matched(nested, target_modules=["q"], **options) == ["m.h.2.h.1.q"]
    assert matched(nested, target_modules=["m.h.1.h.2.q"], **options) == ["m.h.1.h.2.q"]


def test_the_report_says_what_was_hit():
    report = match_modules(decoder(), RoutedLoraConfig(target_modules=["q_proj", "k_proj"]))
    assert report.unmatched_patterns == ["k_proj"]
    assert report.coverage == 3 * 16 / (3 * (16 + 16 + 2 * 32) + 32)
    assert str(report).splitlines() == [
        "3 layers matched, 15.0 % of the weights of linear layers",
        "  model.layers.*.attn.q_proj (3)",
        "targets that match nothing: k_proj",
    ]


def test_what_is_unused_is_warned_of():
    targets = {"target_modules": ["q_proj"]}
    with pytest.warns(UserWarning, match=r"match_modules: .*exclude_modules .*\['k_proj'\]"):
        matched(decoder(), exclude_modules=["k_proj", "lm_head"], **targets)
    with pytest.warns(UserWarning, match=r"exclude_modules .*\['k'\]"):
        matched(decoder(), exclude_modules="k", **targets)
    with pytest.warns(UserWarning, match=r"rank_pattern .*\['v_proj'\]"):
        matched(decoder(), rank_pattern={"q_proj": 2, "v_proj": 2}, **targets)
    with pytest.warns(UserWarning, match=r"alpha_pattern .*\['proj'\]"):
        matched(decoder(), alpha_pattern={"proj": 2}, **targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matched(decoder(), exclude_modules=["lm_head"], rank_pattern={".*proj": 2}, **targets)


def test_layers_that_nobody_calls_are_warned_of():
    model = model_of(attention=nn.MultiheadAttention(4, 2), up=nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=r"attention\.out_proj"):
        report = match_modules(model, RoutedLoraConfig(target_modules="all-linear"))
    assert report.bypassed == ["attention.out_proj"]
    assert "matched, but not called: attention.out_proj" in str(report)


def test_adapters_are_matched_as_a_whole():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer, self.inner = nn.Linear(4, 4), nn.Linear(4, 2)
            self.in_features = self.out_features = 4

    model = model_of(q_proj=Wrapper(), up=nn.Linear(4, 4))
    report = match_modules(model, RoutedLoraConfig(target_modules="all-linear"))
    assert report.matched == ["q_proj", "up"] and report.coverage == 1
    with pytest.raises(ValueError, match="expected layers that match"):
        matched(model, target_modules=["base_layer", "inner"])


# ---- the same as PEFT ----------------------------------------------------------------------------

PARTS = ["layers", "h", "experts", "attn", "0", "1", "2", "11"]
LEAVES = ["q", "v", "o", "q1", "aq"]


def drawn_model(draw):
    names = set()
    for _ in range(12):
        path = draw.choices(PARTS, k=draw.randint(0, 4))
        names.add("__".join([*path, draw.choice(LEAVES)]))
    return model_of(**{name: nn.Linear(2, 2) for name in sorted(names)})


def drawn_options(draw):
    names = ["q", "v", "attn.q", "1.q", "layers.0.q", "q1", "nothing"]
    few = lambda values: draw.sample(values, draw.randint(1, 2))  # noqa: E731
    options = {}
    if draw.random() < 0.3:
        options["target_modules"] = draw.choice([r".*q", r"q|.*\.v", "layers.*", "q", "all-linear"])
        if draw.random() < 0.2:
            options["target_modules"] = r".*\.(q|v|o)"
    else:
        options["target_modules"] = few(names)
        if draw.random() < 0.6:
            options["layers_to_transform"] = draw.choice([0, 1, [0, 2], [11], []])
            if draw.random() < 0.6:
                options["layers_pattern"] = draw.choice(["layers", ["h", "layers"], "at+n", []])
    if draw.random() < 0.3:
        options["exclude_modules"] = draw.choice([r".*\.1\..*", ["attn.q", "q1"], ["v"]])
    if draw.random() < 0.2:
        options["modules_to_save"] = draw.choice([["o"], ["experts"]])
    if draw.random() < 0.5:
        options["rank_pattern"] = {key: draw.randint(1, 9) for key in few([*names, r".*\.0\..*"])}
        options["alpha_pattern"] = {key: draw.randint(1, 9) for key in few([*names, "attn.*"])}
    return options


@pytest.mark.parametrize("use_rslora", [False, True])
def test_layers_ranks_and_scalings_are_those_of_peft(use_rslora):
    peft = pytest.importorskip("peft")
    draw, compared, refused = random.Random(use_rslora), 0, 0
    for _ in range(150):
        model, options = drawn_model(draw), drawn_options(draw) | {"use_rslora": use_rslora}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                theirs = peft.LoraModel(model, peft.LoraConfig(**options), "default")
            except ValueError:
                with pytest.raises(ValueError, match="match_modules"):
                    matched(model, **options)
                refused += 1
                continue
            layers = {
                name.removeprefix("model."): module
                for name, module in theirs.named_modules()
                if hasattr(module, "lora_A")
            }
            model = theirs.unload()
            assert matched(model, **options) == list(layers), options
        config = RoutedLoraConfig(**options)
        for name, layer in layers.items():
            assert config.rank_of(name, 1) == layer.r["default"], (name, options)
            assert config.scaling_of(name, 1) == pytest.approx(layer.scaling["default"], rel=1e-15)
        compared += len(layers)
    assert compared > 200 and 5 < refused < 100


def gpt2(transformers):
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=9, n_positions=4)
    return transformers.GPT2LMHeadModel(config), "CAUSAL_LM"


def llama(transformers):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 9}
    config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes)
    return transformers.LlamaForCausalLM(config), "CAUSAL_LM"


def bert(transformers):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 9}
    config = transformers.BertConfig(num_attention_heads=2, **sizes)
    return transformers.BertForSequenceClassification(config), "SEQ_CLS"


@pytest.mark.transformers
@pytest.mark.parametrize("make", [gpt2, llama, bert], ids=lambda make: make.__name__)
def test_all_linear_layers_of_a_transformer_are_those_of_peft(make):
    peft = pytest.importorskip("peft")
    model, task_type = make(pytest.importorskip("transformers"))
    ours = matched(model, target_modules="all-linear", task_type=task_type)
    fan = {"fan_in_fan_out": True} if make is gpt2 else {}
    options = peft.LoraConfig(target_modules="all-linear", task_type=task_type, **fan)
    theirs = peft.get_peft_model(model, options)
    assert set(ours) == {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    assert not any(head in ours for head in ("lm_head", "classifier"))
    assert match_modules(theirs.unload(), RoutedLoraConfig(target_modules=ours)).matched == ours
