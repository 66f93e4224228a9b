"""One set of parameters out of those of several experts, as a weighted sum."""

import torch
from torch import Tensor

from torch_routers._autograd import autocast_dtype


def soft_merge(weights: Tensor, parameters: Tensor) -> Tensor:
    r"""Mix the parameters of experts: one mixture per row of weights.

    .. math::  \bar W_b = \sum_e w_{be} W_e, \qquad
               \frac{\partial L}{\partial W_e} = \sum_b w_{be} \frac{\partial L}{\partial \bar W_b}

    Both are matrix products, and so is the gradient of the weights: this is plain PyTorch, whose
    product is as fast as memory allows, and has its derivatives.

    Args:
        weights: ``[..., num_experts]``, float32 or float64.
        parameters: ``[num_experts, *shape]``, any floating dtype; below float32 they are mixed in
            float32.

    Returns:
        ``[..., *shape]`` in the dtype of ``parameters``.

    Raises:
        ValueError: an argument that does not fit.

    >>> soft_merge(torch.tensor([0.5, 0.5]), torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    tensor([2., 4.])
    """
    if weights.dim() < 1 or parameters.dim() < 1 or weights.shape[-1] != parameters.shape[0]:
        raise ValueError(
            "soft_merge: expected weights [..., num_experts] for parameters [num_experts, ...], "
            f"got {list(weights.shape)} for {list(parameters.shape)}"
        )
    for name, x in ("weights", weights), ("parameters", parameters):
        if not x.is_floating_point():
            raise ValueError(f"soft_merge: expected {name} in a floating dtype, got {x.dtype}")
    dtype = torch.promote_types(torch.float32, parameters.dtype)
    mixed = product(weights.to(dtype), parameters.reshape(parameters.shape[0], -1).to(dtype))
    return mixed.to(parameters.dtype).reshape(*weights.shape[:-1], *parameters.shape[1:])


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the dtype that they have, whatever autocast would make of them."""
    if autocast_dtype(a) is None:
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b
