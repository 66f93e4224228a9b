"""One cell of the comparison: train one model, then measure it."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_routers as tr
from torch_routers.ablation.errors import AblationError
from torch_routers.ablation.model import LanguageModel
from torch_routers.ablation.presets import Settings
from torch_routers.ablation.rows import Row
from torch_routers.ablation.tokens import Sequences, TokenText, training_order
from torch_routers.metrics import active_experts, load_cv, mutual_information

WARM_UP = 0.05
"""The part of the steps in which the learning rate rises."""


def train_cell(
    row: Row,
    settings: Settings,
    text: TokenText,
    *,
    seed: int,
    learning_rate: float,
    on_step: Callable[[float], None],
) -> dict[str, Any]:
    """Trains one model and measures it on the validation and test text.

    Args:
        seed: of initialisation, batches and whatever a router draws.
        on_step: called after each step with the training bits per byte of its batch.

    Returns:
        What `run` stores: plain numbers and lists.

    Raises:
        AblationError: the training loss is no finite number.
    """
    model = LanguageModel(
        settings,
        vocab_size=len(text.token_bytes),
        seed=seed,
        feed_forward=row.feed_forward(settings, text.token_counts),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = time.process_time()
        curve = _train(model, settings, text, seed, learning_rate, on_step)
        cpu_seconds = time.process_time() - start
        validation = evaluate(model, text.splits["validation"], text, settings.batch)
        test = evaluate(model, text.splits["test"], text, settings.batch)
    total, active = _count_parameters(model, test["slots_per_token"])
    return {
        "test": test,
        "validation": {"bits_per_byte": validation["bits_per_byte"]},
        "cpu_seconds": cpu_seconds,
        "tokens_per_cpu_second": settings.steps * settings.batch * settings.sequence / cpu_seconds,
        "parameters": total,
        "active_parameters": active,
        "curve": [round(value, 4) for value in curve],
    }


def _train(
    model: nn.Module,
    settings: Settings,
    text: TokenText,
    seed: int,
    learning_rate: float,
    on_step: Callable[[float], None],
) -> list[float]:
    """The training bits per byte of each step."""
    training = text.splits["train"]
    order = training_order(len(training), steps=settings.steps, batch=settings.batch, seed=seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings.steps))
    biased = any(getattr(module, "expert_bias", None) is not None for module in model.modules())
    controller = tr.BalanceController(model) if biased else None
    curve = []
    model.train()
    for rows in order:
        inputs, targets = _inputs_and_targets(training.tokens[rows])
        with observe(model) as routings:
            nats = _nats(model(inputs), targets)
        loss = nats.mean()
        if any(routing.aux_loss is not None for routing in routings):
            loss = loss + routings.aux_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if controller is not None:
            controller.step()
        schedule.step()
        bits = bits_per_byte(nats.sum().item(), text.token_bytes[targets].sum().item())
        if not math.isfinite(bits):
            raise AblationError(
                f"ablation: expected a finite training loss, got {bits} at step {len(curve)}. "
                "Try a lower --learning-rates"
            )
        curve.append(bits)
        on_step(bits)
    return curve


def rate(step: int, steps: int) -> float:
    """The part of the learning rate at a step: up in a line, then down half a cosine to 0."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2


def bits_per_byte(nats: float, bytes_: int) -> float:
    """The code length of the text per byte: ``nats / ln 2 / bytes``."""
    return nats / math.log(2) / bytes_


@torch.no_grad()
def evaluate(model: nn.Module, sequences: Sequences, text: TokenText, batch: int) -> dict[str, Any]:
    """Bits per byte, overall and by domain, and where the tokens went.

    Returns:
        ``load``, ``[layers, domains, experts]`` slots, and what is computed from it are None for a
        model without routers.
    """
    domains = len(text.domains)
    nats = torch.zeros(domains, dtype=torch.float64)
    bytes_ = torch.zeros(domains, dtype=torch.int64)
    load: Tensor | None = None
    model.eval()
    # A batch is of one domain, so that a router's counts are those of the domain.
    for domain in range(domains):
        for tokens in sequences.tokens[sequences.domains == domain].split(batch):
            inputs, targets = _inputs_and_targets(tokens)
            with observe(model) as routings:
                nats[domain] += _nats(model(inputs), targets).double().sum()
            bytes_[domain] += text.token_bytes[targets].sum()
            if routings:
                counts = torch.stack([routing.counts for routing in routings])
                if load is None:
                    load = counts.new_zeros(counts.shape[0], domains, counts.shape[1])
                load[:, domain] += counts
    by_domain = [bits_per_byte(*pair) for pair in zip(nats.tolist(), bytes_.tolist(), strict=True)]
    overall = bits_per_byte(nats.sum().item(), int(bytes_.sum()))
    total = None if load is None else load.sum(1)
    tokens_seen = sequences.tokens[:, 1:].numel()
    return {
        "bits_per_byte": overall,
        "bits_per_byte_by_domain": dict(zip(text.domains, by_domain, strict=True)),
        "bytes": int(bytes_.sum()),
        "load": None if load is None else load.tolist(),
        "load_cv": None if total is None else load_cv(total).mean().item(),
        "mutual_information": None if load is None else mutual_information(load).mean().item(),
        "active_experts": None if total is None else active_experts(total).double().mean().item(),
        "slots_per_token": (
            None if total is None else total.sum().item() / tokens_seen / len(total)
        ),
    }


def observe(model: nn.Module):
    """`torch_routers.collect`; for a model without routers, a block that gathers nothing."""
    routed = any(isinstance(module, tr.Router) for module in model.modules())
    return tr.collect(model) if routed else nullcontext([])


def _inputs_and_targets(tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tokens[:, :-1], tokens[:, 1:]


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    """``[batch, sequence]``: minus the log-probability of each target."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(
        targets
    )


def _count_parameters(model: nn.Module, slots_per_token: float | None) -> tuple[int, int]:
    """All trained parameters, and how many of them an average token meets."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0.0
    for module in model.modules():
        if isinstance(module, tr.MoE) and slots_per_token is not None:
            experts = sum(parameter.numel() for parameter in module.experts.parameters())
            idle += experts * (1 - slots_per_token / module.router.num_experts)
    return total, round(total - idle)
