"""What the examples with SmolLM2 have in common: the Trainer, perplexity, generation."""

import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from smollm2.settings import Settings

BATCH = 8
PROMPTS = ("In the beginning", "I saw this film with my family, and", "import os\n\ndef")
"""Of different lengths, one for each domain."""


def examples(rows: Tensor) -> list[dict[str, Tensor]]:
    """Rows without padding, as the Trainer wants them."""
    return [
        {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows
    ]


def trainer_of(model: nn.Module, rows: Tensor, settings: Settings, folder: Path) -> Trainer:
    """The stock Trainer: two micro-batches in a step, nothing saved, nothing reported elsewhere."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=2,
        learning_rate=settings.learning_rate,
        warmup_steps=max(1, settings.steps // 20),
        lr_scheduler_type="cosine",
        logging_steps=max(1, settings.steps // 6),
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        seed=0,
    )
    return Trainer(model=model, args=arguments, train_dataset=examples(rows))


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor) -> float:
    """Of the tokens of rows ``[rows, length]`` but the first of each."""
    model.eval()
    losses = []
    for part in rows.split(BATCH):
        ids = part.to(model.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
        losses.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"))
    return math.exp(torch.cat(losses).mean())


def perplexities(model: nn.Module, rows: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """On the test rows of every domain."""
    return {domain: perplexity(model, parts["test"]) for domain, parts in rows.items()}


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str] | tuple[str, ...],
    tokens: int,
) -> tuple[list[str], float]:
    """What follows each prompt, and seconds for a token; prompts are padded on the left.

    The most probable token each time, with the cache of keys and values.
    """
    model.eval()
    batch = tokenizer(list(prompts), padding=True, return_tensors="pt").to(model.device)
    options = {"do_sample": False, "use_cache": True, "min_new_tokens": tokens}
    start = time.perf_counter()
    ids = model.generate(**batch, max_new_tokens=tokens, **options)
    seconds = time.perf_counter() - start
    texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts, seconds / tokens


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a line for each name, and the same columns in all."""
    columns = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for name, values in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{values[c]:.2f}' for c in columns)} |")
    return "\n".join(lines)
