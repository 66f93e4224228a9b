"""The method: how a row is timed, and what is made of the times.

All candidates of a row run in one process, by turns, on a ring of inputs that are fresh to the
caches and to the branch predictor (one repeated input flatters `torch.topk` several times over).
Results are allocated by whoever computes them, inside the time. The ratio of a row is the median
over the rounds of *strongest baseline / ours*, two neighbours in time; the strongest is the
baseline with the smallest median. Ours runs a second time in each round, as the control: what its
ratio differs from 1 is noise. Nothing is timed before its results and gradients agree.
"""

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

OURS, CONTROL = "ours", "ours again"
#: (num_experts, top_k), and the numbers of tokens that every operator is timed at.
CASES = [(8, 2), (64, 8), (256, 8)]
TOKENS = [1, 64, 512, 4096]


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    rounds: int = 31
    sample_ms: float = 5
    threads: int = 1
    #: Fewer rows and rounds, no compiled baselines.
    quick: bool = False
    #: Of the rows that permute and combine move; all else is float32.
    dtype: torch.dtype = torch.float32

    def cases(self) -> Iterator[tuple[int, int, int]]:
        """(num_experts, top_k, tokens)."""
        if self.quick:
            yield from ((e, k, t) for e, k in CASES[:2] for t in (1, 512))
            return
        yield from ((e, k, t) for e, k in CASES for t in TOKENS)
        yield 128, 8, 4096

    def clock(self) -> Callable[[], int]:
        """Nanoseconds: of this thread alone, or of the wall where there are others."""
        return time.thread_time_ns if self.threads == 1 else time.perf_counter_ns


@dataclass(frozen=True)
class Row:
    """A line of the table. Candidates take what `inputs` makes and return a tuple of tensors."""

    name: str
    inputs: Callable[[], tuple[Any, ...]]
    ours: Callable
    #: The first is also the reference for the results.
    baselines: dict[str, Callable]
    #: Baselines timed under `torch.compile`.
    compiled: dict[str, Callable] = field(default_factory=dict)
    #: Shown, but no baseline: what people use and nobody should compare with.
    information: dict[str, Callable] = field(default_factory=dict)
    #: Forward and backward: gradients of the floating-point inputs and these.
    backward: bool = False
    parameters: tuple[Tensor, ...] = ()
    #: Bytes that have to be read and written, however it is done; 0 where arithmetic decides.
    traffic: int = 0
    #: Largest error, relative to the largest value.
    tolerance: float = 1e-5
    max_rounds: int = 1000
    #: Of `torch.set_float32_matmul_precision`.
    matmul_precision: str = "highest"

    def measure(self, options: Options) -> dict[str, Any]:
        return measure(self, options)


def name_of(operation: str, backward: bool, experts: int, slots: int, tokens: int) -> str:
    direction = "forward+backward" if backward else "forward"
    return f"{operation} {direction} E={experts} k={slots} T={tokens}"


# ---- one row -------------------------------------------------------------------------------------


def measure(row: Row, options: Options) -> dict[str, Any]:
    """Compares and times the candidates of a row; plain data."""
    torch.manual_seed(0)
    torch.compiler.reset()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(row.matmul_precision)
    try:
        return _measure(row, options)
    finally:
        torch.set_float32_matmul_precision(before)


def _measure(row: Row, options: Options) -> dict[str, Any]:
    ring = make_ring(row)
    candidates = {OURS: row.ours, **row.baselines}
    if not options.quick:
        for name, function in row.compiled.items():
            candidates[f"compiled {name}"] = torch.compile(function, dynamic=False)
    baselines = list(candidates)[1:]
    candidates |= row.information
    runs = {name: runner(function, row, ring[0]) for name, function in candidates.items()}
    compare(row, {name: run(ring[0]) for name, run in runs.items()}, baselines[0])

    def by_turns(run):
        inputs = itertools.cycle(ring)
        return lambda: run(next(inputs))

    times = time_by_turns(
        {name: by_turns(runs[name.replace(CONTROL, OURS)]) for name in [*runs, CONTROL]},
        min(options.rounds, row.max_rounds),
        options.sample_ms * 1e6,
        options.clock(),
    )
    result = {"name": row.name, **summary(times, baselines)}
    if row.traffic >= 1 << 20:  # below, calls cost more than memory
        result["gb_per_s"] = row.traffic / (1e3 * result["us"][OURS])
    return result


def make_ring(row: Row, elements: int = 1 << 23) -> list[tuple[Any, ...]]:
    """Inputs of about 32 MiB together: more than a cache keeps between two uses of one of them."""
    first = row.inputs()
    size = sum(x.numel() for x in first if isinstance(x, Tensor))
    count = max(4, min(512, elements // max(1, size)))
    ring = [first, *(row.inputs() for _ in range(count - 1))]
    for inputs in ring if row.backward else []:
        for x in inputs:
            if isinstance(x, Tensor) and x.is_floating_point():
                x.requires_grad_()
    return ring


def runner(function: Callable, row: Row, inputs: tuple) -> Callable[[tuple], tuple]:
    """A function of the inputs to results, or to results and gradients."""
    if not row.backward:
        return lambda inputs: function(*inputs)
    outputs = function(*inputs)
    positions = [i for i, y in enumerate(outputs) if y.requires_grad]
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(outputs[i].shape, generator=generator).to(outputs[i].dtype) for i in positions
    ]
    floating = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]

    def run(inputs):
        outputs = function(*inputs)
        wanted = [*(inputs[i] for i in floating), *row.parameters]
        return (*outputs, *torch.autograd.grad([outputs[i] for i in positions], wanted, grads))

    return run


def compare(row: Row, results: dict[str, tuple], reference: str) -> None:
    """The reference's results are everybody's."""
    for name, values in results.items():
        for i, (value, expected) in enumerate(zip(values, results[reference], strict=True)):
            difference = (value.double() - expected.double()).abs().max().item()
            largest = expected.double().abs().max().item()
            bound = row.tolerance * largest if expected.is_floating_point() else 0
            if not difference <= bound:
                raise ValueError(
                    f"{name}: expected result {i} within {bound:.2g} of {reference}'s, "
                    f"got {difference:.2g}"
                )


# ---- times ---------------------------------------------------------------------------------------


def time_by_turns(
    candidates: dict[str, Callable[[], Any]], rounds: int, sample_ns: float, clock: Callable
) -> dict[str, list[float]]:
    """Nanoseconds per call of each candidate in each round; every other round in reverse order."""

    def sample(function, calls):
        start = clock()
        for _ in range(calls):
            function()
        return (clock() - start) / calls

    calls = {}
    for name, function in candidates.items():
        first = sample(function, 1)
        calls[name] = 1
        if first < sample_ns:  # else the call above has warmed up enough
            calls[name] = int(sample_ns / max(1, min(sample(function, 1) for _ in range(3)))) + 1
            sample(function, calls[name])
    times = {name: [] for name in candidates}
    order = list(candidates)
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for name in order:
            times[name].append(sample(candidates[name], calls[name]))
        order.reverse()
    gc.enable()
    return times


def summary(times: dict[str, list[float]], baselines: list[str]) -> dict[str, Any]:
    strongest = min(baselines, key=lambda name: median(times[name]))
    return {
        "us": {name: median(values) / 1e3 for name, values in times.items()},
        "strongest": strongest,
        "rounds": len(times[OURS]),
        "ratio": spread(times[strongest], times[OURS]),
        "ratio_of_minima": min(times[strongest]) / min(times[OURS]),
        "control": spread(times[CONTROL], times[OURS]),
    }


def spread(numerators: list[float], denominators: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(numerators, denominators)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def copy_bandwidth(options: Options) -> float:
    """GB/s, read and written, of a copy that no cache holds: the roof of the memory-bound rows."""
    source, target = torch.ones(2, 1 << 26)
    times = time_by_turns({"copy": lambda: target.copy_(source)}, 9, 0, options.clock())
    return 2 * source.nbytes / min(times["copy"])
