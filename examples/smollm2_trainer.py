"""A mixture of LoRAs in a pretrained language model, under the stock Trainer of Transformers.

    make models
    python examples/smollm2_trainer.py  # --preset quick: does everything run?

SmolLM2 (135 million parameters) reads the Bible, film reviews and Python. Leaves the mixture in
``smollm2-results/mixture``; ``--peft`` makes and saves it by PEFT, in the same files.
"""

import sys

import peft
import torch

import torch_routers as tr
from smollm2.settings import PRESETS, parser
from smollm2.text import DOMAINS, read_rows
from smollm2.train import PROMPTS, generate, perplexities, table, trainer_of
from smollm2.weights import load_model, load_tokenizer
from torch_routers.ablation.errors import AblationError
from torch_routers.integrations.peft import RoutedLoraPeftConfig
from torch_routers.integrations.transformers import RoutingCallback, attach_to_loss


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--peft", action="store_true", help="make the mixture by PEFT")
    options = arguments.parse_args()
    settings = PRESETS[options.preset]
    torch.manual_seed(0)
    tokenizer, model = load_tokenizer(), load_model()
    rows = read_rows(
        tokenizer, DOMAINS, train=settings.train, test=settings.test, length=settings.length
    )
    found = {"SmolLM2": perplexities(model, rows)}

    config = tr.lora.lora_preset(
        "molora",
        num_experts=4,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        router_scope="block",
        losses=[tr.losses.ZLoss(1e-3)],
    )
    if options.peft:
        model = peft.get_peft_model(model, RoutedLoraPeftConfig.from_routed(config))
    else:
        print(tr.lora.inject(model, config))
    tr.follow_inputs(model)
    tr.lora.print_trainable_parameters(model)

    everything = torch.cat([rows[domain]["train"] for domain in DOMAINS])
    trainer = trainer_of(model, everything, settings, options.out)
    attach_to_loss(model)  # the Trainer has moved the model to its device
    trainer.add_callback(RoutingCallback(log_every=max(1, settings.steps // 2)))
    trainer.train()
    if options.peft:
        model.save_pretrained(options.out / "mixture")
    else:
        tr.lora.save_adapter(model, options.out / "mixture")

    found["MoLoRA"] = perplexities(model, rows)
    print("Perplexity on test text:", table(found), sep="\n\n")
    routers = [line for line in trainer.state.log_history if "router/" in " ".join(line)]
    for line in routers:
        shares = [value for name, value in line.items() if name.endswith("/entropy")]
        print(f"Step {line['step']}: entropy of the routers {sum(shares) / len(shares):.3f} of 1")
    texts, _ = generate(model, tokenizer, PROMPTS, settings.tokens)
    for prompt, text in zip(PROMPTS, texts):
        print(f"\n{prompt}{text}")


if __name__ == "__main__":
    try:
        main()
    except AblationError as error:
        sys.exit(str(error))
