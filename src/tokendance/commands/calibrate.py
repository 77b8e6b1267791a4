"""`tokendance calibrate`: measure a model, and write its fidelity table into the cache folder."""

import os

import torch
import typer
from rich.console import Console
from rich.markup import escape

from tokendance.bench.calibrate import TINY, CalibrationSize, calibrate
from tokendance.bench.suite import Size
from tokendance.collector.target import FidelityTable
from tokendance.errors import ConfigError
from tokendance.models.calibration import table_path
from tokendance.models.loader import dtype_name, load_model


def run_calibration(
    name: str, dtype: str, size: Size, seed: int, threads: int | None, console: Console
) -> None:
    """Calibrate a model.

    Raises:
        TokenDanceError: for a model that cannot be loaded, or a folder that cannot be written.
        typer.Exit: with code 130 if the user interrupts; nothing is written then.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    with console.status(f"Loading {escape(name)} ..."):
        model = load_model(name, dtype)
    duration = " This takes about half an hour." if size == "full" else ""
    console.print(f"[bold]{escape(name)}[/bold], {dtype_name(model.dtype)}.{duration}")
    try:
        table = calibrate(model, TINY if size == "tiny" else CalibrationSize(), seed, console)
    except KeyboardInterrupt:
        console.print("Interrupted; nothing was written.")
        raise typer.Exit(130) from None
    if not table.cells:
        raise ConfigError(
            f"The context of {name} ({model.shape.max_context} tokens) is too short to calibrate."
        )
    if size == "tiny":
        console.print("A tiny run measures next to nothing, so the table is not written.")
    else:
        write_table(table, console)


def write_table(table: FidelityTable, console: Console) -> None:
    """Write a table where `--fidelity-target` looks for it, whole or not at all.

    Raises:
        ConfigError: if the folder cannot be written.
    """
    path = table_path(table.model, table.dtype)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(table.to_json() + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}. Set TOKENDANCE_CACHE to a folder that "
            "can be."
        ) from error
    console.print(
        f"The table is {escape(str(path))}. "
        "`tokendance run --fidelity-target KL` chooses corrections by it."
    )
