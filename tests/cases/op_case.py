"""An operator as the generic tests see it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Arguments of one call: tensors by position, in the order of the function, and options."""

    name: str
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    #: No two scores are close, hence derivatives exist; small enough for finite differences.
    smooth: bool = False

    def to(self, dtype: torch.dtype) -> "Sample":
        def cast(x, dtype=dtype):
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        # Tensors among the options are parameters, such as a bias, which stay in full precision.
        full = torch.float64 if dtype == torch.float64 else torch.float32
        options = {name: cast(value, full) for name, value in self.options.items()}
        return Sample(self.name, tuple(map(cast, self.args)), options, self.smooth)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Sample":
        args = tuple(change(x) if isinstance(x, Tensor) else x for x in self.args)
        return Sample(self.name, args, self.options, self.smooth)


@dataclass(frozen=True)
class Error:
    """Arguments that do not fit, and what the operator says to them."""

    name: str
    args: tuple[Any, ...]
    message: str
    options: dict[str, Any] = field(default_factory=dict)
    #: Told by shapes and dtypes alone, hence also for tensors without data.
    static: bool = True


@dataclass(frozen=True)
class OpCase:
    name: str
    #: The public function; returns a dict of tensors.
    call: Callable[..., dict[str, Tensor]]
    #: The same in readable, differentiable PyTorch, with loops over tokens.
    reference: Callable[..., dict[str, Tensor]]
    samples: Callable[[], Iterable[Sample]]
    errors: Callable[[], Iterable[Error]]
    #: For opcheck: overloads with the arguments they get for a sample.
    overloads: Callable[[Sample], Iterable[tuple[Any, tuple[Any, ...]]]]
    dtypes: tuple[torch.dtype, ...]
    #: Largest error relative to the largest value, in units of the dtype's epsilon.
    tolerance: Callable[[Sample], float]
    #: The same bits on every instruction set.
    same_bits_on_every_isa: bool = True
    #: Results are float32 where inputs are bfloat16 or float16.
    results_in_full_precision: bool = False
    #: Samples of so many tokens: with thousands there is work for several threads.
    sized: Callable[[int], Iterable[Sample]] | None = None
    #: A token's results do not depend on other tokens. Per token is what has as many rows as there
    #: are tokens in a sized sample: arguments, options, results.
    per_token: bool = False

    def __str__(self) -> str:
        return self.name


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
