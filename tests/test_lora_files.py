"""Mixtures of LoRAs on disk, from and to folders of PEFT, and as plain weights."""

import copy
import json
import os
import sys
import types
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import torch_routers as tr

pytest.importorskip("torch_routers.lora.inject")
pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file

from tiny_lm import batch, loss_of, tiny_lm
from torch_routers.lora.adapters import from_adapters
from torch_routers.lora.collapse import collapse_to_lora, export_expert
from torch_routers.lora.files import load_adapter, save_adapter
from torch_routers.lora.folders import read_peft_adapter
from torch_routers.lora.merging import MergeError, merge

TARGETS = ["q_proj", "v_proj", "up_proj"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def config(**options):
    options = {
        "target_modules": TARGETS,
        "expert_names": ["sql", "med", "law"],
        "ranks": [2, 3, 4],
        "lora_alpha": 8,
        "init_lora_weights": False,
        "router_arguments": {"top_k": 2},
        "losses": [tr.losses.LoadBalanceLoss(1e-2)],
        **options,
    }
    return tr.lora.RoutedLoraConfig(**options)


def injected(seed=1, mix="default", **options):
    model = tiny_lm()
    torch.manual_seed(seed)
    tr.lora.inject(model, config(**options), mix)
    for name, parameter in model.named_parameters():
        if "routed_gate" in name:
            parameter.data.normal_(std=0.5)
    return model.eval()


def same(model, other):
    return torch.equal(model.eval()(*batch()), other.eval()(*batch()))


def layers_of(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, tr.lora.RoutedLoraLinear)
    }


# ---- save and load -------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["module", "block", "layer", "model"])
def test_a_mixture_comes_back_in_a_model_without_it(scope, tmp_path):
    model, other = injected(router_scope=scope), tiny_lm().eval()
    save_adapter(model, tmp_path / "mix")
    loaded = load_adapter(other, tmp_path / "mix")
    assert same(model, other)
    assert loaded == other.routed_lora["default"] == model.routed_lora["default"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in other.named_parameters() if p.requires_grad}


def test_a_mixture_comes_back_in_a_model_with_one_under_another_name(tmp_path):
    model, other = injected(), injected(seed=2, mix="second")
    assert not same(model, other)
    before = other.layers[0].self_attn.q_proj.routed_A["second"]["sql"].weight
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path, "second")
    after = other.layers[0].self_attn.q_proj.routed_A["second"]["sql"].weight
    assert same(model, other) and before is after


def test_names_and_shapes_in_the_file(tmp_path):
    save_adapter(injected(router_scope="block"), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    expected = {}
    for layer in "01":
        for path, out in ("self_attn.q_proj", 16), ("self_attn.v_proj", 16), ("mlp.up_proj", 24):
            key = f"base_model.model.layers.{layer}.{path}"
            for expert, rank in ("sql", 2), ("med", 3), ("law", 4):
                expected[f"{key}.routed_A.{expert}.weight"] = (rank, 16)
                expected[f"{key}.routed_B.{expert}.weight"] = (out, rank)
            if "v_proj" not in path:  # it shares that of q_proj
                expected[f"{key}.routed_gate.weight"] = (3, 16)
    assert {key: tuple(value.shape) for key, value in tensors.items()} == expected
    values = json.loads((tmp_path / CONFIG).read_text())
    assert values["schema_version"] == 1 and values["layout"] == "expert_major"
    assert values["peft_type"] == "ROUTED_LORA"
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


def test_the_whole_state_of_routers_comes_back(tmp_path):
    arguments = {"top_k": 2, "selection_bias": True}
    model = injected(router_arguments=arguments)
    biases = [m.expert_bias for m in model.modules() if isinstance(m, tr.Router)]
    for i, bias in enumerate(biases):
        bias.copy_(torch.tensor([0.1, -0.2, 0.3]) * (i + 1))
    save_adapter(model, tmp_path)
    other = tiny_lm().eval()
    load_adapter(other, tmp_path)
    found = [m.expert_bias for m in other.modules() if isinstance(m, tr.Router)]
    assert len(biases) == 6 and all(map(torch.equal, biases, found)) and same(model, other)


def test_embeddings_of_tasks_come_back(tmp_path):
    options = {"router_input": "task", "num_tasks": 3, "task_embedding_size": 5}
    model, other = injected(**options), tiny_lm()
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path)
    mine, found = (m.state_dict() for m in (model, other))
    assert any("routed_tasks" in name for name in mine)
    assert all(torch.equal(value, found[name]) for name, value in mine.items())


def test_modules_to_save_come_back(tmp_path):
    model, other = injected(modules_to_save=["lm_head"]), tiny_lm().eval()
    nn.init.normal_(model.lm_head.weight)
    save_adapter(model, tmp_path)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / WEIGHTS)
    load_adapter(other, tmp_path)
    assert same(model, other) and other.lm_head.weight.requires_grad


def test_training_goes_on_where_it_stopped(tmp_path):
    def steps(model, optimizer, seeds):
        for seed in seeds:
            ids, mask = batch(seed=seed)
            with tr.collect(model) as routings:
                loss = loss_of(model(ids, mask), ids, mask)
            optimizer.zero_grad()
            (loss + routings.aux_loss()).backward()
            optimizer.step()

    def optimizer_of(model):
        return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)

    model = injected().train()
    optimizer = optimizer_of(model)
    steps(model, optimizer, range(3))
    save_adapter(model, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    other = tiny_lm()
    load_adapter(other, tmp_path)
    resumed = optimizer_of(other)
    resumed.load_state_dict(state)
    steps(model, optimizer, range(3, 6))
    steps(other, resumed, range(3, 6))
    mine, found = model.state_dict(), other.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in mine.items())


def test_what_is_frozen_is_kept(tmp_path):
    model = injected()
    tr.lora.set_trainable(model, experts=["law"], router=False)
    save_adapter(model, tmp_path)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    fresh = tiny_lm()
    load_adapter(fresh, tmp_path)
    assert {name for name, p in fresh.named_parameters() if p.requires_grad} == trained
    present = injected(seed=2)
    tr.lora.set_trainable(present, experts=["sql"], router=True)
    before = {name for name, p in present.named_parameters() if p.requires_grad}
    load_adapter(present, tmp_path)
    assert {name for name, p in present.named_parameters() if p.requires_grad} == before


def test_experts_that_came_and_went_are_saved_as_they_are(tmp_path):
    model, other = injected(), tiny_lm().eval()
    tr.lora.add_expert(model, "art", rank=5)
    tr.lora.remove_expert(model, "med")
    for layer in layers_of(model).values():
        nn.init.normal_(layer.routed_B["default"]["art"].weight)
    layer = model.layers[1].self_attn.v_proj
    layer.scaling["default"]["sql"] = 0.3
    save_adapter(model, tmp_path)
    loaded = load_adapter(other, tmp_path)
    assert same(model, other)
    assert loaded.experts() == ["sql", "law", "art"]
    found = other.layers[1].self_attn.v_proj.scaling["default"]
    assert found == pytest.approx(layer.scaling["default"], rel=1e-15)


def test_scalings_of_the_file_are_those_of_the_model(tmp_path):
    model, other = injected(use_rslora=True), injected(seed=2)
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path)
    assert same(model, other)


def test_files_in_half_precision_fill_factors_in_float32(tmp_path):
    model = injected()
    save_adapter(model, tmp_path / "a")
    tensors = {key: value.half() for key, value in load_file(tmp_path / "a" / WEIGHTS).items()}
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    load_adapter(model, tmp_path / "a")
    factors = [p for name, p in model.named_parameters() if "routed_A" in name]
    assert all(p.dtype == torch.float32 and torch.equal(p, p.half().float()) for p in factors)


# ---- folders -------------------------------------------------------------------------------------


def test_saving_again_replaces_the_files_and_leaves_others(tmp_path):
    folder = tmp_path / "a" / "mix"
    save_adapter(injected(), folder)
    (folder / "README.md").write_text("mine")
    old = (folder / WEIGHTS).read_bytes()
    os.link(folder / WEIGHTS, tmp_path / "old")  # whoever reads the old file goes on with it
    model, other = injected(seed=3), tiny_lm().eval()
    save_adapter(model, folder)
    load_adapter(other, folder)
    assert same(model, other) and (folder / "README.md").read_text() == "mine"
    assert os.listdir(tmp_path / "a") == ["mix"] and (tmp_path / "old").read_bytes() == old
    save_adapter(model, str(folder))


@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_save_leaves_what_was_there(exists, tmp_path, monkeypatch):
    folder = tmp_path / "mix"
    if exists:
        save_adapter(injected(), folder)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("mix/*")}

    def interrupted(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(injected(seed=2), folder)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("mix/*")} == before
    assert os.listdir(tmp_path) == (["mix"] if exists else [])


def test_files_are_as_readable_as_others(tmp_path):
    save_adapter(injected(), tmp_path / "mix")
    (tmp_path / "other").mkdir()
    (tmp_path / "file").touch()
    assert (tmp_path / "mix").stat().st_mode == (tmp_path / "other").stat().st_mode
    for name in WEIGHTS, CONFIG:
        assert (tmp_path / "mix" / name).stat().st_mode == (tmp_path / "file").stat().st_mode


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "mix").touch()
    with pytest.raises(ValueError, match="save_adapter: expected a folder, got the file"):
        save_adapter(injected(), tmp_path / "mix")


def test_a_mixture_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="save_adapter: expected a model with a mixture 'other'"):
        save_adapter(injected(), tmp_path / "mix", "other")
    assert not (tmp_path / "mix").exists()


# ---- what does not fit ---------------------------------------------------------------------------


def changed(folder, change, **values):
    """A folder whose tensors and configuration are not what they were."""
    save_adapter(injected(), folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))
    return folder


GATE = "layers.1.mlp.up_proj.routed_gate.weight"
FACTOR = "layers.0.self_attn.q_proj.routed_A.med.weight"
KEY = "base_model.model."


@pytest.mark.parametrize(
    ("change", "values", "message"),
    [
        (lambda t: t.pop(KEY + GATE), {}, f"got 1 missing ones, such as {GATE}"),
        (lambda t: t.pop(KEY + FACTOR), {}, f"got 1 missing ones, such as {FACTOR}"),
        (lambda t: t.update({KEY + FACTOR.replace("med", "art"): torch.zeros(1)}), {},
         "got 1 unknown ones, such as .*routed_A.art.weight"),
        (lambda t: t.update({KEY + FACTOR: t[KEY + FACTOR][:2].clone()}), {},
         rf"expected {FACTOR} of shape \[3, 16\], got \[2, 16\]"),
        (lambda t: t.update({"model.x": torch.zeros(1)}), {}, "keys that begin with base_model"),
        (lambda t: None, {"layout": "rank_major"}, "expected layout among"),
        (lambda t: None, {"schema_version": 2}, "expected schema_version 1, got 2"),
        (lambda t: None, {"peft_type": "LORA"}, "expected peft_type 'ROUTED_LORA', got 'LORA'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("present", [False, True])
def test_files_that_do_not_fit_change_nothing(present, change, values, message, tmp_path):
    folder = changed(tmp_path / "mix", change, **values)
    model = injected(seed=5, mix="other") if present else tiny_lm()
    mix = "other" if present else "default"
    before = {name: p.clone() for name, p in model.state_dict().items()}
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, folder, mix)
    if "base_model" in message or "routed" in message:
        assert str(folder / WEIGHTS) in str(caught.value)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert [p.requires_grad for p in model.parameters()] == trained


def test_an_error_leaves_other_mixtures_active(tmp_path):
    folder = changed(tmp_path / "mix", lambda t: t.pop(KEY + GATE))
    model = injected(mix="other")
    expected = model(*batch())
    with pytest.raises(ValueError, match="missing"):
        load_adapter(model, folder)
    assert torch.equal(model(*batch()), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"expert_names": ["med", "sql", "law"], "ranks": [3, 2, 4]},
        {"router": "EntmaxRouter", "router_arguments": {}},
        {"router_scope": "block"},
        {"router_input": "sequence"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_another_mixture_in_the_model(options, tmp_path):
    save_adapter(injected(**options), tmp_path)
    model = injected(seed=2)
    message = rf"load_adapter: expected .* as in the model, got .*{CONFIG}"
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)


def test_pickles_are_not_read(tmp_path):
    save_adapter(injected(), tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "adapter_model.bin")
    os.remove(tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"got \['adapter_model\.bin'\]\. .* save them as safete"):
        load_adapter(tiny_lm(), tmp_path)


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(ValueError, match=f"load_adapter: expected a folder with {CONFIG}"):
        load_adapter(tiny_lm(), tmp_path / "nowhere")
    save_adapter(injected(), tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"load_adapter: expected safetensors in .*{WEIGHTS}"):
        load_adapter(tiny_lm(), tmp_path)
    os.remove(tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"load_adapter: expected {WEIGHTS} in .* no such file"):
        load_adapter(tiny_lm(), tmp_path)
    for text in "{", "[]":
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=f"load_adapter: expected (a )?JSON .*{CONFIG}"):
            load_adapter(tiny_lm(), tmp_path)


def test_without_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    save_adapter(injected(), tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for function in save_adapter, load_adapter:
        message = rf'{function.__name__}: .* safetensors.*pip install "torch-routers\[lora\]"'
        with pytest.raises(ImportError, match=message):
            function(injected(), tmp_path)


def test_models_without_memory(tmp_path):
    save_adapter(injected(), tmp_path)
    model = tiny_lm().to("meta")
    with pytest.raises(ValueError, match="load_adapter: expected a model with memory, got layers"):
        load_adapter(model, tmp_path)
    assert not layers_of(model)


def test_unknown_fields_are_warned_of(tmp_path):
    folder = changed(tmp_path / "mix", lambda t: None, colour="blue", base_model_name_or_path="a")
    with pytest.warns(UserWarning, match=r"\['colour'\]"):
        load_adapter(tiny_lm(), folder)


# ---- PEFT ----------------------------------------------------------------------------------------


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def peft_folder(peft, folder, seed=0, base=None, **options):
    """A LoRA of PEFT on disk, and the logits with it."""
    options = {"target_modules": TARGETS, "init_lora_weights": False, **options}
    torch.manual_seed(seed)
    model = peft.get_peft_model(base or tiny_lm(), peft.LoraConfig(**options)).eval()
    model.save_pretrained(folder)
    return model(*batch()).detach()


def on_real_tokens(logits):
    """Tokens that are padding have no expert, but a LoRA."""
    return logits[batch()[1].bool()]


FLAVOURS = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 4,
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 5},
        "alpha_pattern": {"up_proj": 3, r".*\.0\..*v_proj": 7},
    },
    "fewer": {"r": 2, "target_modules": ["o_proj", "up_proj"]},
}


def mixture_of(peft, folder, **options):
    """A model with all of them, and the logits with each."""
    expected = {
        name: peft_folder(peft, folder / name, seed=i, **flavour)
        for i, (name, flavour) in enumerate(FLAVOURS.items())
    }
    model = tiny_lm().eval()
    report = from_adapters(model, {name: folder / name for name in FLAVOURS}, **options)
    return model, expected, report


def test_adapters_are_experts(peft, tmp_path):
    model, expected, report = mixture_of(peft, tmp_path, router_arguments={"top_k": 1})
    assert len(report.matched) == 8
    for name, logits in expected.items():
        with tr.lora.force(model, name):
            found = model(*batch())
        assert_close(on_real_tokens(found), on_real_tokens(logits), atol=1e-5, rtol=1e-5)
    layer = layers_of(model)["layers.0.self_attn.o_proj"]
    ranks = [factor.weight.shape[0] for factor in layer.routed_A["default"].values()]
    assert ranks == [0, 0, 0, 2]


@pytest.mark.parametrize("trainable", ["router", "all"])
def test_what_is_trained_of_a_mixture_of_adapters(trainable, peft, tmp_path):
    model, _, _ = mixture_of(peft, tmp_path, trainable=trainable, router_scope="block")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("routed_gate" in name for name in trained)
    assert any("routed_A" in name for name in trained) == (trainable == "all")
    assert all("routed_" in name for name in trained)


def test_a_mixture_of_adapters_is_saved_and_loaded(peft, tmp_path):
    model, _, _ = mixture_of(peft, tmp_path)
    save_adapter(model, tmp_path / "mix")
    other = tiny_lm().eval()
    load_adapter(other, tmp_path / "mix")
    assert same(model, other)
    assert not any(p.requires_grad for n, p in other.named_parameters() if "routed_A" in n)


class Nested(nn.Module):
    """A layer whose name is the end of another's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 6)
        self.inner, self.last = (nn.ModuleDict({"up": nn.Linear(6, 6)}) for _ in range(2))

    def forward(self, x):
        return self.last["up"](self.inner["up"](self.up(x).tanh()).tanh())


def test_names_that_end_like_others(peft, tmp_path):
    x, expected = torch.randn(5, 6), {}
    options = {"outer": "up", "inner": r".+\.up", "all": ["up"]}
    for rank, (name, targets) in enumerate(options.items(), 2):
        lora = peft.LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
        model = peft.get_peft_model(Nested(), lora)
        model.save_pretrained(tmp_path / name)
        expected[name] = model(x)
    for names in ["outer"], ["inner"], ["all"], list(options):
        model = Nested()
        from_adapters(model, {name: tmp_path / name for name in names}, router="SoftRouter")
        for name in names:
            with tr.lora.force(model, name):
                assert_close(model(x), expected[name])
            export_expert(model, name, tmp_path / "export")
            loaded = peft.PeftModel.from_pretrained(Nested(), tmp_path / "export")
            assert_close(loaded(x), expected[name])
        save_adapter(model, tmp_path / "mix")
        other = Nested()
        load_adapter(other, tmp_path / "mix")
        assert torch.equal(other(x), model(x))


def test_an_adapter_as_it_is_read(peft, tmp_path):
    peft_folder(peft, tmp_path, **FLAVOURS["patterns"], modules_to_save=["lm_head"])
    adapter = read_peft_adapter(tmp_path)
    a, b, scaling = adapter.layers["layers.1.self_attn.v_proj"]
    assert (a.shape, b.shape, scaling) == ((5, 16), (16, 5), 8 / 5)
    assert adapter.layers["layers.0.self_attn.v_proj"].scaling == 7 / 4
    assert list(adapter.others) == ["lm_head.weight"] and adapter.config["peft_type"] == "LORA"
    with pytest.warns(UserWarning, match=r"got \['lm_head.weight'\] too"):
        from_adapters(tiny_lm(), {"a": tmp_path}, router_arguments={"top_k": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, r"expected a plain LoRA, got DoRA \(use_dora\)"),
        ({"lora_bias": True}, r"expected a plain LoRA, got biases of LoRA"),
        ({"bias": "all"}, "expected a LoRA without biases, got bias='all'"),
        ({"init_lora_weights": "pissa"}, "got init_lora_weights='pissa', which does"),
        ({"target_modules": ["embed_tokens"]}, "expected factors of linear layers, got embed_tok"),
    ],
)
def test_other_adapters_are_refused(options, message, peft, tmp_path):
    peft_folder(peft, tmp_path / "sql", **options)
    with pytest.raises(ValueError, match=f"read_peft_adapter: .*{message}") as caught:
        from_adapters(tiny_lm(), {"sql": tmp_path / "sql"})
    assert str(tmp_path / "sql") in str(caught.value)


def test_other_types_are_refused_by_name(peft, tmp_path):
    model = peft.get_peft_model(tiny_lm(), peft.LoHaConfig(target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected an adapter of type LORA, got LOHA"):
        read_peft_adapter(tmp_path)


def test_adapters_of_other_models_are_refused(peft, tmp_path):
    peft_folder(peft, tmp_path / "deep", base=tiny_lm(layers=3), r=2)
    peft_folder(peft, tmp_path / "sql", r=2)
    folders = {"sql": tmp_path / "sql", "deep": tmp_path / "deep"}
    model = tiny_lm()
    with pytest.raises(ValueError, match=r"layers\.2\.\S+ .*deep, got no such module"):
        from_adapters(model, folders)
    model.layers[0].mlp.up_proj = nn.Linear(16, 23)
    with pytest.raises(ValueError, match=r"up_proj from 16 to 24 .*sql, got \(16, 23\)"):
        from_adapters(model, folders)
    assert not layers_of(model) and all(p.requires_grad for p in model.parameters())


def test_another_name_of_the_base_model_is_warned_of(peft, tmp_path):
    peft_folder(peft, tmp_path, r=2)
    config = json.loads((tmp_path / CONFIG).read_text()) | {"base_model_name_or_path": "a"}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    model = tiny_lm()
    model.config = types.SimpleNamespace(_name_or_path="b")
    with pytest.warns(UserWarning, match=f"expected an adapter of 'b', got .* 'a' in {tmp_path}"):
        from_adapters(model, {"sql": tmp_path}, router="SoftRouter")
    export_expert(model, "sql", tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "b"


def test_factors_that_do_not_fit_their_configuration(peft, tmp_path):
    peft_folder(peft, tmp_path, r=2)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(ValueError, match=r"expected factors of rank 3 of \S+, got \[2, 16\]"):
        read_peft_adapter(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lora_alpha": "high"}))
    with pytest.raises(ValueError, match=f"got others .*lora_alpha.*'high'.* in {tmp_path}"):
        read_peft_adapter(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if "lora_B" in key)
    del tensors[key]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="expected two factors of"):
        read_peft_adapter(tmp_path)


@pytest.mark.parametrize("expert", list(FLAVOURS))
def test_an_exported_expert_is_a_lora_of_peft(expert, peft, tmp_path):
    model, expected, _ = mixture_of(peft, tmp_path)
    export_expert(model, expert, tmp_path / "export")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = peft.PeftModel.from_pretrained(tiny_lm(), tmp_path / "export").eval()
    assert_close(loaded(*batch()), expected[expert], atol=1e-6, rtol=1e-6)
    again = read_peft_adapter(tmp_path / "export")
    before = read_peft_adapter(tmp_path / expert)
    assert again.layers.keys() == before.layers.keys()
    for name, (a, b, scaling) in before.layers.items():
        assert torch.equal(again.layers[name].A, a) and torch.equal(again.layers[name].B, b)
        assert again.layers[name].scaling == pytest.approx(scaling, rel=1e-15)


def test_an_export_has_the_modules_to_save(peft, tmp_path):
    model = injected(modules_to_save=["lm_head"])
    nn.init.normal_(model.lm_head.weight)
    export_expert(model, "med", tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_lm(), tmp_path).eval()
    with tr.lora.force(model, "med"):
        assert_close(loaded(*batch()), model(*batch()), atol=1e-5, rtol=1e-5)


def test_experts_that_cannot_be_exported(tmp_path):
    with pytest.raises(ValueError, match=r"export_expert: expected an expert among \['sql', .*'x'"):
        export_expert(injected(), "x", tmp_path)
    with pytest.raises(ValueError, match=r"export_expert: expected a rank above 0 .* got 'sql'"):
        export_expert(injected(ranks=[0, 1, 1]), "sql", tmp_path)
    assert not list(tmp_path.iterdir())


# ---- constant weights ----------------------------------------------------------------------------


def test_constant_weights_are_a_weighted_adapter_of_peft(peft, tmp_path):
    weights = {"plain": 0.5, "rslora": 1.5, "patterns": 0.0, "fewer": 0.25}
    model, _, _ = mixture_of(peft, tmp_path)
    collapse_to_lora(model, weights).save_pretrained(tmp_path / "cat")
    ours = peft.PeftModel.from_pretrained(tiny_lm(), tmp_path / "cat").eval()
    theirs = peft.PeftModel.from_pretrained(tiny_lm(), tmp_path / "plain", "plain")
    for name in FLAVOURS:
        if name != "plain":
            theirs.load_adapter(tmp_path / name, name)
    theirs.add_weighted_adapter(
        list(weights), list(weights.values()), "all", combination_type="cat"
    )
    theirs.set_adapter("all")
    assert_close(ours(*batch()), theirs.eval()(*batch()), atol=1e-5, rtol=1e-5)


class Constant(tr.Router):
    """The same weights for all tokens."""

    def __init__(self, hidden_size, num_experts):
        super().__init__(num_experts)
        self.hidden_size = hidden_size
        self.register_buffer("constant_weights", torch.arange(num_experts) / 2 - 0.25)

    def route(self, x, *, valid_mask, **context):
        return tr.Routing(self.constant_weights.expand(*x.shape[:-1], -1))


def constant(**options):
    return injected(router="Constant", router_arguments={}, losses=[], **options)


def test_collapsed_constant_routing_does_what_the_mixture_does(peft, tmp_path):
    model = constant(use_rslora=True)
    lora = collapse_to_lora(model, [-0.25, 0.25, 0.75])
    assert lora.error == 0 and lora.layers["layers.0.self_attn.q_proj"].A.shape == (9, 16)
    lora.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_lm(), tmp_path).eval()
    assert_close(loaded(*batch()), model(*batch()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 9, 20])
def test_svd_is_the_best_of_its_rank_and_says_its_error(rank):
    model = injected()
    weights = torch.tensor([0.2, -0.3, 0.5])
    whole = collapse_to_lora(model, weights)
    best = collapse_to_lora(model, weights, rank=rank, method="svd")
    lost = total = 0
    for name, (a, b, scaling) in whole.layers.items():
        delta = scaling * (b @ a)
        a, b, scaling = best.layers[name]
        assert a.shape[0] == min(rank, 9)
        error, norm = (delta - scaling * (b @ a)).norm(), delta.norm()
        expected = torch.linalg.svdvals(delta)[rank:].norm()
        assert_close(error, expected, atol=1e-5, rtol=1e-4)
        assert best.errors[name] == pytest.approx((error / norm).item(), abs=1e-5)
        lost, total = lost + error**2, total + norm**2
    assert best.error == pytest.approx((lost / total).sqrt().item(), abs=1e-5)
    assert (best.error < 1e-6) == (rank >= 9)


def test_what_cannot_be_collapsed():
    model = injected()
    for options, message in (
        ({"weights": {"art": 1}}, r"expected experts among \['sql', 'med', 'law'\], got \['art'\]"),
        ({"weights": [1, 2]}, "expected weights for 3 experts, got 2"),
        ({"weights": [0, 0, 0]}, "expected an expert with a weight, got"),
        ({"weights": [1, 1, 1], "rank": 2}, 'expected no rank with method="cat", got 2'),
        ({"weights": [1, 1, 1], "rank": 0, "method": "svd"}, "expected rank >= 1, got 0"),
        ({"weights": [1, 1, 1], "method": "ties"}, "expected method among .* got 'ties'"),
    ):
        with pytest.raises(ValueError, match=f"collapse_to_lora: {message}"):
            collapse_to_lora(model, **options)


def test_constant_routing_is_merged():
    for model in (
        constant(),
        injected(num_experts=1, expert_names=["a"], ranks=[3], router_arguments={"top_k": 1}),
        injected(num_experts=1, expert_names=["a"], ranks=[3], router="SoftRouter",
                 router_arguments={}),
    ):  # fmt: skip
        ids, _ = batch()
        expected = model(ids)
        merged = merge(model)
        assert merged is model and not layers_of(model)
        assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)


def test_layers_with_transposed_weights(peft, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 9, "n_positions": 4}

    def gpt2():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()

    model, ids = gpt2(), torch.randint(9, (2, 4))
    options = {"router": "Constant", "router_arguments": {}, "losses": []}
    tr.lora.inject(model, config(target_modules=["c_attn", "c_proj"], **options))
    expected = model(ids).logits
    assert not torch.allclose(expected, gpt2()(ids).logits, atol=1e-3)
    collapse_to_lora(model, [-0.25, 0.25, 0.75]).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fan_in_fan_out")
        loaded = peft.PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert_close(merge(model)(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_forced_expert_is_merged():
    model = injected()
    ids, _ = batch()
    with tr.lora.force(model, "med"):
        expected = model(ids)
        merge(model)
    assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)


def test_routing_that_depends_on_the_input_is_not_merged():
    model = injected()
    expected = model(*batch())
    message = (
        "merge: expected constant routing, got input-dependent TopKRouter. "
        "Use collapse_to_lora, bake_router or export_expert"
    )
    with pytest.raises(MergeError) as caught:
        merge(model)
    assert str(caught.value) == message and isinstance(caught.value, ValueError)
    assert torch.equal(model(*batch()), expected)
    sigmoid = injected(
        expert_names=["a"], ranks=[3], losses=[],
        router_arguments={"top_k": 1, "score": "sigmoid", "renormalize": False},
    )  # fmt: skip
    with pytest.raises(MergeError, match="constant routing"):
        merge(sigmoid)


def test_weights_that_cannot_be_merged_into():
    model = constant()
    model.lm_head.weight = model.layers[0].self_attn.q_proj.base_layer.weight
    with pytest.raises(MergeError, match=r"expected a weight of one module, got .*lm_head"):
        merge(model)
    model = constant()
    last = list(layers_of(model).values())[-1]
    last.routed_B["default"]["sql"].weight.data.fill_(torch.inf)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MergeError, match="expected finite weights"):
        merge(model)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    last.base_layer.weight.data = last.base_layer.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(MergeError, match="expected a layer with a weight of floating numbers"):
        merge(model)


@pytest.mark.parametrize("scope", ["module", "block"])
@pytest.mark.parametrize("router", ["TopKRouter", "SoftRouter"])
def test_routers_are_baked_at_their_mean(router, scope):
    arguments = {"top_k": 2} if router == "TopKRouter" else {}
    model = injected(router=router, router_arguments=arguments, router_scope=scope)
    tr.follow_inputs(model)
    batches = [{"input_ids": ids, "attention_mask": mask} for ids, mask in map(batch, (2, 3))]
    means = {}
    for values in batches:
        with tr.collect(model) as routings:
            model(**values)
        for name, routing in zip(routings.names, routings):
            real = values["attention_mask"].bool()
            dense = torch.zeros(*real.shape, 3)
            if routing.indices is None:
                dense = routing.weights
            else:
                dense.scatter_(-1, routing.indices.clamp(min=0), routing.weights)
            means.setdefault(name, []).append(dense[real])
    tr.lora.bake_router(model, batches)
    for name, rows in means.items():
        baked = model.get_submodule(name).constant_weights
        assert_close(baked, torch.cat(rows).mean(0))
    assert model.routed_lora["default"].router == "ConstantRouter"
    ids, _ = batch()
    expected = model(ids)
    assert_close(merge(model)(ids), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="bake_router: expected batches with tokens"):
        tr.lora.bake_router(injected(), [])
