"""Alignment: a router that decides as another did."""

import torch
from torch import Tensor

from torch_routers.losses.base import log_probs


def router_alignment(
    logits: Tensor,
    reference: Tensor,
    *,
    top_k: int | None = None,
    valid_mask: Tensor | None = None,
) -> Tensor:
    r"""The divergence of a router from what it was in full precision (EAQuant, arXiv 2506.13329).

    .. math::
        L = \frac{1}{T} \sum_t \mathrm{KL}(p_t \,\|\, q_t)
            + \mathrm{KL}(p_t^{K_t} \,\|\, q_t^{K_t}), \qquad
        p_t = \mathrm{softmax}(z_t^0), \quad q_t = \mathrm{softmax}(z_t)

    The second term, with ``top_k``, is of the experts :math:`K_t` that the reference would choose
    alone, whose logits have a softmax of their own. The reference is constant. An expert that it
    hides, by -inf, adds nothing; one that the router hides and the reference does not costs
    infinitely much. A token whose logits are all -inf, in either, adds 0 and counts among the
    tokens. Written in plain PyTorch.

    Args:
        logits: ``[..., num_experts]``, of the router to train.
        reference: ``[..., num_experts]``, of the router to follow for the same tokens.
        top_k: experts of a token, in ``[1, num_experts]``; None: no second term.
        valid_mask: ``[...]`` bool, True = real token; the content of others changes nothing.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 without tokens.

    Raises:
        ValueError: an argument that does not fit.

    >>> z, reference = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.0, -torch.inf, 0.0]])
    >>> router_alignment(z, reference)  # ln 3/2
    tensor(0.4055)
    >>> router_alignment(z, reference, top_k=2)  # among experts 0 and 2 they agree
    tensor(0.4055)
    """
    if reference.shape != logits.shape:
        raise ValueError(
            f"router_alignment: expected reference of shape {list(logits.shape)}, that of logits, "
            f"got {list(reference.shape)}"
        )
    if top_k is not None and not 1 <= top_k <= logits.shape[-1]:
        raise ValueError(
            f"router_alignment: expected top_k in [1, num_experts={logits.shape[-1]}], got {top_k}"
        )
    reference = reference.detach()
    loss = _divergence(logits, reference, valid_mask)
    if top_k is None:
        return loss
    best = reference.topk(top_k, dim=-1).indices
    return loss + _divergence(logits.gather(-1, best), reference.gather(-1, best), valid_mask)


def _divergence(logits: Tensor, reference: Tensor, valid_mask: Tensor | None) -> Tensor:
    log_q, q_live, tokens = log_probs(logits, valid_mask)
    log_p, p_live, _ = log_probs(reference, valid_mask)
    of_experts = torch.where(log_p == -torch.inf, 0, log_p.exp() * (log_p - log_q))
    return torch.where(q_live & p_live, of_experts.sum(-1), 0).sum() / tokens
