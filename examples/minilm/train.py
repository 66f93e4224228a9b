"""One cell of the comparison: train one model on all tasks at once, then measure it."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_routers as tr
from minilm.data import Task
from minilm.encoder import MultiTaskModel
from minilm.methods import METHODS
from minilm.settings import Settings
from torch_routers.ablation.tokens import training_order
from torch_routers.ablation.train import rate
from torch_routers.metrics import mutual_information

EVALUATION_BATCH = 50


def train_cell(cell: dict[str, Any], settings: Settings, tasks: Sequence[Task]) -> dict[str, Any]:
    """Trains one model and measures it.

    Args:
        cell: its ``method``, ``seed`` and ``learning_rate``.

    Returns:
        The record: plain numbers and lists.
    """
    torch.set_num_threads(1)
    torch.manual_seed(cell["seed"])
    method = METHODS[cell["method"]]
    model = MultiTaskModel(method.config(settings), [len(task.classes) for task in tasks])
    adapters = [*model.encoder.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": model.heads.parameters(), "lr": settings.head_learning_rate},
            {"params": [p for p in adapters if p.requires_grad], "lr": cell["learning_rate"]},
        ],
        weight_decay=0.01,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings.steps))
    trained: set[nn.Parameter] = set()
    start = time.process_time()
    model.train()
    for step, batch in enumerate(_batches(tasks, settings, cell["seed"])):
        phase = step * len(method.phases) // settings.steps
        model.begin_phase(method.phases[phase], experts=phase == 0)
        trained |= {parameter for parameter in model.parameters() if parameter.requires_grad}
        optimizer.zero_grad()
        _loss(model, *batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    cpu_seconds = time.process_time() - start
    model.begin_phase(method.inference)
    return {
        "cell": cell,
        "validation": evaluate(model, tasks, "validation"),
        "test": evaluate(model, tasks, "test"),
        "parameters": sum(parameter.numel() for parameter in trained),
        "cpu_seconds": cpu_seconds,
    }


def _batches(
    tasks: Sequence[Task], settings: Settings, seed: int
) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """Tokens, the task of each row, and the labels by task: as many rows of each task."""
    orders = [
        training_order(
            len(task.labels["train"]), steps=settings.steps, batch=settings.batch, seed=seed
        )
        for task in tasks
    ]
    numbers = torch.arange(len(tasks)).repeat_interleave(settings.batch)
    for rows in zip(*orders, strict=True):
        pairs = list(zip(tasks, rows, strict=True))
        tokens = torch.cat([task.tokens["train"][chosen] for task, chosen in pairs])
        yield tokens, numbers, [task.labels["train"][chosen] for task, chosen in pairs]


def _loss(model: MultiTaskModel, tokens: Tensor, numbers: Tensor, labels: list[Tensor]) -> Tensor:
    """The mean of the tasks' cross-entropies, and what the routers add in training."""
    with _collect(model) as routings:
        logits = model(_without_padding(tokens), numbers)
    losses = [F.cross_entropy(*pair) for pair in zip(logits, labels, strict=True)]
    of_routers = [r.aux_loss for r in routings if r.aux_loss is not None]
    return torch.stack(losses).mean() + sum(loss for loss in of_routers if loss.requires_grad)


@torch.no_grad()
def evaluate(model: MultiTaskModel, tasks: Sequence[Task], split: str) -> dict[str, Any]:
    """Accuracy by task, and where its tokens went.

    Returns:
        ``shares``, ``[routers, tasks, experts]``: the mean weights of the tokens of a task, None
        without a choice; ``mutual_information``: of these, in bits, the mean over routers.
    """
    model.eval()
    accuracy, shares = {}, []
    for number, task in enumerate(tasks):
        correct, weights = 0, []
        order = (task.tokens[split] != 0).sum(1).argsort()  # of equal length: little padding
        for rows in order.split(EVALUATION_BATCH):
            tokens = _without_padding(task.tokens[split][rows])
            with _collect(model) as routings:
                logits = model(tokens, torch.full((len(rows),), number))[number]
            correct += (logits.argmax(-1) == task.labels[split][rows]).sum().item()
            weights.append([routing.weights.flatten(0, -2).sum(0) for routing in routings])
        accuracy[task.name] = correct / len(order)
        if weights[0]:
            totals = torch.stack([torch.stack(of_batch) for of_batch in weights]).sum(0)
            shares.append(totals / totals.sum(-1, keepdim=True))
    routed = bool(shares) and shares[0].shape[-1] > 1
    by_router = torch.stack(shares, 1) if routed else None
    return {
        "accuracy": accuracy,
        "routers": routings.names if routed else None,
        "shares": by_router.tolist() if routed else None,
        "mutual_information": mutual_information(by_router).mean().item() if routed else None,
    }


def _collect(model: MultiTaskModel) -> AbstractContextManager:
    return tr.collect(model) if model.routers else nullcontext([])


def _without_padding(tokens: Tensor) -> Tensor:
    """Up to the end of the longest row."""
    return tokens[:, : (tokens != 0).sum(1).max()]
