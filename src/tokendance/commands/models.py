"""`tokendance models`: what can be loaded here, and why something cannot."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokendance.models import demo
from tokendance.models.loader import load_model, why_not_loadable
from tokendance.units import format_bytes


def list_models(names: Sequence[str], console: Console) -> None:
    """Print a table of the demo models, those in the Hugging Face cache, and `names`."""
    table = Table(title="Models")
    table.add_column("name", no_wrap=True)
    table.add_column("can be loaded")
    for name in dict.fromkeys([*demo.MODELS, *names, *_cached_models()]):
        reason = why_not_loadable(name)
        table.add_row(escape(name), "[green]yes[/green]" if reason is None else escape(reason))
    console.print(table)
    console.print(
        "Any folder with a transformers checkpoint in safetensors, and any id of the Hugging Face "
        "hub, can be given as --model if its attention fits. This table goes by configurations; "
        "loading also runs two tokens to make sure."
    )


def prepare_model(name: str, console: Console) -> None:
    """Load a model once, which converts the demo weights, and print what it is."""
    with console.status(f"Preparing {escape(name)} (converting takes half a minute, once) ..."):
        model = load_model(name)
    shape = model.shape
    per_token = format_bytes(shape.kv_bytes_per_token(model.dtype))
    console.print(
        f"{escape(name)} is ready: {shape.num_layers} layers, {shape.num_heads} heads, "
        f"{shape.num_kv_heads} KV heads of {shape.head_dim}, context {shape.max_context}, "
        f"{per_token} of KV per token in {str(model.dtype).removeprefix('torch.')}."
    )


def _cached_models() -> list[str]:
    """Ids of the models in the Hugging Face cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return sorted(r.repo_id for r in scan_cache_dir().repos if r.repo_type == "model")
    except CacheNotFound:
        return []
