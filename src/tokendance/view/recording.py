"""A recorder on an LLM, with all that its document needs."""

import itertools
import sys
from pathlib import Path

from tokendance import __version__
from tokendance.llm import LLM
from tokendance.rounds.segments import Salt
from tokendance.store.entries import RoundId
from tokendance.view.document import EngineFacts, Json, make_document, write_document
from tokendance.view.recorder import Recorder, RecordLimits
from tokendance.view.rounds import StoredBytes

# In one change: making a document of it, and text of that, takes a few milliseconds, in which no
# other thread of Python runs.
MAX_PIECES = 4000


class Recording:
    """The last rounds of an LLM, from now on.

    Attributes:
        recorder: listens to its engine.
        facts: of the engine.
        decode: token ids to text.
    """

    def __init__(self, llm: LLM, limits: RecordLimits | None = None) -> None:
        """Begin to record."""
        engine = llm.engine
        correction = llm.correction.spec if engine.options.reuse == "collective" else None
        self._llm = llm
        self.decode = llm.encoder.decode
        self.facts = EngineFacts(
            __version__,
            llm.model.name,
            llm.model.precision,
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
        with self.recorder.reading() as recorded:
            return bool(recorded.rounds)

    def document(self, *, with_text: bool, tenant: Salt | None = None) -> Json:
        """Make the document of what has happened so far.

        Args:
            with_text: whether it holds the text of prompts and answers.
            tenant: who sees it, and sees nothing of others; None for the operator, who sees all.
        """
        every = Changes(self, with_text=with_text, tenant=tenant, max_pieces=sys.maxsize)
        document = every.next()
        assert document is not None, "the first time all is new"
        return document

    def write(self, path: Path, *, with_text: bool) -> None:
        """Write the document to a file, whole or not at all.

        Raises:
            ConfigError: if it cannot be written.
        """
        write_document(path, self.document(with_text=with_text))


class Changes:
    """What is new for one who looks on. Each change is a document with the rounds that are new.

    Attributes:
        has_more: whether the last change had no room for all that was new.
    """

    def __init__(
        self,
        recording: Recording,
        *,
        with_text: bool,
        tenant: Salt | None = None,
        max_pieces: int = MAX_PIECES,
    ) -> None:
        """Look on from now.

        Args:
            recording: of what happens.
            with_text: see `Recording.document`; likewise `tenant`.
            tenant: who looks on.
            max_pieces: of bars in one change, if one round has not more by itself.
        """
        self.has_more = False
        self._recording = recording
        self._with_text = with_text
        self._tenant = tenant
        self._seen: dict[RoundId, int] | None = None  # versions; None: nothing was handed out yet
        self._origin_s: float | None = None
        self._max_pieces = max_pieces

    def next(self) -> Json | None:
        """A document of the rounds that have changed since the last call; None if none has.

        Rounds that are kept no more are to be forgotten: `first_round` is the first that is.
        """
        recording = self._recording
        with recording.recorder.reading() as recorded:
            own = [one for one in recorded.rounds if self._tenant in (None, one.salt)]
            seen = self._seen or {}
            changed = [one for one in own if seen.get(one.round_id) != one.version]
            if not changed and self._seen is not None:
                return None
            if self._origin_s is None and own:
                self._origin_s = own[0].added_s
            sizes = itertools.accumulate(one.num_pieces for one in changed)
            num_fit = max(1, sum(size <= self._max_pieces for size in sizes))
            self.has_more, changed = num_fit < len(changed), changed[:num_fit]
            kept = {one.round_id for one in own}
            self._seen = {key: version for key, version in seen.items() if key in kept}
            self._seen |= {one.round_id: one.version for one in changed}
            document = make_document(
                recorded,
                recording.facts,
                recording.decode if self._with_text else None,
                changed,
                self._origin_s or 0.0,
                self._tenant,
            )
            document["first_round"] = own[0].number if own else None
            return document
