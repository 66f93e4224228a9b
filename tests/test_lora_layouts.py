"""LoRAs of fused experts: two orders of columns under the same keys."""

import itertools
import json

import pytest
import torch
from torch import nn

import torch_routers as tr

pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file

from torch_routers.lora import (
    LowRank,
    convert_target_parameters,
    experts_from_target_parameters,
    read_target_parameters,
    target_parameters_from_experts,
)

LAYOUTS = ("rank_major", "expert_major")
EXPERTS, RANK, HIDDEN, INNER = 3, 2, 8, 5
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PARAMETERS = ["gate_up_proj", "down_proj"]


def stacked(dtype=torch.float32):
    a, b = torch.randn(EXPERTS * RANK, HIDDEN), torch.randn(INNER, EXPERTS * RANK)
    return a.to(dtype), b.to(dtype)


def read(a, b, layout, **options):
    return experts_from_target_parameters(a, b, num_experts=EXPERTS, layout=layout, **options)


def column(layout, expert, rank):
    return rank * EXPERTS + expert if layout == "rank_major" else expert * RANK + rank


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_are_those_of_a_loop(layout):
    a, b = stacked()
    experts = read(a, b, layout, scaling=0.5)
    assert len(experts) == EXPERTS
    for e, expert in enumerate(experts):
        assert expert.A.shape == (RANK, HIDDEN) and expert.B.shape == (INNER, RANK)
        assert expert.scaling == 0.5
        for r in range(RANK):
            assert torch.equal(expert.A[r], a[e * RANK + r])
            assert torch.equal(expert.B[:, r], b[:, column(layout, e, r)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_and_factors_come_back_to_the_bit(layout, dtype):
    a, b = stacked(dtype)
    experts = read(a, b, layout, scaling=2.0)
    again = target_parameters_from_experts(experts, layout=layout)
    assert torch.equal(again.A, a) and torch.equal(again.B, b) and again.scaling == 2.0
    assert again.A.dtype == again.B.dtype == dtype
    experts[0].A.zero_(), experts[0].B.zero_()
    assert not (a[0] == 0).any() and not (b[:, 0] == 0).any()  # they are copies


def test_the_wrong_layout_means_other_experts():
    a, b = stacked()
    right, wrong = (read(a, b, layout) for layout in LAYOUTS)
    deltas = [torch.stack([e.B @ e.A for e in experts]) for experts in (right, wrong)]
    assert (deltas[0] - deltas[1]).norm() > 0.5 * deltas[0].norm()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: read(a, b, "peft"), "experts_from_target_parameters: expected layout among"),
        (lambda a, b: target_parameters_from_experts([LowRank(a, b, 1.0)], layout="x"),
         "target_parameters_from_experts: expected layout among"),
        (lambda a, b: read(a[1:], b, "rank_major"), r"got \[5, 8\] and \[5, 6\] with num_exp"),
        (lambda a, b: read(a[:4], b[:, :4], "rank_major"), r"got \[4, 8\] and \[5, 4\]"),
        (lambda a, b: read(a[:0], b[:, :0], "rank_major"), r"got \[0, 8\] and \[5, 0\]"),
        (lambda a, b: read(a[0], b, "rank_major"), r"got \[8\] and \[5, 6\]"),
        (lambda a, b: experts_from_target_parameters(a, b, num_experts=0, layout="rank_major"),
         "num_experts=0"),
        (lambda a, b: target_parameters_from_experts([], layout="rank_major"), "got none"),
        (lambda a, b: target_parameters_from_experts(
            [LowRank(a, b, 1.0), LowRank(a, b, 2.0)], layout="rank_major"), "one shape"),
    ],
)  # fmt: skip
def test_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(*stacked())


def test_the_layout_has_no_default():
    for function in (
        experts_from_target_parameters, target_parameters_from_experts, read_target_parameters,
        convert_target_parameters,
    ):  # fmt: skip
        names = ("source", "target") if function is convert_target_parameters else ("layout",)
        assert not set(names) & set(function.__kwdefaults__ or ())


# ---- PEFT ----------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Fused experts, ``[E, out, in]``, or ``[E, in, out]`` where transposed."""

    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        for name, rows, columns in (
            ("gate_up_proj", 2 * INNER, HIDDEN),
            ("down_proj", HIDDEN, INNER),
        ):
            shape = (columns, rows) if is_transposed else (rows, columns)
            setattr(self, name, nn.Parameter(torch.randn(EXPERTS, *shape)))


def fused_model(is_transposed=False):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(HIDDEN, HIDDEN)) for _ in range(2)]
    for layer in layers:
        layer.add_module("experts", Experts(is_transposed))
    return nn.Sequential(*layers)


@pytest.fixture
def saved(tmp_path):
    """An adapter of PEFT, and the model in which PEFT has it."""
    peft = pytest.importorskip("peft", "0.21")

    def save(is_transposed=False, **options):
        options = {"r": RANK, "lora_alpha": 3, "init_lora_weights": False, **options}
        config = peft.LoraConfig(
            target_modules=["0.0"],
            target_parameters=[f"experts.{name}" for name in PARAMETERS],
            **options,
        )
        model = peft.get_peft_model(fused_model(is_transposed), config)
        model.save_pretrained(tmp_path / "peft")
        return model, tmp_path / "peft"

    return save


def deltas_of_peft(model):
    """What PEFT adds to each parameter, by its name, as ``[E, out, in]``."""
    deltas = {}
    for name, module in model.get_base_model().named_modules():
        if type(module).__name__ == "ParamWrapper":
            delta = module.get_delta_weight("default")
            is_transposed = module.get_base_layer().is_transposed
            key = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
            deltas[key] = (delta.mT if is_transposed else delta).detach()
    return deltas


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("rank_pattern", [{}, {"1.experts.down_proj": 4}])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_is_read_is_what_peft_computes(saved, is_transposed, rank_pattern, use_rslora):
    model, folder = saved(is_transposed, rank_pattern=rank_pattern, use_rslora=use_rslora)
    found = read_target_parameters(folder, PARAMETERS, num_experts=EXPERTS, layout="rank_major")
    expected = deltas_of_peft(model)
    assert found.keys() == expected.keys() and len(found) == 4
    for name, experts in found.items():
        for expert, delta in zip(experts, expected[name], strict=True):
            torch.testing.assert_close(expert.scaling * expert.B @ expert.A, delta)


def test_a_folder_is_converted_there_and_back_to_the_bit(saved, tmp_path):
    model, folder = saved()
    layouts = dict(zip(("source", "target"), LAYOUTS))
    convert_target_parameters(folder, tmp_path / "unsloth", num_experts=EXPERTS, **layouts)
    before, there = (load_file(tmp_path / name / WEIGHTS) for name in ("peft", "unsloth"))
    assert before.keys() == there.keys()
    for key, value in there.items():
        is_moved = "experts" in key and "lora_B" in key
        assert torch.equal(value, before[key]) != is_moved, key
    unsloth = read_target_parameters(
        tmp_path / "unsloth", PARAMETERS, num_experts=EXPERTS, layout="expert_major"
    )
    for name, delta in deltas_of_peft(model).items():
        for e, r in itertools.product(range(EXPERTS), range(RANK)):
            depth = ".base_layer" if "gate_up" in name else ""
            module = name.rpartition(".")[0]
            b = there[f"base_model.model.{module}{depth}.lora_B.weight"]
            assert torch.equal(b[:, e * RANK + r], unsloth[name][e].B[:, r])
        torch.testing.assert_close(torch.stack([1.5 * e.B @ e.A for e in unsloth[name]]), delta)
    back = dict(zip(("source", "target"), LAYOUTS[::-1]))
    convert_target_parameters(tmp_path / "unsloth", tmp_path / "b", num_experts=EXPERTS, **back)
    again = load_file(tmp_path / "b" / WEIGHTS)
    assert all(torch.equal(value, again[key]) for key, value in before.items())
    configs = [json.loads((tmp_path / name / CONFIG).read_text()) for name in ("peft", "b")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("function", ["read", "convert"])
def test_folders_that_do_not_fit(function, saved, tmp_path):
    _, folder = saved()

    def call(num_experts=EXPERTS, parameters=PARAMETERS, into=tmp_path / "into"):
        if function == "read":
            return read_target_parameters(
                folder, parameters, num_experts=num_experts, layout="rank_major"
            )
        layouts = {"source": "rank_major", "target": "expert_major"}
        return convert_target_parameters(folder, into, num_experts=num_experts, **layouts)

    caller = f"{function}_target_parameters"
    with pytest.raises(
        ValueError, match=rf"{caller}: expected experts of rank \[2\].*got 3. Is num"
    ):
        call(num_experts=2)
    if function == "read":
        with pytest.raises(
            ValueError, match=r"expected parameters \['down_proj', 'gate_up_proj'\]"
        ):
            call(parameters=["down_proj"])
    else:
        with pytest.raises(ValueError, match="expected into to be another folder"):
            call(into=folder / ".." / "peft")
    tensors = load_file(folder / WEIGHTS)
    if function == "read":
        save_file({k: t for k, t in tensors.items() if "base_layer" not in k}, folder / WEIGHTS)
        with pytest.raises(ValueError, match=r"expected 2 parameters of 0\.experts, got 1 in"):
            call()
    save_file({k: t for k, t in tensors.items() if "experts" not in k}, folder / WEIGHTS)
    with pytest.raises(
        ValueError, match=f"{caller}: expected factors of target_parameters, got none"
    ):
        call()
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | {"use_dora": True}))
    with pytest.raises(ValueError, match=f"{caller}: expected a plain LoRA, got DoRA"):
        call()
    assert not (tmp_path / "into").exists()


def test_a_reader_of_layers_names_the_one_for_parameters(saved):
    _, folder = saved()
    with pytest.raises(ValueError, match=r"got LoRA of parameters, for lora\.read_target_par"):
        tr.lora.read_peft_adapter(folder)
