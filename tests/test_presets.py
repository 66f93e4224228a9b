"""The presets, against the Transformers block of the same name with the same weights."""

import pytest
import torch
from torch.testing import assert_close

import torch_routers as tr

transformers = pytest.importorskip("transformers")
H, EXPERTS, SIZE, SHARED = 16, 8, 12, 20

# Name: (block, configuration, arguments of ours). Tiny, with the structure of the released model.
COMMON = {"hidden_size": H, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
BLOCKS = {
    "mixtral": (
        "mixtral.modeling_mixtral.MixtralSparseMoeBlock",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": SIZE},
        {},
    ),
    "olmoe": (
        "olmoe.modeling_olmoe.OlmoeSparseMoeBlock",
        {"num_experts": EXPERTS, "num_experts_per_tok": 3, "intermediate_size": SIZE},
        {"top_k": 3},
    ),
    "qwen2_moe": (
        "qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
        {
            "num_experts": EXPERTS,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": SIZE,
            "shared_expert_intermediate_size": SHARED,
        },
        {"shared_size": SHARED},
    ),
    "qwen3_moe": (
        "qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
        {
            "num_experts": EXPERTS,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": SIZE,
            "norm_topk_prob": True,
        },
        {"top_k": 3},
    ),
    "granitemoe": (
        "granitemoe.modeling_granitemoe.GraniteMoeMoE",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": SIZE},
        {},
    ),
    "gpt_oss": (
        "gpt_oss.modeling_gpt_oss.GptOssMLP",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 4, "intermediate_size": SIZE},
        {},
    ),
    "llama4": (
        "llama4.modeling_llama4.Llama4TextMoe",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 1, "intermediate_size": SIZE},
        {},
    ),
    "glm4_moe": (
        "glm4_moe.modeling_glm4_moe.Glm4MoeMoE",
        {
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": SIZE,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        },
        {"top_k": 3},
    ),
    "deepseek_v2": (
        "deepseek_v2.modeling_deepseek_v2.DeepseekV2Moe",
        {
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": SIZE,
            "n_shared_experts": 2,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
        },
        {"top_k": 3, "num_groups": 4, "topk_group": 2, "scale": 1.5, "shared_size": 2 * SIZE},
    ),
    "deepseek_v3": (
        "deepseek_v3.modeling_deepseek_v3.DeepseekV3MoE",
        {
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": SIZE,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
        {"top_k": 3, "num_groups": 4, "topk_group": 2},
    ),
    "switch": (
        "switch_transformers.modeling_switch_transformers.SwitchTransformersSparseMLP",
        {
            "d_model": H,
            "d_ff": SIZE,
            "num_experts": EXPERTS,
            "expert_capacity": 3,
            "router_jitter_noise": 0.0,
            "dropout_rate": 0.0,
        },
        {"capacity": 3, "jitter": 0.0},
    ),
}


def block_of(name):
    path, options, _ = BLOCKS[name]
    module, cls = path.rsplit(".", 1)
    module = __import__(f"transformers.models.{module}", fromlist=[cls])
    configs = [n for n in dir(module) if n.endswith("Config") and n != "PreTrainedConfig"]
    config_class = getattr(module, next((n for n in configs if "Text" in n), configs[0]))
    options = options if name == "switch" else COMMON | options
    config = config_class(**options)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    block = getattr(module, cls)(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.4)
        for key, buffer in block.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(torch.linspace(-0.3, 0.3, EXPERTS).roll(3))
    return block.double() if name != "switch" else block


def weights_of(name, block):
    """The state of the block under our names."""
    state = dict(block.state_dict())
    ours = {}
    for key, value in state.items():
        key = key.replace("gate.e_score_correction_bias", "router.expert_bias")
        key = key.replace("shared_experts.", "shared.").replace("shared_expert.", "shared.")
        key = key.replace("shared_expert_gate.", "shared_gate.")
        if key.startswith("gate."):
            key = "router." + key.removeprefix("gate.")
        ours[key] = value
    if name == "gpt_oss":  # [experts, in, out], gate and up interleaved
        gate_up = ours["experts.gate_up_proj"].transpose(1, 2)
        ours["experts.gate_up_proj"] = torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], 1)
        bias = ours["experts.gate_up_proj_bias"]
        ours["experts.gate_up_proj_bias"] = torch.cat([bias[:, ::2], bias[:, 1::2]], 1)
        ours["experts.down_proj"] = ours["experts.down_proj"].transpose(1, 2)
    if name == "llama4":
        for key in "experts.gate_up_proj", "experts.down_proj":
            ours[key] = ours[key].transpose(1, 2)
    if name == "switch":
        ours = {
            "router.weight": state["router.classifier.weight"],
            "experts.up_proj": torch.stack(
                [state[f"experts.expert_{e}.wi.weight"] for e in range(EXPERTS)]
            ),
            "experts.down_proj": torch.stack(
                [state[f"experts.expert_{e}.wo.weight"] for e in range(EXPERTS)]
            ),
        }
    return ours


@pytest.mark.parametrize("name", BLOCKS)
def test_equals_the_block_of_transformers(name):
    block = block_of(name)
    moe = tr.create_moe(name, H, SIZE, num_experts=EXPERTS, **BLOCKS[name][2])
    moe = moe.to(next(block.parameters()).dtype)
    moe.load_state_dict(weights_of(name, block))
    x = torch.randn(3, 40, H, dtype=next(block.parameters()).dtype)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, actual = block(inputs[0]), moe(inputs[1])
    if isinstance(expected, tuple):  # with logits or scores
        expected = expected[0].view(x.shape)
    if name == "switch":
        assert (moe.router(x).indices < 0).any()
    # Their scores are float32 inside a float64 block.
    close = {"rtol": 1e-4, "atol": 1e-5}
    assert_close(actual, expected, **close)
    (expected**2).sum().backward()
    (actual**2).sum().backward()
    assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-3, atol=1e-4)
    for parameter in block.parameters():  # their gradients, under our names
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = weights_of(name, block)
    for key, parameter in moe.named_parameters():
        assert_close(parameter.grad, gradients[key], rtol=1e-3, atol=1e-3, msg=key)


@pytest.mark.parametrize("name", tr.list_presets())
def test_presets_build_and_describe_themselves(name):
    router = tr.create_router(name, hidden_size=H)
    again = tr.from_config(router.config())
    assert again.config() == router.config()
    sizes = {"num_experts": EXPERTS, "top_k": min(3, router.top_k)}
    if router.num_groups > 1:
        sizes |= {"num_groups": 4, "topk_group": 2}
    moe = tr.create_moe(name, H, SIZE, cross_batch="allow", **sizes).eval()
    assert moe(torch.randn(2, 5, H)).shape == (2, 5, H)


def test_errors():
    with pytest.raises(ValueError, match=r"create_moe: expected one of \['deepseek_v2', .* 'x'"):
        tr.create_moe("x", H, SIZE)
    with pytest.raises(ValueError, match=r"create_moe: expected shared_size for a model with"):
        tr.create_moe("mixtral", H, SIZE, shared_size=4)
    with pytest.raises(ValueError, match=r"create_router: expected one of .*'mixtral'.*got 'x'"):
        tr.create_router("x", hidden_size=H)
