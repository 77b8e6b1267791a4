"""Where what can be made again is kept: converted checkpoints, fidelity tables."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$TOKENDANCE_CACHE, else a folder of ours in the user's cache."""
    if chosen := os.environ.get("TOKENDANCE_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tokendance"
