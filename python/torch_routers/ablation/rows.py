"""What is compared: dense layers, the library's routers, and the user's own."""

import hashlib
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import torch_routers as tr
from torch_routers.ablation.errors import AblationError
from torch_routers.ablation.model import DenseFeedForward, seeded
from torch_routers.ablation.presets import Settings

BASELINE = "dense-active"
CLASS_KEYWORDS = ("hidden_size", "num_experts", "top_k")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: in tables and pictures.
        describes: half a line.
        feed_forward: from settings and token counts ``[vocab_size]`` to the function that builds
            the feed-forward layer from a seed and a layer number.
        source: sha256 of the file that it comes from, when that is the user's.
        file: ``FILE.py:CLASS``, likewise.
    """

    name: str
    describes: str
    feed_forward: Callable[[Settings, Tensor], Callable[[int, int], nn.Module]]
    source: str | None = None
    file: str | None = None

    def __reduce__(self) -> tuple[Callable[..., "Row"], tuple[str | None, ...]]:
        """Another process builds its functions again."""
        return _row_again, (self.name, self.source, self.file)


def _dense(name: str, describes: str, experts: Callable[[Settings], int]) -> Row:
    def feed_forward(settings: Settings, token_counts: Tensor):
        def build(seed: int, layer: int) -> nn.Module:
            with seeded(seed, f"{layer}.dense"):
                return DenseFeedForward(
                    settings.hidden_size, experts(settings) * settings.expert_size
                )

        return build

    return Row(name, describes, feed_forward)


def _routed(
    name: str,
    describes: str,
    router: Callable[[Settings, Tensor], tr.Router],
    source: str | None = None,
    file: str | None = None,
    merged: bool = False,
) -> Row:
    def feed_forward(settings: Settings, token_counts: Tensor):
        def build(seed: int, layer: int) -> nn.Module:
            # Seeds of their own: the experts are equal whatever router stands before them.
            with seeded(seed, f"{layer}.experts"):
                experts = tr.SwiGLUExperts(
                    num_experts=settings.num_experts,
                    hidden_size=settings.hidden_size,
                    intermediate_size=settings.expert_size,
                )
            with seeded(seed, f"{layer}.router"):
                return tr.MoE(
                    router(settings, token_counts),
                    tr.SoftMergedExperts(experts) if merged else experts,
                )

        return build

    return Row(name, describes, feed_forward, source, file)


def _hash(settings: Settings, token_counts: Tensor) -> tr.Router:
    return tr.HashRouter.balanced(
        token_counts, num_experts=settings.num_experts, top_k=settings.top_k
    )


def _sizes(settings: Settings) -> dict[str, int]:
    return {"hidden_size": settings.hidden_size, "num_experts": settings.num_experts}


def _top_k(settings: Settings, *losses: nn.Module, **options: Any) -> tr.Router:
    return tr.TopKRouter(**_sizes(settings) | {"top_k": settings.top_k, "losses": losses} | options)


def _softmax_balanced(settings: Settings, token_counts: Tensor, **options: Any) -> tr.Router:
    losses = tr.losses.LoadBalanceLoss(1e-2), tr.losses.ZLoss(1e-3)
    return _top_k(settings, *losses, **options)


def _softmax_unbalanced(settings: Settings, token_counts: Tensor) -> tr.Router:
    return _top_k(settings, tr.losses.ZLoss(1e-3))


def _top_1(settings: Settings, token_counts: Tensor) -> tr.Router:
    return _softmax_balanced(settings, token_counts, top_k=1, renormalize=False)


def _capacity(settings: Settings, token_counts: Tensor) -> tr.Router:
    return _softmax_balanced(settings, token_counts, capacity_factor=1.25)


def _sigmoid_bias(settings: Settings, token_counts: Tensor) -> tr.Router:
    return _top_k(settings, score="sigmoid", selection_bias=True)


def _recurrent(settings: Settings, token_counts: Tensor) -> tr.Router:
    return tr.RecurrentRouter(
        **_sizes(settings),
        top_k=settings.top_k,
        losses=[tr.losses.LoadBalanceLoss(1e-2)],
    )


def _entropy(settings: Settings, token_counts: Tensor) -> tr.Router:
    return tr.EntropyRouter(
        **_sizes(settings),
        losses=[tr.losses.RoutingEntropyLoss(1e-2), tr.losses.SoftBalanceLoss(1e-3)],
    )


def _top_p(settings: Settings, token_counts: Tensor) -> tr.Router:
    return tr.TopPRouter(
        **_sizes(settings),
        losses=[tr.losses.LoadBalanceLoss(1e-2, "switch"), tr.losses.EntropyLoss(1e-4)],
    )


def _adaptive_k(settings: Settings, token_counts: Tensor) -> tr.Router:
    top_k, most = settings.top_k, math.log(settings.num_experts)
    return tr.AdaptiveKRouter(
        **_sizes(settings),
        top_ks=[max(1, top_k // 2), top_k, min(2 * top_k, settings.num_experts)],
        thresholds=[0.3 * most, 0.7 * most],
        losses=[tr.losses.LoadBalanceLoss(1e-2), tr.losses.ZLoss(1e-3)],
    )


def _entmax(settings: Settings, token_counts: Tensor) -> tr.Router:
    return tr.EntmaxRouter(
        **_sizes(settings),
        losses=[tr.losses.LoadBalanceLoss(1e-2)],
    )


def _relu(settings: Settings, token_counts: Tensor) -> tr.Router:
    return tr.ReLURouter(
        **_sizes(settings),
        init_std=0.1,
        losses=[
            tr.losses.ActivationLocalityLoss(2e-3),
            tr.losses.ChunkSparsificationLoss(5e-2),
        ],
    )


def _smear(settings: Settings, token_counts: Tensor) -> tr.Router:
    return tr.SMEARRouter(
        **_sizes(settings),
        segment=max(1, settings.sequence // 4),
        causal=True,
    )


def _noisy(settings: Settings, token_counts: Tensor) -> tr.Router:
    return tr.NoisyTopKRouter(
        **_sizes(settings),
        top_k=settings.top_k,
        losses=[tr.losses.ImportanceLoss(0.1), tr.losses.LoadLoss(0.1)],
    )


ROWS = {
    row.name: row
    for row in (
        _dense(BASELINE, "one layer as wide as a token's experts", lambda s: s.top_k),
        _dense("dense-total", "one layer as wide as all experts", lambda s: s.num_experts),
        _routed("hash", "experts fixed by the token", _hash),
        _routed("softmax", "softmax top-k, balance loss 1e-2, z-loss 1e-3", _softmax_balanced),
        _routed("softmax-unbalanced", "the same without balance loss", _softmax_unbalanced),
        _routed("sigmoid-bias", "sigmoid top-k, balanced by a bias and no loss", _sigmoid_bias),
        _routed("top-1", "as softmax, one expert per token: half the active width", _top_1),
        _routed("capacity", "as softmax, at most 1.25 of a fair share per sequence", _capacity),
        _routed("entropy", "top-p 0.75, all experts where the entropy is high", _entropy),
        _routed("top-p", "top-p 0.4, balance loss 1e-2, entropy loss 1e-4", _top_p),
        _routed("adaptive-k", "half, once or twice top-k, by the entropy", _adaptive_k),
        _routed("entmax", "1.5-entmax, balance loss 1e-2", _entmax),
        _routed("relu", "ReLU with RMS norm, locality and chunk losses of BlockFFN", _relu),
        _routed("recurrent", "a state from layer to layer, balance loss 1e-2", _recurrent),
        _routed(
            "smear", "experts merged by the segment before: half the width", _smear, merged=True
        ),
        _routed("noisy", "noisy top-k, importance and load loss 0.1", _noisy),
    )
}


def chosen_rows(names: str, router_files: list[str]) -> list[Row]:
    """``all`` or names with commas between, then the user's routers.

    Raises:
        AblationError: a name is unknown or taken, or a router file cannot be used.
    """
    wanted = list(ROWS) if names == "all" else names.split(",")
    unknown = [name for name in wanted if name not in ROWS]
    if unknown:
        raise AblationError(f"--rows: expected all or names of {', '.join(ROWS)}, got {unknown[0]}")
    rows = [row for name, row in ROWS.items() if name in wanted]
    for argument in router_files:
        row = router_file_row(argument)
        if any(row.name == other.name for other in rows):
            raise AblationError(f"--router: expected different class names, got {row.name} twice")
        rows.append(row)
    return rows


def router_file_row(argument: str) -> Row:
    """The row of ``FILE.py:CLASS``.

    The file is run. The class is a `torch_routers.Router` whose constructor takes ``hidden_size``,
    ``num_experts`` and ``top_k`` by keyword.

    Raises:
        AblationError: there is no such file or class, or it cannot be built in this way.
    """
    name, _, class_name = argument.rpartition(":")
    path = Path(name)
    if not name or not path.is_file():
        raise AblationError(
            f"--router: expected FILE.py:CLASS with an existing file, got {argument}"
        )
    router_class = getattr(_run_file(path), class_name, None)
    if not (isinstance(router_class, type) and issubclass(router_class, tr.Router)):
        raise AblationError(
            f"--router: expected {class_name} in {path.name} to be a subclass of "
            f"torch_routers.Router, got {router_class!r}"
        )

    def router(settings: Settings, token_counts: Tensor) -> tr.Router:
        keywords = {key: getattr(settings, key) for key in CLASS_KEYWORDS}
        try:
            return router_class(**keywords)
        except TypeError as error:
            raise AblationError(
                f"--router: expected {class_name}({', '.join(f'{key}=' for key in keywords)}) to "
                f"work, got TypeError: {error}"
            ) from error

    source = hashlib.sha256(path.read_bytes()).hexdigest()
    router(Settings(), Tensor())  # a wrong constructor should not wait for its turn
    return _routed(class_name, f"from {path.name}", router, source, argument)


def _row_again(name: str, source: str | None, file: str | None) -> Row:
    row = ROWS[name] if file is None else router_file_row(file)
    if row.source != source:
        raise AblationError(f"--router: expected {file} to stay as it was, got another content")
    return row


def _run_file(path: Path):
    name = f"ablation_router_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise AblationError(f"--router: expected a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up here
    spec.loader.exec_module(module)
    return module
