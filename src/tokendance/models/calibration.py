"""Where the fidelity table of a model lies: in the cache folder, beside converted checkpoints."""

import hashlib
import os
import re
from pathlib import Path

from tokendance.models.demo import cache_folder


def table_path(model: str, dtype: str) -> Path:
    """Path of a model's table.

    The name holds what is harmless of the model's name, and a digest of all of it, so that no
    name leads out of the folder and no two share a file.

    Args:
        model: as the user gave it.
        dtype: as the command line spells it.
    """
    name = os.path.realpath(model) if os.path.isdir(model) else model
    readable = re.sub(r"[^A-Za-z0-9-]+", "-", Path(name).name)[:40]
    digest = hashlib.blake2b(name.encode(), digest_size=6).hexdigest()
    return cache_folder() / "fidelity" / f"{readable}-{dtype}-{digest}.json"
