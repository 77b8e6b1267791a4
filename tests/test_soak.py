"""The server under load: some seconds of what `make soak` does for ten minutes."""

import io

from rich.console import Console

from soak.run import soak


def test_it_survives() -> None:
    shown = io.StringIO()
    assert soak(12.0, 1, Console(file=shown, width=160)) == [], shown.getvalue()
