"""Checks of tensors by what is known without their data: the shape rules' part of the errors.

The operators say the same, word for word, where there is data; see ``csrc/op/check.h``.
"""

import torch
from torch import Tensor


def check(condition: bool, message) -> None:
    """A ValueError with ``message()``, under torch.compile too."""
    torch._check_value(condition, message)


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_dtype(op: str, argument: str, tensor: Tensor, *dtypes: torch.dtype, remedy="") -> None:
    *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    names = f"{', '.join(most)} or {last}" if most else last
    check(
        tensor.dtype in dtypes,
        lambda: f"{op}: expected {argument} in {names}, got {dtype_name(tensor)}{remedy}",
    )
