"""The compiled kernel; `native/module.cpp` makes it."""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tokendance.attention.plan import Int32Array, Int64Array

Float32Array = npt.NDArray[np.float32]

def kernels() -> list[str]:
    """Names of the kernels that this machine can run, the fastest first."""

def thread_source() -> str:
    """Whose threads are used: "openmp" are torch's, "own" are the module's."""

class Step:
    """The plan of a step."""

    def __init__(
        self,
        kernel: str,
        num_slots: int,
        write_slots: Int64Array,
        row_indptr: Int64Array,
        range_indptr: Int64Array,
        rows: Int64Array,
        slot_begin: Int64Array,
        slot_end: Int64Array,
        rotations: Int32Array,
        key_end: Int32Array,
        /,
    ) -> None:
        """Take a plan over slots 0 ... `num_slots` - 1.

        Args:
            kernel: one of `kernels()`.
            num_slots: at most S.
            write_slots: (T,), slot that each row writes.
            row_indptr: (groups + 1,), where the rows of each read group begin.
            range_indptr: (groups + 1,), where its slot ranges begin.
            rows: rows of all groups, one group after the other.
            slot_begin: first slot of each range.
            slot_end: slot after its last.
            rotations: for each range of a group and row of it, an entry of the rotation tables.
            key_end: likewise, how many keys from the range's begin the row sees.

        Raises:
            ValueError: if an index is out of range.
        """

    def extend(self) -> None:
        """Make it the plan of the step after it, if it has one row, of a request that runs alone.

        The new token's slot is the one behind the last range, and the row sees that range whole.

        Raises:
            ValueError: if there are several rows, or memory ends there.
        """

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        output: Tensor,
        key_begin: Int32Array | None,
        cosines: Float32Array,
        sines: Float32Array,
        interleaved: bool,
        scale: float,
        threads: int,
    ) -> None:
        """Write the new keys and values, and attend; see `Backend.attend`.

        Args:
            query: (T, H, D).
            key: (T, KVH, D).
            value: (T, KVH, D).
            keys: (KVH, S, D), written.
            values: (KVH, S, D), written.
            output: (T, H, D), written.
            key_begin: like `key_end`, keys before these are not seen; None: all are.
            cosines: (rotations, rotary_dim / 2); entry 0 is not read, as it is no rotation.
            sines: likewise.
            interleaved: which components of a head form a pair.
            scale: of the scores, positive.
            threads: at most.

        Raises:
            ValueError: if shapes, strides or dtypes do not fit.
        """

def packed_bytes(kernel: str, kind: str, inputs: int, outputs: int) -> int:
    """Bytes that the weights of a linear layer take, a multiple of 64.

    Args:
        kernel: one of `kernels()`.
        kind: "bfloat16" or "int8".
        inputs: of the layer.
        outputs: of the layer.
    """

def has_pairs(kernel: str, inputs: int) -> bool:
    """Whether a kernel multiplies weights in bfloat16, where a layer has so many inputs."""

class PackedWeights:
    """The weights of a linear layer, as the products take them (native/products.h)."""

    def __init__(
        self, kernel: str, kind: str, weight: Tensor, bias: Tensor | None, memory: Tensor
    ) -> None:
        """Lay out a weight.

        Args:
            kernel: one of `kernels()`.
            kind: "bfloat16", which takes `has_pairs`, or "int8".
            weight: (outputs, inputs), bfloat16; for int8 also float32.
            bias: float32 (outputs,), or None.
            memory: uint8, `packed_bytes` of them, aligned to 64 bytes; it is kept and written.

        Raises:
            ValueError: if shapes, strides, dtypes or the memory do not fit.
        """

    def multiply(self, rows: Tensor, output: Tensor, threads: int) -> None:
        """Multiply rows. What a row gives does not depend on the other rows.

        Args:
            rows: (T, inputs), contiguous, bfloat16; with int8 also float32.
            output: (T, outputs), contiguous, of that dtype, written.
            threads: at most.

        Raises:
            ValueError: if shapes, strides or dtypes do not fit.
        """

_Norm = tuple[Tensor, float, bool]

class DecoderLayer:
    """A layer of a model: its norms, products and attention in one call."""

    def __init__(
        self,
        kernel: str,
        qkv: PackedWeights,
        output: PackedWeights,
        gate_up: PackedWeights,
        down: PackedWeights,
        heads: int,
        kv_heads: int,
        size: int,
        activation: str,
        before: _Norm,
        after_attention: _Norm | None,
        between: _Norm,
        after_mlp: _Norm | None,
        of_query: _Norm | None,
        of_key: _Norm | None,
    ) -> None:
        """Put a layer together, which keeps its parts.

        Args:
            kernel: one of `kernels()`.
            qkv: (n) -> (H + 2 KVH, D): queries, keys, values.
            output: (H, D) -> (n).
            gate_up: (n) -> (2 m): what is activated, and what that multiplies.
            down: (m) -> (n).
            heads: H.
            kv_heads: KVH.
            size: D.
            activation: "silu" or "gelu_tanh".
            before: norm of the rows, (n,): weight, what is added to the mean square, and whether
                the factor is 1 + weight.
            after_attention: of what attention adds, or None.
            between: of the rows with that, before the gate.
            after_mlp: of what the gate adds, or None.
            of_query: of each head of the queries, (D,), or None.
            of_key: of the keys', alike.

        Raises:
            ValueError: if shapes do not fit each other.
        """

    def forward(
        self,
        hidden: Tensor,
        cosines: Tensor,
        sines: Tensor,
        step: Step,
        keys: Tensor,
        values: Tensor,
        key_begin: Int32Array | None,
        rope_cosines: Float32Array,
        rope_sines: Float32Array,
        interleaved: bool,
        scale: float,
        output: Tensor,
        threads: int,
    ) -> None:
        """Compute the layer for T rows, contiguous, of float32 or bfloat16.

        Args:
            hidden: (T, n) or (1, T, n).
            cosines: (T, rotary_dim), of the rows' positions.
            sines: likewise.
            step: like the next six, see `Step.attend`.
            keys: likewise.
            values: likewise.
            key_begin: likewise.
            rope_cosines: `cosines` there.
            rope_sines: `sines` there.
            interleaved: likewise.
            scale: likewise.
            output: like `hidden`, another tensor, written.
            threads: at most.

        Raises:
            ValueError: if shapes, strides or dtypes do not fit.
        """

class RowOps:
    """What lies between the products of a model: each row by itself.

    Tensors are float32 or bfloat16, all alike, on the CPU, and contiguous; T rows are (T, n) or
    (1, T, n). All raise ValueError if shapes, strides or dtypes do not fit.
    """

    def __init__(self, kernel: str) -> None:
        """Use one of `kernels()`."""

    def normalise(
        self,
        rows: Tensor,
        added: Tensor | None,
        sums: Tensor | None,
        weight: Tensor,
        epsilon: float,
        weight_from_one: bool,
        output: Tensor,
        threads: int,
    ) -> None:
        """Root mean square norm of rows, or of their sums with others (arXiv 1910.07467).

        Args:
            rows: (T, n).
            added: (T, n), or None.
            sums: (T, n), written if something is added.
            weight: (n,).
            epsilon: added to the mean square.
            weight_from_one: the factor is 1 + weight.
            output: (T, n), written.
            threads: at most.
        """

    def rotate(
        self,
        rows: Tensor,
        heads: int,
        kv_heads: int,
        size: int,
        cosines: Tensor,
        sines: Tensor,
        query_weight: Tensor | None,
        key_weight: Tensor | None,
        epsilon: float,
        weight_from_one: bool,
        threads: int,
    ) -> None:
        """Rotate the heads of queries and keys in place, their halves as pairs (arXiv 2104.09864).

        Args:
            rows: (T, n), written: first the queries' heads, then those of the keys.
            heads: H.
            kv_heads: KVH.
            size: D.
            cosines: (T, rotary_dim).
            sines: likewise.
            query_weight: (D,), of a norm of each head before it is rotated; None: there is none.
            key_weight: likewise.
            epsilon: of these norms.
            weight_from_one: likewise.
            threads: at most.
        """

    def gate(self, rows: Tensor, activation: str, output: Tensor, threads: int) -> None:
        """Activate the first half of each row, and multiply it by the second.

        Args:
            rows: (T, 2 n).
            activation: "silu" or "gelu_tanh".
            output: (T, n), written.
            threads: at most.
        """
