"""LoRAs that PEFT trained, one for each kind of text, as experts: who decides among them?

    make models
    python examples/route_existing_loras.py  # --preset quick: does everything run?

Equal weights, a trained router and Arrow, which needs no training, beside each LoRA alone. Leaves
the LoRAs in ``smollm2-results/loras``, where a second run finds them, and ``routing.md``.
"""

import sys
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

import torch_routers as tr
from smollm2.settings import PRESETS, Settings, parser
from smollm2.text import DOMAINS, read_rows
from smollm2.train import PROMPTS, generate, perplexities, table, trainer_of
from smollm2.weights import load_model, load_tokenizer
from torch_routers.ablation.errors import AblationError
from torch_routers.integrations.transformers import attach_to_loss

MIXTURES = {
    "equal weights": {"router": "SoftRouter", "init": "zeros"},
    "trained router": {
        "router": "TopKRouter",
        "router_arguments": {"top_k": 2},
        "router_scope": "block",
        "losses": [tr.losses.LoadBalanceLoss(1e-3)],
    },
    "Arrow": {"init": "arrow", "router_arguments": {"top_k": 2}},
}


def adapter_of(domain: str, rows: Tensor, settings: Settings, out: Path) -> tuple[Path, nn.Module]:
    """The folder of a LoRA that PEFT trains on a domain, and the model with it."""
    folder = out / "loras" / domain
    if folder.exists():
        return folder, peft.PeftModel.from_pretrained(load_model(), folder)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(load_model(), config)
    trainer_of(model, rows, settings, out).train()
    model.save_pretrained(folder)
    return folder, model


def mixture_of(folders: dict[str, Path], rows: Tensor, settings: Settings, name: str) -> nn.Module:
    """SmolLM2 with the LoRAs as experts, and their router, trained if that is wanted."""
    model = load_model()
    tr.lora.from_adapters(model, folders, **MIXTURES[name])
    tr.follow_inputs(model)
    if name == "trained router":
        trainer = trainer_of(model, rows, settings, folders[DOMAINS[0]].parents[1])
        attach_to_loss(model)
        trainer.train()
    return model


def main() -> None:
    options = parser(__doc__).parse_args()
    settings = PRESETS[options.preset]
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    sizes = {"train": settings.train, "test": settings.test, "length": settings.length}
    rows = read_rows(tokenizer, DOMAINS, **sizes)
    everything = torch.cat([rows[domain]["train"] for domain in DOMAINS])
    found, folders = {}, {}

    def measure(name: str, model: nn.Module) -> None:
        _, seconds = generate(model, tokenizer, PROMPTS[:1], settings.tokens)
        found[name] = perplexities(model, rows) | {"ms/token": 1000 * seconds}

    measure("SmolLM2", load_model())
    for domain in DOMAINS:
        folders[domain], model = adapter_of(domain, rows[domain]["train"], settings, options.out)
        measure(f"LoRA of {domain}, by PEFT", model)
    for name in MIXTURES:
        model = mixture_of(folders, everything, settings, name)
        measure(name, model)
        texts, _ = generate(model, tokenizer, PROMPTS, settings.tokens)  # padded on the left
        print(f"\n{name}:", *(f"  {p}{t}" for p, t in zip(PROMPTS, texts)), sep="\n")
    report = f"Perplexity on test text, and time to decode at batch size 1:\n\n{table(found)}\n"
    (options.out / "routing.md").write_text(report, encoding="utf-8")
    print(f"\n{report}")


if __name__ == "__main__":
    try:
        main()
    except AblationError as error:
        sys.exit(str(error))
