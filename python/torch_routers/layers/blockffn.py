"""The feed-forward layer of BlockFFN."""

from collections.abc import Sequence

from torch import Tensor, nn

from torch_routers import ops
from torch_routers.layers.experts import MLPExperts
from torch_routers.layers.moe import MoE, of_rows
from torch_routers.losses import RouterLoss
from torch_routers.routers import ReLURouter


class BlockFFN(MoE):
    r"""The layer of BlockFFN (arXiv 2507.08771): many small experts behind a `ReLURouter`.

    .. math::
        \mathrm{out}_t = \sum_{e:\, z_{te} > 0}
            W^{down}_e \big( y_{te} \, \mathrm{silu}(W^{up}_e x_t) \big)

    with the logits :math:`z` and the weights :math:`y` of the router. An expert that is not active
    for a token has weight 0 and slope 0: that pair of token and expert is not computed, and output
    and gradients are those of the dense layer all the same. An expert that no token activates gets
    a gradient of exactly 0 from the task.

    It is a `MoE` of a `ReLURouter` and `MLPExperts` with SiLU, and equal to one in exact
    arithmetic: the down projection is linear and has no bias. Here the weight multiplies the hidden
    layer, as in the paper, so that backward needs no result of the down projection: instead of
    ``hidden_size`` numbers of each active pair, ``intermediate_size`` more are kept.

    Args:
        hidden_size: size of the last dimension of the input, which should be normalised.
        num_experts: experts to choose from.
        intermediate_size: hidden size of *each* expert, a small one.
        eps, norm, init_std: as in `ReLURouter`.
        losses: auxiliary losses of the router; in the paper `losses.ChunkSparsificationLoss` and
            `losses.ActivationLocalityLoss`.
        shared, shared_gate, max_active: as in `MoE`. Without ``max_active``, compiled models and
            CUDA make room for every pair of token and expert.

    The models of the paper:

    ===== =========== =========== =================
    model hidden_size num_experts intermediate_size
    ===== =========== =========== =================
    0.1B  768         48          64
    0.5B  1280        40          128
    0.8B  1536        48          128
    1.2B  1792        56          128
    2.8B  2048        128         128
    ===== =========== =========== =================

    Their code (thunlp/BlockFFN) draws all weights of the layer from a normal distribution of
    standard deviation :math:`0.1 / \sqrt{\mathrm{hidden\_size} / 256}`, with learning rates scaled
    to match, and computes every pair in training. Here those of the router are drawn with
    ``init_std``, the experts' with 1 / sqrt(input features).

    ``layer(x)`` is a tensor of the shape and dtype of ``x``; ``return_routing``, ``valid_mask`` and
    ``group_offsets`` are those of `MoE`.

    Raises:
        ValueError: an argument that does not fit.
        RuntimeError: in training, when there are losses and nothing would deliver them.

    >>> layer = BlockFFN(hidden_size=16, num_experts=8, intermediate_size=4)
    >>> layer(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        intermediate_size: int,
        *,
        eps: float = 1e-5,
        norm: str = "rms",
        init_std: float = 0.02,
        losses: Sequence[RouterLoss] = (),
        shared: nn.Module | None = None,
        shared_gate: bool = False,
        max_active: float | None = None,
    ) -> None:
        super().__init__(
            ReLURouter(hidden_size, num_experts, eps, norm, init_std, losses),
            MLPExperts(num_experts, hidden_size, intermediate_size, activation="silu"),
            shared=shared,
            shared_gate=shared_gate,
            max_active=max_active,
        )

    def _mix(self, x: Tensor, weights: Tensor, plan: ops.Plan) -> Tensor:
        rows = ops.permute_tokens(x, plan)
        rows = self.experts(rows, plan.offsets, of_rows(weights, plan))
        return ops.combine_tokens(rows, None, plan).to(x.dtype).view(x.shape)
