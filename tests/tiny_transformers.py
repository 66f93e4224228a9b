"""Mixture-of-experts models of Transformers, with random weights and two layers."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

VERSION = int(transformers.__version__.split(".")[0])
VOCAB = 32
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
CHOICE = {"num_experts": 4, "num_experts_per_tok": 2}
SMALL = {"moe_intermediate_size": 16, "decoder_sparse_step": 1, **CHOICE}

#: The name of the model in Transformers, and what its configuration has besides `SIZES`.
MODELS = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Moe", {"shared_expert_intermediate_size": 20, **SMALL}),
    "qwen2-norm": (
        "Qwen2Moe",
        {"shared_expert_intermediate_size": 20, "norm_topk_prob": True, **SMALL},
    ),
    "qwen3": ("Qwen3Moe", {"norm_topk_prob": True, "head_dim": 8, **SMALL}),
    "olmoe": ("Olmoe", {"norm_topk_prob": False, **CHOICE}),
    "deepseek": (
        "DeepseekV3",
        {
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "routed_scaling_factor": 2.5,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "layer_types": ["full_attention"] * 2,
        },
    ),
}


def tiny(name, dtype=torch.float32, **options):
    """The same weights at each call, of a size at which routing matters."""
    prefix, settings = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **settings, **options})
    torch.manual_seed(1)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            nn.init.uniform_(buffer, 0, 0.4)
    return model.to(dtype).eval()


def batch(samples=2, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (samples, length), generator=generator)


def blocks_of(model):
    """The layers with experts."""
    return [m for m in model.modules() if hasattr(m, "experts")]


def gate_of(block):
    return block.router if hasattr(block, "router") else block.gate
