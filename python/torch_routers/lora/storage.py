"""Folders of adapters: tensors in safetensors, configurations in JSON, both or neither."""

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

#: What PEFT puts before the names of the base model.
PREFIX = "base_model.model."


def save_folder(
    caller: str,
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> None:
    """Write the two files, each whole or not at all; other files of the folder stay.

    They are written into a folder beside it, then renamed: to the folder itself where there is
    none yet.
    """
    _check_safetensors(caller)
    from safetensors.torch import save

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{caller}: expected a folder, got the file {folder}")
    # A copy of each: what shares its memory cannot be saved.
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    files = {
        WEIGHTS: save(copies, metadata={"format": "pt"}),
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
            _sync(temporary / name)
        _sync(temporary)
        if folder.exists():
            for name in files:
                os.replace(temporary / name, folder / name)
            _sync(folder)
        else:
            os.rename(temporary, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_config(caller: str, folder: str | Path) -> dict[str, Any]:
    """The JSON object of a folder."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"{caller}: expected a folder with {CONFIG}, got {folder}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{caller}: expected JSON in {path}, got {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{caller}: expected a JSON object in {path}, got {config!r}")
    return config


def read_tensors(caller: str, folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a folder without PEFT's prefix. Pickles are not read."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        pickles = sorted(p.name for p in Path(folder).glob("adapter_model.*"))
        remedy = ". Files that are pickled can run any code: save them as safetensors"
        raise ValueError(
            f"{caller}: expected {WEIGHTS} in {folder}, got {pickles or 'no such file'}"
            + (remedy if pickles else "")
        )
    _check_safetensors(caller)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{caller}: expected safetensors in {path}, got {error}") from None
    for name in tensors:
        if not name.startswith(PREFIX):
            raise ValueError(
                f"{caller}: expected keys that begin with {PREFIX}, got {name} in {path}"
            )
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def name_on_disk(name: str) -> str:
    """The name of a module as it is without the wrappers of PEFT and of torch.compile."""
    return name.replace("_orig_mod.", "").removeprefix(PREFIX)


def saved_modules(
    model: nn.Module, saved: list[str] | None, mix: str | None = None
) -> dict[str, nn.Module]:
    """Modules that are saved as a whole, by name on disk: the outermost that ``saved`` names.

    With a ``mix``, also those of which PEFT has a copy for an adapter of that name: the copies.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        copies = getattr(module, "modules_to_save", None)
        has_copy = isinstance(copies, nn.ModuleDict) and mix in copies
        is_named = any(name == end or name.endswith(f".{end}") for end in saved or ())
        inside = name_on_disk(name).startswith(tuple(f"{outer}." for outer in found))
        if (is_named or has_copy) and not inside:
            found[name_on_disk(name)] = copies[mix] if has_copy else module
    return found


def base_model_name(model: nn.Module) -> str | None:
    """What Transformers calls the model, if it is one of theirs."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _check_safetensors(caller: str) -> None:
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{caller}: expected the package safetensors, got none. "
            'Run: pip install "torch-routers[lora]"'
        ) from error


def _sync(path: Path) -> None:
    """Wait until it is on the disk, names of a folder too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
