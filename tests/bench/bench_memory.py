"""Memory: bytes that a forward keeps for its backward, counted exactly, and the layer's peak."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import bench_gate_losses as losses
from . import bench_moe as moe
from . import bench_token_dispatch as dispatch
from . import bench_topk_gate as gate
from .harness import CASES, OURS, Options
from .report import ALLOCATORS


@dataclass(frozen=True)
class BytesRow:
    """A line of a table of bytes. The baseline with the fewest is the one to compare with."""

    name: str
    tokens: int
    ours: Callable[[], int]
    baselines: dict[str, Callable[[], int]]

    def measure(self, options: Options) -> dict[str, Any]:
        count = {name: f() for name, f in {OURS: self.ours, **self.baselines}.items()}
        smallest = min(self.baselines, key=count.get)
        return {
            "name": self.name,
            "tokens": self.tokens,
            "bytes": count,
            "strongest": smallest,
            "bytes_per_token": count[OURS] / self.tokens,
            "bytes_ratio": count[OURS] / count[smallest],
        }


# ---- saved for backward --------------------------------------------------------------------------


def saved_bytes(function: Callable, make_inputs: Callable[[], tuple]) -> int:
    """Of the distinct storages that autograd holds when the forward is over, inputs included."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # kept alive, so that no address comes twice
        return tensor

    torch.manual_seed(0)
    inputs = make_inputs()
    for x in inputs:
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = function(*inputs)
    del results  # alive until here, as the graph is
    return sum(storage.nbytes() for storage in storages.values())


def there_and_back(permute: Callable, combine: Callable) -> Callable:
    """Dispatch and combine around experts that keep nothing themselves."""

    def function(x, weights, plan, tokens):
        (rows,) = permute(x, plan, tokens)
        return combine(2 * rows, weights, plan, tokens)

    return function


def saved_rows(experts: int, k: int, tokens: int) -> Iterator[BytesRow]:
    def logits():
        return torch.randn(tokens, experts), k

    def routed():
        x, weights = torch.randn(tokens, dispatch.HIDDEN), torch.rand(tokens, k)
        return x, weights, *dispatch.make_plan(tokens, experts, k)

    def row(operation, inputs, ours, baselines):
        count = {name: partial(saved_bytes, f, inputs) for name, f in baselines.items()}
        name = f"{operation} saved E={experts} k={k}"
        return BytesRow(name, tokens, partial(saved_bytes, ours, inputs), count)

    yield row(
        "topk_gate",
        logits,
        gate.ours,
        {"topk, softmax": gate.topk_softmax, "softmax, topk": gate.softmax_topk},
    )
    yield row(
        "gate_losses",
        logits,
        losses.ours,
        {
            "bincount": losses.by_bincount,
            "scatter": losses.by_scatter,
            "softmax first": losses.softmax_first,
        },
    )
    yield row(
        "permute, combine",
        routed,
        there_and_back(dispatch.permute, dispatch.combine),
        {
            "mul, index_add": there_and_back(dispatch.index_select, dispatch.mul_index_add),
            "gather, mul, sum": there_and_back(dispatch.index_select, dispatch.gather_mul_sum),
            "gather, bmm": there_and_back(dispatch.index_select, dispatch.gather_bmm),
        },
    )


# ---- peak of the layer ---------------------------------------------------------------------------


def peak_bytes(which: str, *sizes: int) -> int:
    """What forward and backward add to the resident memory of a fresh process, at most."""
    environment = {k: v for k, v in os.environ.items() if k not in ALLOCATORS["warm"]}
    command = [sys.executable, "-m", __name__, which, *map(str, sizes)]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return int(result.stdout)


def print_peak(which: str, experts: int, k: int, intermediate: int, tokens: int) -> None:
    torch.set_num_threads(1)
    layer = moe.make_layer(experts, k, intermediate)
    functions = {OURS: lambda x: (layer(x),), "loop over experts": moe.Baselines(layer).loop}

    def step(tokens):
        x = torch.randn(tokens, moe.HIDDEN, requires_grad=True)
        functions[which](x)[0].sum().backward()
        layer.zero_grad()

    step(16)  # what the first call of anything brings along
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step(tokens)
    print(_status("VmHWM") - before)


def _status(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def rows(options: Options) -> Iterator[BytesRow]:
    for experts, k in CASES:
        yield from saved_rows(experts, k, tokens=512)
    for experts, k, intermediate, tokens in [] if options.quick else moe.cases(options):
        if tokens == 4096:
            sizes = experts, k, intermediate, tokens
            yield BytesRow(
                f"moe peak E={experts} k={k} T={tokens}",
                tokens,
                partial(peak_bytes, OURS, *sizes),
                {"loop over experts": partial(peak_bytes, "loop over experts", *sizes)},
            )


if __name__ == "__main__":
    print_peak(sys.argv[1], *map(int, sys.argv[2:]))
