"""The names of backends. Imports nothing heavy, since the command line reads them."""

from typing import Literal, get_args

AttentionName = Literal["auto", "native", "torch", "triton", "reference"]
ATTENTION_NAMES: tuple[AttentionName, ...] = get_args(AttentionName)
