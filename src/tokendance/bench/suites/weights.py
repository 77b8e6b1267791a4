"""`weights`: what a dtype, and weights in bytes, cost in what the model says.

The model reads texts as they are, each by itself, in one pass with torch's own attention, so what
differs is the products. For each text: perplexity, and how far the next token's distribution is
from that of float32, over all positions. What they are worth in speed: `decode --weights int8`.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from tokendance.attention.interface import windows_of
from tokendance.bench.plots import draw_bars
from tokendance.bench.settings import BenchSettings
from tokendance.bench.suite import LiveTable, SuiteResult, spread
from tokendance.bench.workload import read_people
from tokendance.fidelity.compare import compare_logprobs
from tokendance.models import hook
from tokendance.models.loader import LoadedModel, load_model
from tokendance.models.packing import weight_bytes
from tokendance.options import Weights

# By name: the dtype that is computed in, and how weights are kept. The first is what the others are
# compared with.
KINDS: dict[str, tuple[str, Weights]] = {
    "float32": ("float32", "native"),
    "bfloat16": ("bfloat16", "native"),
    "float32, int8": ("float32", "int8"),
    "bfloat16, int8": ("bfloat16", "int8"),
}
_NUM_TEXTS = 10
# Log-probabilities that are kept, of all texts: 2 GiB.
_MAX_NUMBERS = 2**29
_COLUMNS = {
    "kind": "kind",
    "perplexity": "perplexity",
    "kl": "KL, nats",
    "kl_min": "min",
    "kl_max": "max",
    "top1": "same first",
    "weights_mib": "weights MiB",
}


@dataclass(frozen=True, slots=True)
class _Text:
    """A text, and what the model in float32 says behind each of its tokens but the last."""

    token_ids: Tensor  # int64 (T,)
    expected: Tensor  # log-probabilities, float32 (T - 1, vocabulary)


def run(settings: BenchSettings, console: Console) -> SuiteResult:
    """Measure the suite; see the module."""
    texts: list[_Text] = []
    people = read_people(settings.source)[: 2 if settings.tiny else _NUM_TEXTS]
    table = LiveTable(console, f"{len(people)} texts, against float32", _COLUMNS)
    for name, (dtype, weights) in KINDS.items():
        with console.status(f"{name} ..."):
            model = load_model(settings.model, dtype, "cpu", weights)
            if not texts:
                max_tokens = 40 if settings.tiny else _most_tokens(model, len(people))
                ids = [_token_ids(model, person.system)[:max_tokens] for person in people]
                texts = [_Text(tokens, _logprobs(model, tokens)) for tokens in ids]
            table.add({"kind": name, **_compare(model, texts)})
            del model  # before the next one is loaded
    rows = {row["kind"]: row for row in table.rows}
    headline = {
        "kl_bfloat16": rows["bfloat16"]["kl"],
        "kl_int8": rows["bfloat16, int8"]["kl"],
        "perplexity_ratio_int8": rows["bfloat16, int8"]["perplexity"]
        / rows["float32"]["perplexity"],
    }
    num_tokens = sum(len(text.token_ids) for text in texts)
    notes = [f"{len(texts)} texts of {num_tokens} tokens; least and most are over texts."]
    return SuiteResult("weights", settings.model, table.rows, headline, notes)


def _most_tokens(model: LoadedModel, num_texts: int) -> int:
    """Tokens of a text that every layer sees whole, and whose log-probabilities find room."""
    windows = windows_of(model.layers)
    room = _MAX_NUMBERS // model.shape.vocab_size // num_texts
    return min(room, model.shape.max_context, *windows)


def _token_ids(model: LoadedModel, text: str) -> Tensor:
    return torch.tensor(model.tokenizer(text, add_special_tokens=True)["input_ids"])


@torch.inference_mode()
def _logprobs(model: LoadedModel, token_ids: Tensor) -> Tensor:
    """What a model says behind each token but the last, float32 (T - 1, vocabulary)."""
    places = torch.arange(len(token_ids))
    logits = hook.forward(model.module, token_ids, places, places[:-1], hook.PlainAttention())
    return torch.log_softmax(logits.float(), dim=-1)


def _compare(model: LoadedModel, texts: Sequence[_Text]) -> dict[str, float]:
    """Perplexity, KL and top-1 agreement over all tokens, with the KL's range over texts."""
    losses, kl, same = [], [], []
    for text in texts:
        said = _logprobs(model, text.token_ids)
        of_text, first = compare_logprobs(text.expected, said)
        kl.append(of_text)
        same.append(first)
        losses.append(-said.gather(1, text.token_ids[1:, None]))
    of_texts = spread([float(values.mean()) for values in kl])
    return {
        "perplexity": math.exp(float(torch.cat(losses).mean())),
        "kl": float(torch.cat(kl).mean()),
        "kl_min": of_texts["min"],
        "kl_max": of_texts["max"],
        "top1": statistics.mean(torch.cat(same).tolist()),
        "weights_mib": weight_bytes(model.module) / 2**20,
    }


def plot(result: SuiteResult, path: Path) -> None:
    """Draw the KL of each kind."""
    rows = [row | {"texts": "", "kl_milli": 1000 * row["kl"]} for row in result.rows]
    title = f"Distance from float32, {result.model}"
    label = "KL, thousandths of a nat"
    draw_bars(path, rows, "kind", "texts", "kl_milli", title=title, y_label=label)
