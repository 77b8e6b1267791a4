"""The server under load: some seconds of what `make soak` does for ten minutes."""

import io

from rich.console import Console

from conftest import is_thorough
from soak.run import soak


def test_it_survives() -> None:
    shown = io.StringIO()
    seconds = 12.0 if is_thorough() else 3.0
    assert soak(seconds, 1, Console(file=shown, width=160)) == [], shown.getvalue()
