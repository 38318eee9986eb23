"""Loading a model for a command: the embedded one, a local folder, or a name on the hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqai.cli.report import CommandError

if TYPE_CHECKING:
    import torch

__all__ = ["WRONG_USAGE", "LoadedModel", "check_torch", "find_device", "load_model"]

DTYPES = ("float32", "bfloat16", "float16")
WRONG_USAGE = 2
HUB_TIMEOUT_SECONDS = 10
NEEDS_TORCH = "this command needs torch and transformers: pip install 'tqai[torch]'"


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer.

    Attributes:
        name: what to call it in output.
        embedded: it is the model inside the package.
        model: a transformers causal language model, in eval mode, on its device, or an `MlxModel`.
        tokenizer: its tokenizer.
    """

    name: str
    embedded: bool
    model: Any
    tokenizer: Any

    @property
    def context_tokens(self) -> int | None:
        """Tokens that the model's positions reach, None if it does not say."""
        text_config = self.model.config.get_text_config(decoder=True)
        return getattr(text_config, "max_position_embeddings", None)

    def batch(self, ids: Sequence[int]) -> Any:
        """`ids` as the model takes them, int64 `[1, tokens]`: a tensor on its device, numpy for MLX."""
        if hasattr(self.model, "mlx"):
            import numpy as np

            return np.array([ids], dtype=np.int64)
        import torch

        return torch.tensor([ids], dtype=torch.long, device=self.model.device)


def load_model(
    name: str | None, device: str | None, dtype: str | None, backend: str | None = None
) -> LoadedModel:
    """The model of that name (None: the embedded one), on `device` (None: a GPU if there is one); with
    backend "mlx" a local folder, loaded by mlx-lm.

    Raises:
        CommandError: torch or transformers are not installed; no such model; the hub is out of reach;
            no such device or dtype.
    """
    if backend == "mlx":
        return _load_mlx(name, device, dtype)
    check_torch()
    if dtype is not None and dtype not in DTYPES:
        raise CommandError(f"--dtype {dtype}: allowed are {', '.join(DTYPES)}", WRONG_USAGE)
    source = None if name is None else _source(name)
    where = find_device(device)
    import torch

    wanted = None if dtype is None else getattr(torch, dtype)
    _quiet_transformers()
    if name is None or source is None:
        return _load_embedded(wanted, where)
    return _load_named(name, source, wanted, where)


def _load_mlx(name: str | None, device: str | None, dtype: str | None) -> LoadedModel:
    from tqai import demo
    from tqai.cli.mlx_model import load_mlx

    if dtype is not None and dtype not in DTYPES:
        raise CommandError(f"--dtype {dtype}: allowed are {', '.join(DTYPES)}", WRONG_USAGE)
    folder = demo.model_path() if name is None else Path(name).expanduser()
    if not folder.is_dir():
        raise CommandError(f"model {name}: no such folder; with --backend mlx a local folder is wanted")
    _check_folder(folder)
    model, tokenizer = load_mlx(str(folder), device, dtype)
    return LoadedModel("embedded model" if name is None else name, name is None, model, tokenizer)


def _load_embedded(dtype: torch.dtype | None, device: torch.device) -> LoadedModel:
    from tqai import demo

    if not (demo.model_path() / "config.json").is_file():
        raise CommandError(f"the embedded model is missing from this installation ({demo.model_path()})")
    model, tokenizer = demo.load(dtype, device)
    return LoadedModel("embedded model", True, model, tokenizer)


def _source(name: str) -> tuple[str, bool]:
    """The folder or hub name that `name` means, and whether to read local files only. Checked before
    anything heavy is loaded."""
    local = Path(name).expanduser()
    if local.is_dir():
        _check_folder(local)
        return str(local), True
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CommandError(f"model {name}: no such folder")
    return name, not _hub_has(name)


def _load_named(
    name: str, source: tuple[str, bool], dtype: torch.dtype | None, device: torch.device
) -> LoadedModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, local = source
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto" if dtype is None else dtype, local_files_only=local
        )
    except Exception as error:  # a damaged or foreign folder fails in any of a dozen ways
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CommandError(f"model {name}: {reason}") from error
    return LoadedModel(name, False, model.to(device).eval(), tokenizer)


def _check_folder(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise CommandError(
            f"model {folder}: the folder has no config.json, so it holds no transformers model"
        )
    try:
        json.loads(config.read_text("utf-8"))
    except ValueError as error:
        raise CommandError(f"model {folder}: config.json is no JSON ({error})") from error


def _hub_has(name: str) -> bool:
    """True if the hub has the model, False if it cannot say but the model was downloaded before.

    Asked first, because loading would retry for half a minute where there is no network.

    Raises:
        CommandError: neither.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        downloaded = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError as error:
        raise CommandError(f"model {name}: neither a folder nor a hub name such as owner/name") from error
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # of the HTTP client, whichever it is
        if downloaded:
            return False
        if isinstance(error, GatedRepoError):
            reason = "the hub asks for a login that may read it"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "no local folder, and the hub has no model of that name"
        else:
            why = str(error).partition("\n")[0]
            reason = f"no local folder, not downloaded, and the hub cannot be reached ({why})"
        raise CommandError(f"model {name}: {reason}") from error
    return True


def check_torch() -> None:
    """
    Raises:
        CommandError: torch or transformers are not installed.
    """
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise CommandError(NEEDS_TORCH)


def find_device(name: str | None) -> torch.device:
    """The device of that name, checked; None: a GPU if there is one.

    Raises:
        CommandError: torch is not installed, or there is no such device.
    """
    if find_spec("torch") is None:
        raise CommandError(NEEDS_TORCH)
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"--device {name}: {str(error).partition(chr(10))[0]}", WRONG_USAGE) from error
    if device.type == "meta":
        raise CommandError("--device meta: holds no numbers", WRONG_USAGE)
    return device


def _quiet_transformers() -> None:
    import logging
    import sys

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        transformers_logging.disable_progress_bar()
        disable_progress_bars()
