"""`tokendance calibrate`: measure a model, and write its fidelity table into the cache folder."""

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from tokendance.bench.settings import Size
from tokendance.bench.suite import LiveTable
from tokendance.errors import ConfigError
from tokendance.fidelity.calibrate import CORRECTIONS, TINY, CalibrationSize, measure_cells
from tokendance.fidelity.table import Cell, FidelityTable, table_path
from tokendance.models.loader import LoadedModel, load_model
from tokendance.options import EngineOptions
from tokendance.results import check_writable, write_result

_ADVICE = "Set TOKENDANCE_CACHE to a folder that can be."


def run_calibration(
    name: str, size: Size, seed: int, options: EngineOptions, console: Console
) -> None:
    """Calibrate a model.

    Raises:
        TokenDanceError: for a model that cannot be loaded, or a folder that cannot be written.
        SystemExit: with code 130 if the user interrupts; nothing is written then.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with console.status(f"Loading {escape(name)} ..."):
        model = load_model(name, options.dtype, options.device, options.weights)
    duration = " This takes about half an hour." if size == "full" else ""
    console.print(f"[bold]{escape(name)}[/bold], {model.precision}.{duration}")
    if size == "full":
        check_writable(_place(model.name, model.precision), _ADVICE)
    try:
        chosen = TINY if size == "tiny" else CalibrationSize()
        table = calibrate(model, chosen, seed, options, console)
    except KeyboardInterrupt:
        console.print("Interrupted; nothing was written.")
        sys.exit(130)
    if not table.cells:
        raise ConfigError(
            f"The context of {name} ({model.shape.max_context} tokens) is too short to calibrate."
        )
    if size == "tiny":
        console.print("A tiny run measures next to nothing, so the table is not written.")
    else:
        write_table(table, console)


def calibrate(
    model: LoadedModel, size: CalibrationSize, seed: int, options: EngineOptions, console: Console
) -> FidelityTable:
    """Measure the table of a model, printing each cell."""
    columns = {"in_order": "in order", "num_before": "before", "num_blocks": "blocks"}
    corrections = [f"{edges.first}+{edges.last}" for edges in CORRECTIONS]
    columns |= dict(zip(corrections, corrections, strict=True)) | {"pic": "pic"}
    table = LiveTable(console, "KL after correcting the first + last tokens of each block", columns)
    cells: list[Cell] = []
    with console.status("") as status:
        for cell in measure_cells(model, size, seed, options, status.update):
            cells.append(cell)
            table.add(
                {
                    "in_order": "yes" if cell.in_order else "no",
                    "num_before": cell.num_before,
                    "num_blocks": cell.num_blocks,
                    **{f"{of.first}+{of.last}": of.kl for of in cell.measured},
                    "pic": cell.pic,
                }
            )
    return FidelityTable(model.name, model.precision, size.block_tokens, tuple(cells))


def write_table(table: FidelityTable, console: Console) -> None:
    """Write a table where engines look for it, whole or not at all."""
    path = _place(table.model, table.dtype)
    write_result(path, table.to_json() + "\n", _ADVICE)
    console.print(
        f"The table is {escape(str(path))}. "
        "The default goes by it from now on, and so does `--fidelity-target KL`."
    )


def _place(model: str, dtype: str) -> Path:
    """Where a table goes, in a folder that is there."""
    path = table_path(model, dtype)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}. {_ADVICE}") from error
    return path
