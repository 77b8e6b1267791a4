"""The step that a worker is in: from its model runner to its attention backend.

vLLM builds what attention is told by itself, from lengths and block tables. So the runner leaves
here what it knows beyond these, just before vLLM builds it. A worker is a process of its own and
computes one step after the other.
"""

from collections.abc import Mapping

from tokendance.attention.interface import LayerKind, PackedBatch

current: PackedBatch | None = None
"""The batch of the step at hand; None in warm-ups, which attend to nothing."""

layer_kinds: Mapping[str, LayerKind] = {}
"""Rotation and window of each attention layer, by vLLM's name."""
