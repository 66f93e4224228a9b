"""Losses of routers whose experts are active or not, several per token: BlockFFN, ReMoE."""

import torch
from torch import Tensor

from torch_routers import ops
from torch_routers.losses.base import RouterLoss, full_precision, valid_tokens
from torch_routers.routing import Routing


def activation_probs(
    logits: Tensor, valid_mask: Tensor | None = None, *, eps: float = 1e-5, norm: str = "rms"
) -> Tensor:
    r"""How a token's activation is shared by experts, :math:`p_e = h_e / (\sum_i h_i + 10^{-5})`.

    :math:`h` is the normalised activation, what `ops.relu_rms_gate` returns for gains of 1.

    Args:
        logits: ``[..., num_experts]``.
        valid_mask: ``[...]`` bool, True = real token; the others have probabilities 0.
        eps, norm: as in `ops.relu_rms_gate`.

    Returns:
        ``[..., num_experts]``, float32 (float64 for float64 logits), never in a half type.

    >>> activation_probs(torch.tensor([0.6, -0.2, 0.3, 0.0]))
    tensor([0.6667, 0.0000, 0.3333, 0.0000])
    """
    gain = logits.new_ones(logits.shape[-1], dtype=torch.promote_types(logits.dtype, torch.float32))
    h = ops.relu_rms_gate(logits, gain, eps=eps, norm=norm, valid_mask=valid_mask).weights
    return h / (h.sum(-1, keepdim=True) + 1e-5)


def sequence_pairs(valid: Tensor, group_ids: Tensor | None) -> Tensor:
    """``[..., tokens - 1]``: whether a token and its predecessor are real and of one document."""
    pairs = valid[..., 1:] & valid[..., :-1]
    return pairs if group_ids is None else pairs & (group_ids[..., 1:] == group_ids[..., :-1])


def activation_locality(
    logits: Tensor,
    *,
    sharpness: float = 100.0,
    detach_target: bool = False,
    valid_mask: Tensor | None = None,
    group_ids: Tensor | None = None,
) -> Tensor:
    r"""How unlike the activation of a token is to that of the next (BlockFFN, arXiv 2507.08771).

    .. math::
        L = \frac{1}{M} \sum_{t, e} \mathrm{softplus}(u) - u v, \qquad
        u = \alpha z_{t-1, e}, \quad v = \sigma(\alpha z_{te})

    the cross-entropy of both, over the :math:`M` elements of the pairs of neighbours. It sees
    logits before the ReLU, and hence can revive an expert. Written in plain PyTorch.

    Args:
        logits: ``[..., tokens, num_experts]``; each row of the leading dimensions is a sequence.
        sharpness: :math:`\alpha`, 100 in the paper.
        detach_target: keep the gradient from the later token, :math:`v`. The reference code does
            not: there the later token is pushed too.
        valid_mask: ``[..., tokens]`` bool, True = real token; pairs with another are left out.
        group_ids: ``[..., tokens]`` integers, the document of each token; pairs stay within one.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 without pairs.

    >>> z = torch.tensor([[0.5, -0.3], [0.2, 0.4], [-0.1, 0.6]])
    >>> activation_locality(z, sharpness=2)
    tensor(0.7138)
    """
    valid = valid_tokens(logits, valid_mask)
    z = sharpness * torch.where(valid.unsqueeze(-1), full_precision(logits), 0)
    target = z[..., 1:, :].sigmoid()
    if detach_target:
        target = target.detach()
    u = z[..., :-1, :]
    of_pairs = (torch.nn.functional.softplus(u) - u * target).sum(-1)
    pairs = sequence_pairs(valid, group_ids)
    elements = pairs.sum().clamp(min=1) * logits.shape[-1]
    return torch.where(pairs, of_pairs, 0).sum() / elements


def chunk_sparsification(
    probs: Tensor,
    *,
    chunk_size: int = 64,
    valid_mask: Tensor | None = None,
    tail: str = "pad",
    reference: bool = False,
) -> Tensor:
    r"""The share of experts that a chunk of tokens activates, softly (arXiv 2507.08771).

    .. math::
        L = 1 - \frac{1}{C E} \sum_{c, e} \prod_{t \in c} (1 - p_{te} + 10^{-5})

    Chunks are consecutive tokens of a sequence. The product is a tree, so that its gradient is the
    product of the other factors, without a division that would be 0/0 where :math:`p = 1`. Written
    in plain PyTorch.

    Args:
        probs: ``[..., tokens, num_experts]``, such as those of `activation_probs`; each row of the
            leading dimensions is a sequence. Half types are converted.
        chunk_size: tokens of a chunk, 64 in the paper's recipes.
        valid_mask: ``[..., tokens]`` bool, True = real token; the others leave the product as it
            is, and a chunk of them alone is left out.
        tail: what becomes of a last chunk with fewer tokens: ``"pad"``, it counts as it is;
            ``"drop"``, it is left out; ``"error"``.
        reference: count chunks without real tokens too, as the reference code does.

    Returns:
        A scalar, float32 (float64 for float64 input); 0 without chunks.

    Raises:
        ValueError: ``chunk_size`` or ``tail`` does not fit, or tokens are not whole chunks where
            ``tail="error"``.

    >>> p = torch.tensor([[0.7, 0.3, 0], [0.5, 0, 0.5], [0, 1, 0], [0.2, 0.8, 0]])
    >>> chunk_sparsification(p, chunk_size=2)
    tensor(0.4750)
    """
    _check_chunks("chunk_sparsification", chunk_size, tail)
    valid = valid_tokens(probs, valid_mask)
    tokens, experts = probs.shape[-2:]
    rest = -tokens % chunk_size
    if tail == "error" and rest:
        raise ValueError(
            f"chunk_sparsification: expected tokens in whole chunks of {chunk_size}, got {tokens}"
        )
    factors = 1 - torch.where(valid.unsqueeze(-1), full_precision(probs), 0) + 1e-5
    if tail == "drop":
        whole = tokens - tokens % chunk_size
        factors, valid = factors[..., :whole, :], valid[..., :whole]
    else:  # even by nothing: a branch would recompile
        pad = torch.nn.functional.pad
        factors, valid = pad(factors, (0, 0, 0, rest), value=1 + 1e-5), pad(valid, (0, rest))
    factors = factors.reshape(-1, chunk_size, experts)
    valid = valid.reshape(-1, chunk_size)
    if not factors.shape[0]:
        return 0 * factors.sum()
    product = _product(factors.transpose(0, 1)).mean(-1)
    counted = torch.ones_like(valid[..., 0]) if reference else valid.any(-1)
    chunks = counted.sum()
    return torch.where(counted, 1 - product, 0).sum() / chunks.clamp(min=1)


def _product(factors: Tensor) -> Tensor:
    """Over the first dimension, as a tree."""
    while factors.shape[0] > 1:
        half = factors.shape[0] // 2
        product = factors[:half] * factors[half : 2 * half]
        factors = torch.cat([product, factors[2 * half :]])
    return factors[0]


def _check_chunks(caller: str, chunk_size: int, tail: str) -> None:
    if chunk_size < 1:
        raise ValueError(f"{caller}: expected chunk_size >= 1, got {chunk_size}")
    if tail not in ("pad", "drop", "error"):
        raise ValueError(f"{caller}: expected tail among ['pad', 'drop', 'error'], got {tail!r}")


class _DenseLoss(RouterLoss):
    """Reads the logits of a `ReLURouter`, where a masked token is a row of -inf."""

    def logits_of(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """The logits, and which tokens are real."""
        if routing.logits is None or routing.indices is not None:
            raise ValueError(
                f"{type(self).__name__}: expected a dense routing with logits, such as that of a "
                "ReLURouter, got another"
            )
        return routing.logits, (routing.logits != -torch.inf).any(-1)


class ActivationLocalityLoss(_DenseLoss):
    """`activation_locality` of one router, along the last but one dimension of its logits.

    It does not know of documents packed into a sequence: use the function with ``group_ids``.

    Args:
        weight: the factor in the objective; 2e-3 in the paper, 1e-3 for its 0.8B model.
        sharpness, detach_target: as in `activation_locality`.

    Raises:
        ValueError: the routing is not dense.
    """

    name = "activation_locality"

    def __init__(
        self, weight: float, sharpness: float = 100.0, detach_target: bool = False
    ) -> None:
        super().__init__(weight)
        self.sharpness, self.detach_target = sharpness, detach_target

    def forward(self, routing: Routing) -> Tensor:
        logits, valid = self.logits_of(routing)
        if logits.dim() < 2:
            return 0 * torch.where(valid, logits.sum(-1), 0).sum()
        return activation_locality(
            logits,
            sharpness=self.sharpness,
            detach_target=self.detach_target,
            valid_mask=valid,
        )


class ChunkSparsificationLoss(_DenseLoss):
    """`chunk_sparsification` of one router; ``weight`` may be moved by `AdaptiveFactor`.

    Chunks are cut from each sequence; documents packed into one are not told apart.

    Args:
        weight: the factor in the objective; at first 5e-2 in the paper, 0.1 for its 2.8B model.
        chunk_size, tail: as in `chunk_sparsification`.
        eps: of the normalisation, as in the router.

    Raises:
        ValueError: an argument that does not fit, or the routing is not dense.
    """

    name = "chunk_sparsification"

    def __init__(
        self, weight: float, chunk_size: int = 64, tail: str = "pad", eps: float = 1e-5
    ) -> None:
        super().__init__(weight)
        _check_chunks(type(self).__name__, chunk_size, tail)
        self.chunk_size, self.tail, self.eps = chunk_size, tail, eps

    def forward(self, routing: Routing) -> Tensor:
        logits, valid = self.logits_of(routing)
        if logits.dim() < 2:
            logits, valid = logits[None], valid[None]
        probs = activation_probs(logits, valid, eps=self.eps)
        return chunk_sparsification(
            probs, chunk_size=self.chunk_size, valid_mask=valid, tail=self.tail
        )


def relu_sparsity(logits: Tensor, top_k: int, *, valid_mask: Tensor | None = None) -> Tensor:
    r"""The balanced L1 loss of ReMoE (arXiv 2412.14711, equations 7 and 10).

    .. math::
        L = \frac{E}{T^2 k} \sum_e c_e \sum_t a_{te}, \qquad a = \mathrm{ReLU}(z), \quad
        c_e = \sum_t 1[a_{te} > 0]

    Counts are constants. Its factor is to be adapted: `AdaptiveSparsity`. Written in plain PyTorch.

    Args:
        logits: ``[..., num_experts]``.
        top_k: :math:`k`, active experts per token to aim for.
        valid_mask: ``[...]`` bool, True = real token.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 without tokens.

    >>> relu_sparsity(torch.tensor([[1.0, -1.0], [2.0, 1.0]]), 1)
    tensor(3.5000)
    """
    valid = valid_tokens(logits, valid_mask)
    experts = logits.shape[-1]
    a = torch.where(valid.unsqueeze(-1), full_precision(logits), 0).relu().reshape(-1, experts)
    counts = (a > 0).sum(0)
    tokens = valid.sum().clamp(min=1).to(a.dtype)
    return (a.sum(0) * counts).sum() * experts / (tokens.square() * top_k)


class ReLUSparsityLoss(_DenseLoss):
    """`relu_sparsity` of one router; ``weight`` is moved by `AdaptiveSparsity`.

    Args:
        weight: the factor in the objective; at first 1e-8 in the paper.
        top_k: active experts per token to aim for.

    Raises:
        ValueError: an argument that does not fit, or the routing is not dense.
    """

    name = "relu_sparsity"

    def __init__(self, weight: float, top_k: int) -> None:
        super().__init__(weight)
        if top_k < 1:
            raise ValueError(f"ReLUSparsityLoss: expected top_k >= 1, got {top_k}")
        self.top_k = top_k

    def forward(self, routing: Routing) -> Tensor:
        logits, valid = self.logits_of(routing)
        return relu_sparsity(logits, self.top_k, valid_mask=valid)
