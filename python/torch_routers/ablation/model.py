"""The small transformer language model that every row trains, all but its feed-forward layers."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_routers as tr
from torch_routers.ablation.presets import Settings


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Random numbers that depend on ``seed`` and ``name`` only.

    Each part of the model is built under its name. Parts that two rows share are then equal,
    whatever the rows build beside them.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield


class Linear(nn.Linear):
    """Without bias, and with the initialisation of the experts: normal, std = fan_in ** -0.5."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)


class DenseFeedForward(nn.Module):
    """One SwiGLU layer for all tokens: what a mixture of experts stands in for.

    Args:
        hidden_size: width of the model.
        intermediate_size: hidden width.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """``[..., hidden_size]`` to the same shape; it uses no context."""
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, hidden_size: int, heads: int, sequence: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj = Linear(hidden_size, 3 * hidden_size)
        self.out_proj = Linear(hidden_size, hidden_size)
        half = hidden_size // heads // 2
        angles = torch.outer(torch.arange(sequence), 10_000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, hidden_size]`` to the same shape."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv_proj(x).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(
            self._rotate(query), self._rotate(key), value, is_causal=True
        )
        return self.out_proj(y.transpose(1, 2).flatten(-2))

    def _rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Block(nn.Module):
    """Attention, then a feed-forward layer, each normalised before and added after.

    Args:
        attention: the first branch.
        feed_forward: the second branch.
        hidden_size: width of the model.
        scale: of what a branch adds. Without it, a router whose weights are small looks better
            for that alone.
    """

    def __init__(
        self, attention: Attention, feed_forward: nn.Module, hidden_size: int, scale: float
    ) -> None:
        super().__init__()
        self.scale = scale
        self.attention_norm = nn.RMSNorm(hidden_size)
        self.attention = attention
        self.feed_forward_norm = nn.RMSNorm(hidden_size)
        self.feed_forward = feed_forward

    def forward(
        self, x: Tensor, token_ids: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """``x`` and the state of a recurrent router, None where there is none."""
        x = x + self.scale * self.attention(self.attention_norm(x))
        y = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, tr.MoE):
            y, routing = self.feed_forward(y, token_ids=token_ids, state=state, return_routing=True)
            state = routing.state
        else:
            y = self.feed_forward(y, token_ids=token_ids)
        return x + self.scale * y, state


class LanguageModel(nn.Module):
    """Next-token logits.

    Args:
        settings: sizes.
        vocab_size: rows of the embedding.
        seed: of the initialisation.
        feed_forward: from ``seed`` and a block's number to its feed-forward layer.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        vocab_size: int,
        seed: int,
        feed_forward: Callable[[int, int], nn.Module],
    ) -> None:
        super().__init__()
        width = settings.hidden_size
        with seeded(seed, "embedding"):
            self.embedding = nn.Embedding(vocab_size, width)
            # Small, so that an optimiser step turns it far; `forward` brings it to unit RMS.
            nn.init.normal_(self.embedding.weight, std=0.02)
        blocks = []
        for layer in range(settings.layers):
            with seeded(seed, f"{layer}.attention"):
                attention = Attention(width, settings.heads, settings.sequence)
            blocks.append(
                Block(
                    attention,
                    feed_forward(seed, layer),
                    width,
                    # All branches together then add about as much as the embedding.
                    scale=(2 * settings.layers) ** -0.5,
                )
            )
        self.blocks = nn.ModuleList(blocks)
        if any(isinstance(module, tr.RecurrentRouter) for module in self.modules()):
            tr.share_cell(self)
        self.norm = nn.RMSNorm(width)
        with seeded(seed, "head"):
            self.head = Linear(width, vocab_size)

    def forward(self, token_ids: Tensor) -> Tensor:
        """``[batch, sequence]`` int64 to ``[batch, sequence, vocab_size]``."""
        # Unit RMS: where embeddings are small, the first layers see little of the token, and a
        # hash of the token then beats every router that has to read it from there.
        x = F.rms_norm(self.embedding(token_ids), (self.embedding.embedding_dim,))
        state = None
        for block in self.blocks:
            x, state = block(x, token_ids, state)
        return self.head(self.norm(x))
