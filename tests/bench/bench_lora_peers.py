"""Mixtures of LoRAs against published implementations, each where its package can be imported.

X-LoRA of PEFT, mixlora 0.2.3, and moe_peft 2.0.2, whose requirements are old, but which runs with
newer packages: ``pip install --no-deps mixlora moe_peft evaluate``. All compute the same function
as ours, of the same parameters, without dropout; forward rows are without gradients. Eight experts
of rank 16; frozen layers, and routers where there is one, are part of all times.

The last two packages refuse a dropout of 0, and keep their LoRAs where ``eval()`` does not reach
them: what they have is switched off by hand.
"""

import copy
import importlib
import tempfile
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

import torch_routers as tr

from .bench_lora_layers import ALPHA, EXPERTS, HIDDEN, RANK, adapters, layer, row, trained
from .harness import Options, Row

INTERMEDIATE, TOP_K, SAMPLES = 2048, 2, 4
MLP = ["gate_proj", "up_proj", "down_proj"]
SIZES = {"r": RANK, "lora_alpha": ALPHA, "num_experts": EXPERTS}
#: What the packages of MixLoRA's authors are told.
THEIR_SIZES = {**SIZES, "lora_dropout": 0.05, "top_k": TOP_K, "target_modules": MLP}


def rows(options: Options) -> Iterator[Row]:
    packages = [imported(name) for name in ("peft", "transformers", "mixlora.model", "moe_peft")]
    peft, transformers, mixlora, moe_peft = packages
    for tokens in (64,) if options.quick else (64, 4096):
        for backward in False, True:
            if peft is not None:
                yield x_lora(peft, None, tokens, backward)
                yield x_lora(peft, TOP_K, tokens, backward)
            if peft is not None and transformers is not None:
                yield x_lora_model(peft, transformers, tokens, backward)
            if mixlora is not None:  # which needs Transformers
                yield mixlora_mlp(transformers, mixlora, moe_peft, tokens, backward)
            if moe_peft is not None:
                for name in "loramoe", "mola":
                    yield of_moe_peft(moe_peft, name, tokens, backward)


def imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:  # an optional package, or one that misses another
        return None


def hidden_states(tokens: int) -> torch.Tensor:
    return torch.randn(SAMPLES, tokens // SAMPLES, HIDDEN)


# ---- X-LoRA of PEFT ------------------------------------------------------------------------------


class GivenRouter(tr.Router, register=False):
    """A decision that is there already, as each layer finds it in X-LoRA."""

    scalings: torch.Tensor

    def __init__(self, top_k: int | None) -> None:
        super().__init__(EXPERTS)
        self.top_k = top_k

    def route(self, x, *, valid_mask, **context):
        if self.top_k is None:
            return tr.Routing(self.scalings)
        return tr.Routing(*self.scalings.topk(self.top_k))


def x_lora(peft, top_k: int | None, tokens: int, backward: bool) -> Row:
    """One layer with weights that are given; with `top_k`, the largest, not renormalised.

    PEFT selects them anew in each layer. So does ours here, which would do it once for a model.
    PEFT computes all experts for all tokens even then: inputs of the others are multiplied by 0.
    """
    from peft.tuners.xlora.layer import XLoraLinearLayer

    model, made = layer(router="SoftRouter")
    names, pairs = made.experts("default"), adapters(made)
    router = GivenRouter(top_k)
    made.scope("default").replace_router(router, [made], "default")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
    base = nn.Sequential(copy.deepcopy(made.base_layer))
    theirs = peft.get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        theirs.add_adapter(name, config)
    theirs.base_model.set_adapter(names)
    inner = theirs.base_model.model[0]
    for name, (a, b) in zip(names, pairs):
        inner.lora_A[name].weight, inner.lora_B[name].weight = a.weight, b.weight
    config = peft.XLoraConfig(
        hidden_size=HIDDEN, adapters=dict.fromkeys(names, ""), top_k_lora=top_k
    )
    of_peft = XLoraLinearLayer(SimpleNamespace(disabled=False), inner, inner.forward, 0, config)

    def inputs():
        x = hidden_states(tokens)
        return x, torch.randn(*x.shape[:-1], EXPERTS).softmax(-1)

    def ours(x, scalings):
        router.scalings = scalings
        return (model(x),)

    return row(
        "layer, X-LoRA,",
        tokens,
        backward,
        inputs,
        ours,
        {"PEFT": lambda x, scalings: (of_peft.forward(x, scalings=scalings.unsqueeze(2)),)},
        trained(*(module for pair in pairs for module in pair)),
        slots=top_k or EXPERTS,
    )


def x_lora_model(peft, transformers, tokens: int, backward: bool) -> Row:
    """A small Llama, both passes included. The experts are frozen: only the router has a gradient.

    The bias of PEFT's router, which ours does not have, is 0. PEFT's first pass computes the
    experts too, with inputs multiplied by 0.
    """
    vocabulary = 1000
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=False
    )
    with tempfile.TemporaryDirectory() as folder:
        # PEFT knows the adapters by their numbers alone.
        folders = {str(e): f"{folder}/{e}" for e in range(EXPERTS)}
        for path in folders.values():
            peft.get_peft_model(copy.deepcopy(model), lora).save_pretrained(path)
        theirs = peft.get_peft_model(
            copy.deepcopy(model),
            peft.XLoraConfig(
                task_type="CAUSAL_LM", hidden_size=config.hidden_size, adapters=folders
            ),
        )
        tr.lora.from_adapters(model, folders, **tr.lora.adapter_preset("xlora"))
    tr.lora.two_passes(model)
    (gate,) = trained(model)
    classifier = theirs.base_model.internal_xlora_classifier.layers[0]
    classifier.weight = gate
    nn.init.zeros_(classifier.bias)
    return row(
        "Llama of two layers, X-LoRA,",
        tokens,
        backward,
        lambda: (torch.randint(vocabulary, (SAMPLES, tokens // SAMPLES)),),
        lambda ids: (model(input_ids=ids).logits,),
        {"PEFT": lambda ids: (theirs(input_ids=ids).logits,)},
        (gate,),
    )


# ---- MixLoRA, by its authors' two packages -------------------------------------------------------


def mixlora_mlp(transformers, mixlora, moe_peft, tokens: int, backward: bool) -> Row:
    """The feed-forward network of a Llama; mixlora is made for inference, but has gradients.

    The same function everywhere: the two best experts, renormalised, each with a nonlinearity and a
    second layer of its own; the frozen first layers are computed once for all experts.
    """
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, hidden_act="silu"
    )
    torch.manual_seed(0)
    model = nn.Sequential(transformers.models.llama.modeling_llama.LlamaMLP(config)).eval()
    base = copy.deepcopy(model[0]).requires_grad_(False)
    preset = tr.lora.lora_preset("mixlora", **SIZES, lora_dropout=0.0, init_lora_weights=False)
    tr.lora.inject(model, preset)
    layers = {name: getattr(model[0], name) for name in MLP}
    gate = layers["gate_proj"].scope("default").router.weight
    baselines = {"mixlora": of_mixlora(mixlora, base, layers, gate)}
    if moe_peft is not None:
        baselines["moe_peft"] = mixlora_of_moe_peft(moe_peft, base, layers, gate)
    return row(
        "MLP, MixLoRA,",
        tokens,
        backward,
        lambda: (hidden_states(tokens),),
        lambda x: (model(x),),
        baselines,
        trained(model),
        slots=TOP_K,
    )


def of_mixlora(mixlora, base: nn.Module, layers: dict, gate: nn.Parameter) -> Callable:
    config = mixlora.MixLoraConfig.from_config(
        {
            **THEIR_SIZES, "peft_type": "MIXLORA", "routing_strategy": "mixlora", "act_fn": "silu",
            "base_model_name_or_path": "", "task_type": "CAUSAL_LM",
        }
    )  # fmt: skip
    config.model_type_, config.dtype_ = "llama", torch.float32
    moe = mixlora.MixLoraSparseMoe(base, config)
    moe.gate_ = gate
    for name, made in layers.items():
        for expert in made.experts("default"):
            lora = mixlora.LoraLinear(getattr(base, name), config).eval()
            lora.lora_A.weight, lora.lora_B.weight = made.factors("default", expert)
            moe.experts_[f"experts.{expert}.{name}"] = lora
    return lambda x: (moe(x),)


def mixlora_of_moe_peft(moe_peft, base: nn.Module, layers: dict, gate: nn.Parameter) -> Callable:
    from moe_peft.common import FeedForward
    from moe_peft.models.modeling_llama import LlamaMLP

    config = moe_peft.adapter_factory(
        "MIXLORA", "default", **THEIR_SIZES, routing_strategy="mixlora", act_fn="silu"
    )
    sizes = SimpleNamespace(device_="cpu", hidden_act_="silu")
    mlp = LlamaMLP(base.gate_proj, base.down_proj, base.up_proj, sizes)
    for name, linear in mlp.state_dict().items():
        add_experts(linear, config, layers[name])
    network = FeedForward(mlp)
    network.moes_["default"] = router_of(moe_peft, config, gate)
    call = call_of(moe_peft)
    return lambda x: (network(x, call)[0],)


# ---- one layer of moe_peft -----------------------------------------------------------------------


def of_moe_peft(moe_peft, name: str, tokens: int, backward: bool) -> Row:
    """LoRAMoE, a softmax over all experts, and MoLA, the two best renormalised."""
    sparse = {"router": "TopKRouter", "router_arguments": {"top_k": TOP_K}}
    model, made = layer(**({"router": "SoftRouter"} if name == "loramoe" else sparse))
    config = moe_peft.adapter_factory(name.upper(), "default", **THEIR_SIZES)
    linear = moe_peft.common.Linear(copy.deepcopy(made.base_layer), "cpu")
    add_experts(linear, config, made)
    linear.moes_["default"] = router_of(moe_peft, config, made.scope("default").router.weight)
    call = call_of(moe_peft)
    return row(
        f"layer, {'LoRAMoE' if name == 'loramoe' else 'MoLA'},",
        tokens,
        backward,
        lambda: (hidden_states(tokens),),
        lambda x: (model(x),),
        {"moe_peft": lambda x: (linear(x, call),)},
        trained(model),
        slots=EXPERTS if name == "loramoe" else TOP_K,
    )


def add_experts(linear, config, made: tr.lora.RoutedLoraLinear) -> None:
    """The experts of ours, of the same parameters."""
    for e, expert in enumerate(made.experts("default")):
        of_expert = config.expert_config(e)
        linear.init_lora_weight(of_expert)
        lora = linear.loras_[of_expert.adapter_name].eval()
        lora.lora_a_.weight, lora.lora_b_.weight = made.factors("default", expert)


def router_of(moe_peft, config, gate: nn.Parameter) -> nn.Module:
    moe = moe_peft.adapters.moe_layer_factory(HIDDEN, "cpu", config)
    moe.gate_.weight = gate
    return moe


def call_of(moe_peft):
    """What a call says of its samples: that one adapter is for all of them."""
    samples = moe_peft.LLMBatchConfig("default", 0, SAMPLES)
    return moe_peft.LLMModelInput(batch_configs_=[samples], inference_mode_=True)
