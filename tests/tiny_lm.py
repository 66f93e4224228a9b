"""A small language model with the names of a large one, for tests of mixtures of LoRAs."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

HIDDEN, VOCAB = 16, 20


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in "q_proj", "k_proj", "v_proj", "o_proj":
            setattr(self, name, nn.Linear(HIDDEN, HIDDEN, bias=name == "q_proj"))

    def forward(self, hidden_states, attention_mask):
        q, k, v = (
            getattr(self, name)(hidden_states).unflatten(-1, (2, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        size = q.shape[-2]
        mask = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
        if attention_mask is not None:  # whoever sees nothing sees itself
            diagonal = torch.eye(size, dtype=torch.bool, device=q.device)
            mask = mask & attention_mask.bool()[:, None, None] | diagonal
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(HIDDEN, 24), nn.Linear(24, HIDDEN)

    def forward(self, x):
        return self.down_proj(F.silu(self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.self_attn, self.mlp = Attention(), MLP()

    def forward(self, hidden_states, attention_mask=None):
        y = self.self_attn(hidden_states=self.norm1(hidden_states), attention_mask=attention_mask)
        x = hidden_states + y
        return x + self.mlp(self.norm2(x))


class TinyLM(nn.Module):
    #: None, "reentrant", or "other" checkpoints around the layers.
    checkpoints = None

    def __init__(self, layers=2):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm, self.lm_head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            if self.checkpoints is None:
                x = layer(x, attention_mask)
            else:
                reentrant = self.checkpoints == "reentrant"
                x = checkpoint(layer, x, attention_mask, use_reentrant=reentrant)
        return self.lm_head(self.norm(x))


def tiny_lm(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return TinyLM(**options).to(dtype)


def batch(samples=3, length=6, seed=1):
    """Token ids, and a mask with padding on the left of some."""
    ids = torch.randint(VOCAB, (samples, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(samples, length, dtype=torch.int64)
    for sample in range(samples):
        mask[sample, : sample % 3] = 0
    return ids, mask


def loss_of(logits, ids, mask):
    """Mean cross-entropy of the next token, over real ones."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    real = (mask[:, 1:] * mask[:, :-1]).flatten()
    return (losses * real).sum() / real.sum()
