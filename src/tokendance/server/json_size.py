"""How long a body of JSON takes to read, by what stands outside of its texts.

Reading and checking are done by libraries that hold the interpreter's lock, so nobody else is
served. Objects take longest: each message, part and call is one. In microseconds, about:

    object 2.2    field 0.8    list 0.25    other value 0.05 to 0.1
"""

# So many of each count as one object; the first of a kind are those of the objects themselves.
_PER_OBJECT = {b"{": 1, b":": 4, b"[": 8, b",": 50}


class JSONSize:
    """Counts what has come of a body, chunk by chunk; texts may hold anything."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(_PER_OBJECT, 0)
        self._is_in_text = False
        self._rest = b""  # a backslash whose second half has not come

    @property
    def num_objects(self) -> int:
        """Objects, or as many as all fields, lists or values count for, if these are more."""
        return max(count // _PER_OBJECT[mark] for mark, count in self._counts.items())

    def add(self, data: bytes) -> None:
        """Count what has come next."""
        data = self._rest + data
        num_backslashes = len(data) - len(data.rstrip(b"\\"))
        self._rest = b"\\" if num_backslashes % 2 else b""
        whole = data[: len(data) - len(self._rest)]
        pieces = whole.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b"".join(pieces[int(self._is_in_text) :: 2])
        self._is_in_text ^= len(pieces) % 2 == 0
        for mark in self._counts:
            self._counts[mark] += outside.count(mark)
