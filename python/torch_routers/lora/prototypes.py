"""Routers without training: what they compare tokens with comes from experts or samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_routers.lora.inject import experts_of, layers_of, scopes_of
from torch_routers.lora.means import Batches, look_at
from torch_routers.routers import PrototypeRouter, Router


@torch.no_grad()
def arrow_prototypes(model: nn.Module, mix: str = "default") -> None:
    r"""Give the routers of a mixture the directions that its experts answer to most (Arrow).

    The prototype of an expert in a layer is the first right singular vector of
    :math:`B_e A_e` (arXiv 2405.11157), of length 1: the input of that length for which the expert
    does most. It is computed exactly, from a QR decomposition of :math:`A_e^\top` and the
    eigenvectors of an :math:`r \times r` matrix; PEFT's Arrow iterates fifteen times from a random
    vector. An expert that does nothing has a prototype of zeros. Call it again after a change of
    the experts.

    Args:
        model: has a mixture with ``router="PrototypeRouter"`` and ``router_scope="module"``.
        mix: the name of the mixture.

    Raises:
        ValueError: the mixture has another router or scope.
    """
    for name, layer in layers_of(model, mix, "arrow_prototypes").items():
        scope = layer.scope(mix)
        if not isinstance(scope.router, PrototypeRouter) or scope.watches:
            raise ValueError(
                "arrow_prototypes: expected router='PrototypeRouter' and router_scope='module', "
                f"got {type(scope.router).__name__} of {scope.name or 'the model'} in {name}"
            )
        for e, expert in enumerate(layer.experts(mix)):
            scope.router.prototypes[e] = _first_direction(*layer.factors(mix, expert))


def _first_direction(a: Tensor, b: Tensor) -> Tensor:
    q, r = torch.linalg.qr(a.double().T)
    inner = b.double() @ r.T  # B A is this times the transpose of q, whose columns are orthonormal
    values, vectors = torch.linalg.eigh(inner.T @ inner)
    if values.numel() == 0 or values[-1] <= 0:
        return a.new_zeros(a.shape[1])
    direction = q @ vectors[:, -1]
    largest = direction[direction.abs().argmax()]  # of both signs always the same
    return (direction * largest.sign()).to(a.dtype)


@torch.no_grad()
def gates_from_samples(
    model: nn.Module,
    samples: Mapping[str, Batches],
    mix: str = "default",
) -> None:
    """Build the routers of a mixture from samples for each expert, without training.

    The row of an expert becomes the mean of what the router sees of its samples, over real tokens,
    divided by its length: tokens like those of an expert then have a high logit for it. A start for
    training, or a router by retrieval.

    Args:
        model: has routers with one row per expert: ``weight`` or ``prototypes``.
        samples: for each expert, by name, batches that the model is called with: dicts of keywords,
            or sequences of arguments.
        mix: the name of the mixture.

    Raises:
        ValueError: samples for other experts than those of the mixture, none of an expert, or a
            router without such rows.
    """
    scopes = scopes_of(model, "gates_from_samples", mix)
    layers = layers_of(model, mix, "gates_from_samples")
    experts = experts_of(layers, mix)
    if sorted(samples) != sorted(experts):
        raise ValueError(
            f"gates_from_samples: expected samples for {experts}, got them for {sorted(samples)}"
        )
    routers = [scope.router for scope in scopes]
    rows = {router: _rows_of(router) for router in routers}
    for e, expert in enumerate(experts):
        means = _mean_inputs(model, routers, samples[expert])
        for router, mean in means.items():
            if e < router.num_experts:
                rows[router][e] = mean / mean.norm().clamp(min=torch.finfo(mean.dtype).tiny)


def _rows_of(router: Router) -> Tensor:
    rows = getattr(router, "prototypes", getattr(router, "weight", None))
    expected = (router.num_experts, getattr(router, "hidden_size", None))
    if not isinstance(rows, Tensor) or rows.shape != expected:
        raise ValueError(
            "gates_from_samples: expected a router with a row of features for each expert, got "
            f"{type(router).__name__}"
        )
    return rows


def _mean_inputs(model: nn.Module, routers: list[Router], batches: Batches) -> dict[Router, Tensor]:
    sums = dict.fromkeys(routers, 0.0)
    tokens = dict.fromkeys(sums, 0)

    def add(router: Router, args: tuple, kwargs: dict[str, Any]) -> None:
        x = args[0]
        valid = router.with_followed(x, kwargs).get("valid_mask")
        if valid is None:
            valid = torch.ones_like(x[..., 0], dtype=torch.bool)
        kept = x[valid]
        sums[router] += kept.sum(0, dtype=Router.full_precision(x[:0]).dtype)
        tokens[router] += len(kept)

    handles = [router.register_forward_pre_hook(add, with_kwargs=True) for router in routers]
    look_at(model, batches, handles)
    if not all(tokens.values()):
        raise ValueError("gates_from_samples: expected samples with tokens, got none")
    return {router: sums[router] / tokens[router] for router in routers}
