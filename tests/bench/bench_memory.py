"""Bytes that a forward keeps for its backward: counted exactly, not sampled."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import bench_gate_losses as losses
from . import bench_token_dispatch as dispatch
from . import bench_topk_gate as gate
from .harness import CASES, OURS, Options


@dataclass(frozen=True)
class SavedRow:
    """A line of the second table. The baseline that saves least is the one to compare with."""

    name: str
    tokens: int
    inputs: Callable[[], tuple[Any, ...]]
    ours: Callable
    baselines: dict[str, Callable]

    def measure(self, options: Options) -> dict[str, Any]:
        functions = {OURS: self.ours, **self.baselines}
        inputs = self.inputs()
        saved = {name: saved_bytes(f, inputs) for name, f in functions.items()}
        smallest = min(self.baselines, key=saved.get)
        return {
            "name": self.name,
            "tokens": self.tokens,
            "bytes": saved,
            "strongest": smallest,
            "bytes_per_token": saved[OURS] / self.tokens,
            "bytes_ratio": saved[OURS] / saved[smallest],
        }


def saved_bytes(function: Callable, inputs: tuple[Any, ...]) -> int:
    """Of the distinct storages that autograd holds when the forward is over, inputs included."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # kept alive, so that no address comes twice
        return tensor

    inputs = [x.requires_grad_() if _floating(x) else x for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    return sum(storage.nbytes() for storage in storages.values())


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def there_and_back(permute: Callable, combine: Callable) -> Callable:
    """Dispatch and combine around experts that keep nothing themselves."""

    def function(x, weights, plan, tokens):
        (rows,) = permute(x, plan, tokens)
        return combine(2 * rows, weights, plan, tokens)

    return function


def rows(options: Options) -> Iterator[SavedRow]:
    tokens = 512
    for experts, k in CASES:

        def gate_inputs(e=experts, k=k):
            return torch.randn(tokens, e), k

        def dispatch_inputs(e=experts, k=k):
            x, weights = torch.randn(tokens, dispatch.HIDDEN), torch.rand(tokens, k)
            return x, weights, *dispatch.make_plan(tokens, e, k)

        yield SavedRow(
            name=f"topk_gate saved E={experts} k={k}",
            tokens=tokens,
            inputs=gate_inputs,
            ours=gate.ours,
            baselines={"topk, softmax": gate.topk_softmax, "softmax, topk": gate.softmax_topk},
        )
        yield SavedRow(
            name=f"gate_losses saved E={experts} k={k}",
            tokens=tokens,
            inputs=gate_inputs,
            ours=losses.ours,
            baselines={
                "bincount": losses.by_bincount,
                "scatter": losses.by_scatter,
                "softmax first": losses.softmax_first,
            },
        )
        yield SavedRow(
            name=f"permute, combine saved E={experts} k={k}",
            tokens=tokens,
            inputs=dispatch_inputs,
            ours=there_and_back(dispatch.permute, dispatch.combine),
            baselines={
                "mul, index_add": there_and_back(dispatch.index_select, dispatch.mul_index_add),
                "gather, mul, sum": there_and_back(dispatch.index_select, dispatch.gather_mul_sum),
                "gather, bmm": there_and_back(dispatch.index_select, dispatch.gather_bmm),
            },
        )
