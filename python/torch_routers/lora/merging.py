"""Mixtures as part of the weights of their model, where that is possible."""

import dataclasses

import torch
from torch import Tensor, nn

from torch_routers.lora.collapse import stacked_factors
from torch_routers.lora.constant import ConstantRouter
from torch_routers.lora.inject import config_of, layers_of, set_config, unload
from torch_routers.lora.linear import RoutedLoraLinear
from torch_routers.lora.means import Batches, mean_weights
from torch_routers.routers import Router

#: Of weights that are numbers by themselves, without scales.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class MergeError(ValueError):
    """A mixture that cannot be part of the weights of its model."""


def merge(model: nn.Module, mix: str = "default") -> nn.Module:
    r"""Add a mixture whose weights are constant to the weights of its layers, and take it out.

    Weights are constant where an expert is forced, where there is one expert whose weight is
    always 1, and where a router says so by an attribute ``constant_weights`` ``[num_experts]``.
    Masked tokens, which have no expert in a mixture, then get what all tokens get.

    Raises:
        MergeError: weights that depend on the input, a layer without weights of floating numbers,
            one whose weight another module has too, or a result that is not finite. The model is as
            before.

    >>> from torch_routers.lora import RoutedLoraConfig, force, inject
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> report = inject(model, RoutedLoraConfig(num_experts=3, target_modules=["0"]))
    >>> with force(model, "1"):
    ...     merge(model)[0]
    Linear(in_features=8, out_features=8, bias=True)
    """
    layers = layers_of(model, mix, "merge")
    merged = {}
    for name, layer in layers.items():
        a, b = stacked_factors(layer, _constant_weights(layer, mix), mix)
        merged[name] = _merged_weight(model, name, layer, a, b)
    with torch.no_grad():
        for name, weight in merged.items():
            layers[name].base_layer.weight.copy_(weight)
    return unload(model, mix)


@torch.no_grad()
def bake_router(model: nn.Module, batches: Batches, mix: str = "default") -> None:
    """Put the mean weights of some data in the place of a mixture's routers.

    What then depends on the input no more can be merged. It is another model than before: compare
    the two on data of yours.

    Args:
        batches: what the model is called with, without gradients: dicts of keywords, or sequences
            of arguments. Masked tokens are not part of the mean.
        mix: the name of the mixture.

    Raises:
        ValueError: no batches, none with a token, or ``mix="ranks"``.
    """
    layers, config = layers_of(model, mix, "bake_router"), config_of(model, mix, "bake_router")
    if config.mix == "ranks":
        raise ValueError('bake_router: expected routers without a factor, got mix="ranks"')
    means = mean_weights(model, batches, mix, "bake_router")
    for scope, mean in means.items():
        old = scope.router
        hidden_size = getattr(old, "hidden_size", scope.layers[0].in_features)
        baked = ConstantRouter(hidden_size, old.num_experts).train(old.training)
        baked.constant_weights.copy_(mean)
        device = next(iter(old.state_dict().values())).device
        scope.replace_router(baked.to(device), layers.values(), mix)
    arguments = {"router": "ConstantRouter", "router_arguments": {}, "mode": None, "losses": []}
    set_config(model, mix, dataclasses.replace(config, **arguments))


def _constant_weights(layer: RoutedLoraLinear, mix: str) -> dict[str, float]:
    scope, experts = layer.scope(mix), layer.experts(mix)
    if scope.forced is not None:
        return {expert: float(e == scope.forced) for e, expert in enumerate(experts)}
    constant = getattr(scope.router, "constant_weights", None)
    if constant is not None and len(constant) == len(experts):
        return dict(zip(experts, constant.tolist()))
    if len(experts) == 1 and _is_always_one(scope.router):
        return {experts[0]: 1.0}
    raise MergeError(
        f"merge: expected constant routing, got input-dependent {type(scope.router).__name__}. "
        "Use collapse_to_lora, bake_router or export_expert"
    )


def _is_always_one(router: Router) -> bool:
    """Whether the weight of the only expert is 1: that of a softmax."""
    kind = type(router).__name__
    if kind == "SoftRouter":
        return router.mode != "hard"
    if kind != "TopKRouter" or router.score != "softmax" or router.scale != 1:
        return False
    return router.capacity is None and router.capacity_factor is None


def _merged_weight(
    model: nn.Module, name: str, layer: RoutedLoraLinear, a: Tensor, b: Tensor
) -> Tensor:
    base = layer.base_layer
    weight = getattr(base, "weight", None)
    is_conv1d = type(base).__name__ == "Conv1D"
    if not (isinstance(base, nn.Linear) or is_conv1d) or weight.dtype not in _DTYPES:
        raise MergeError(
            f"merge: expected a layer with a weight of floating numbers, got {name} of type "
            f"{type(base).__name__}. Use export_expert"
        )
    holders = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(holders) > 1:
        raise MergeError(f"merge: expected a weight of one module, got {holders}")
    delta = b.double() @ a.double()
    merged = (weight.detach().double() + (delta.T if is_conv1d else delta)).to(weight.dtype)
    if not merged.isfinite().all():
        raise MergeError(f"merge: expected finite weights, got others in {name}")
    return merged
