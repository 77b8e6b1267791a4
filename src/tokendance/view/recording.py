"""A recorder on an LLM, with all that its document needs."""

from pathlib import Path

from tokendance import __version__
from tokendance.llm import LLM
from tokendance.models.loader import dtype_name
from tokendance.rounds.segments import Salt
from tokendance.view.document import EngineFacts, Json, make_document, write_document
from tokendance.view.recorder import Recorder, RecordLimits
from tokendance.view.rounds import StoredBytes


class Recording:
    """The last rounds of an LLM, from now on.

    Attributes:
        recorder: listens to its engine.
        facts: of the engine.
    """

    def __init__(self, llm: LLM, limits: RecordLimits | None = None) -> None:
        """Begin to record."""
        engine = llm.engine
        correction = llm.correction.spec if engine.options.reuse == "collective" else None
        self._llm = llm
        self.facts = EngineFacts(
            __version__,
            llm.model.name,
            dtype_name(llm.model.dtype),
            engine.options.reuse,
            correction,
            engine.page_bytes,
            engine.kv_bytes_per_token,
        )
        self.recorder = Recorder(
            self._stored,
            page_size=engine.options.page_size,
            page_bytes=engine.page_bytes,
            limits=limits,
        )
        engine.observe(self.recorder)

    def _stored(self) -> StoredBytes:
        tier = self._llm.tier
        return StoredBytes(
            self._llm.engine.status().stored_pages * self.facts.page_bytes,
            None if tier is None else tier.bytes_on_disk,
        )

    @property
    def has_rounds(self) -> bool:
        """Whether there is anything to see."""
        return bool(self.recorder.read().rounds)

    def document(self, *, with_text: bool, tenant: Salt | None = None) -> Json:
        """Make the document of what has happened so far.

        Args:
            with_text: whether it holds the text of prompts and answers.
            tenant: whose prompts it holds; None for all.
        """
        decode = self._llm.encoder.decode if with_text else None
        return make_document(self.recorder.read(), self.facts, decode, tenant)

    def write(self, path: Path, *, with_text: bool) -> None:
        """Write the document to a file, whole or not at all.

        Raises:
            ConfigError: if it cannot be written.
        """
        write_document(path, self.document(with_text=with_text))
