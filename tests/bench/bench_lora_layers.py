"""A linear layer of 1024 features with a mixture of LoRAs, against the layers of PEFT.

Eight experts of rank 16, and one of rank 128; the frozen layer is part of all times. Rows of the
forward are without gradients.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import nn

import torch_routers as tr

from .bench_moe import grad_mode
from .harness import Options, Row, name_of

HIDDEN, EXPERTS, RANK, ALPHA = 1024, 8, 16, 16
TASKS = 5


def rows(options: Options) -> Iterator[Row]:
    try:
        import peft
    except ImportError:  # an optional package, and nothing to compare with
        return
    for tokens in (64,) if options.quick else (64, 4096):
        for backward in False, True:
            for make in plain, soft, arrow, poly:
                yield make(peft, tokens, backward)


def layer(**options) -> tuple[nn.Module, tr.lora.RoutedLoraLinear]:
    """A model of one layer with experts that do something."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN))
    config = tr.lora.RoutedLoraConfig(
        **{"r": RANK, "lora_alpha": ALPHA, "num_experts": EXPERTS, **options},
        target_modules=["0"],
        init_lora_weights=False,
    )
    tr.lora.inject(model, config)
    tr.follow_inputs(model)
    return model.eval(), model[0]


def adapters(made: tr.lora.RoutedLoraLinear) -> list[tuple[nn.Linear, nn.Linear]]:
    """The experts as pairs of linear layers, as PEFT has them, of the same parameters."""
    pairs = []
    for expert in made.experts("default"):
        pair = nn.Linear(HIDDEN, RANK, bias=False), nn.Linear(RANK, HIDDEN, bias=False)
        for linear, factor in zip(pair, made.factors("default", expert)):
            linear.weight = factor
        pairs.append(pair)
    return pairs


def trained(*modules: nn.Module) -> tuple[nn.Parameter, ...]:
    found = {p: None for module in modules for p in module.parameters() if p.requires_grad}
    return tuple(found)


def row(name, tokens, backward, inputs, ours, baselines, parameters, slots=EXPERTS) -> Row:
    return Row(
        name=name_of(name, backward, EXPERTS, slots, tokens),
        inputs=inputs,
        ours=grad_mode(ours, backward),
        baselines={name: grad_mode(f, backward) for name, f in baselines.items()},
        backward=backward,
        parameters=parameters,
        tolerance=1e-4,
        max_rounds=9 if tokens > 1000 else 1000,
        matmul_precision="medium",
    )


def plain(peft, tokens: int, backward: bool) -> Row:
    rank = EXPERTS * RANK
    model, made = layer(router="SoftRouter", num_experts=1, r=rank)
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(HIDDEN, HIDDEN)), config)
    inner = theirs.base_model.model[0]
    inner.base_layer.load_state_dict(made.base_layer.state_dict())
    a, b = made.factors("default", "0")
    inner.lora_A["default"].weight, inner.lora_B["default"].weight = a, b
    return row(
        "layer, one expert of rank 128,",
        tokens,
        backward,
        lambda: (torch.randn(tokens, HIDDEN),),
        lambda x: (model(x),),
        {"PEFT": lambda x: (theirs(x),)},
        (a, b),
    )


def soft(peft, tokens: int, backward: bool) -> Row:
    model, made = layer(router="SoftRouter")
    gate, pairs = made.scope("default").router.weight, adapters(made)

    def by_loop(x):
        y, p = made.base_layer(x), torch.softmax(x @ gate.T, -1)
        for e, (a, b) in enumerate(pairs):
            y = y + p[:, e, None] * (ALPHA / RANK * b(a(x)))
        return (y,)

    return row(
        "layer, all experts,",
        tokens,
        backward,
        lambda: (torch.randn(tokens, HIDDEN),),
        lambda x: (model(x),),
        {"loop over experts": by_loop},
        trained(model),
    )


def arrow(peft, tokens: int, backward: bool) -> Row:
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer

    model, made = layer(router="PrototypeRouter")
    tr.lora.arrow_prototypes(model)
    names = made.experts("default")
    theirs = ArrowLoraLinearLayer(
        HIDDEN,
        SimpleNamespace(
            top_k=3, router_temperature=1.0, rng_seed=0, use_gks=False, gks_adapter_names=[],
            task_adapter_names=names,
        ),
    )  # fmt: skip
    theirs.register_buffer("prototypes", made.scope("default").router.prototypes)
    factors = [dict(zip(names, linears)) for linears in zip(*adapters(made))]
    scaling, no_dropout = dict.fromkeys(names, ALPHA / RANK), nn.Identity()

    def of_peft(x):
        return (made.base_layer(x) + theirs(x, *factors, no_dropout, scaling),)

    return row(
        "layer, Arrow,",
        tokens,
        backward,
        lambda: (torch.randn(tokens, HIDDEN),),
        lambda x: (model(x),),
        {"PEFT": of_peft},
        trained(model),
    )


def poly(peft, tokens: int, backward: bool) -> Row:
    model, made = layer(
        router="PolyRouter", router_input="task", num_tasks=TASKS, mix="factors", lora_alpha=1
    )
    config = peft.PolyConfig(
        target_modules=["0"], r=RANK, n_tasks=TASKS, n_skills=EXPERTS, n_splits=1
    )
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(HIDDEN, HIDDEN)), config).eval()
    inner = theirs.base_model.model[0]
    inner.base_layer.load_state_dict(made.base_layer.state_dict())
    with torch.no_grad():
        inner.poly_router["default"].module_logits.copy_(made.scope("default").router.weight)
        for e, expert in enumerate(made.experts("default")):
            a, b = made.factors("default", expert)
            inner.poly_lora_A["default"][0, e].copy_(a.T)
            inner.poly_lora_B["default"][0, e].copy_(b.T)
    samples = 4

    def inputs():
        tasks = torch.randint(TASKS, (samples,))
        return torch.randn(samples, tokens // samples, HIDDEN), tasks

    def ours(x, tasks):
        return (model(x, routing_task_ids=tasks[:, None].expand(x.shape[:2])),)

    return row(
        "layer, Poly,",
        tokens,
        backward,
        inputs,
        ours,
        {"PEFT": lambda x, tasks: (inner(x, task_ids=tasks),)},
        (),
    )
