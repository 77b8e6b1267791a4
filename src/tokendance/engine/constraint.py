"""What an answer has to look like, token by token (constrained decoding)."""

from typing import Protocol

import numpy as np
import numpy.typing as npt


class Constraint(Protocol):
    """Says which tokens may come next. It belongs to one request.

    That takes time: what has to be found out after a token was accepted is found out by `prepare`.
    """

    @property
    def is_ready(self) -> bool:
        """Whether `forbidden` answers at once."""
        ...

    def prepare(self) -> None:
        """Find out what may come next."""
        ...

    def forbidden(self) -> npt.NDArray[np.bool_]:
        """Tokens that may not come next: bool (vocabulary,). Those that end answers count, too."""
        ...

    def accept(self, token: int) -> None:
        """Go on with a token that was chosen."""
        ...

    def failure(self) -> str | None:
        """Why it cannot be followed any further; None if it can, as far as is known."""
        ...

    def restart(self) -> None:
        """Begin anew."""
        ...
