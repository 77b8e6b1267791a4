"""Constrained decoding: answers that are sure to parse as JSON, by a schema, or as tool calls.

llguidance computes which tokens may come next.
"""

import contextlib
import copy
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import llguidance
import numpy as np

from tokendance.models.loader import LoadedModel
from tokendance.server.answer_grammar import (
    FORMAT_PARAM,
    MAX_PATTERN,
    Calls,
    NamedSchema,
    Pattern,
    Wanted,
    answer_grammar,
    coerce_one_of,
    find_endings,
    json_schema_of,
)
from tokendance.server.call_parser import CallParser
from tokendance.server.closing import ClosingTokens, Ends
from tokendance.server.errors import ApiError, bad_request
from tokendance.server.grammar_check import GrammarChecker
from tokendance.server.grammar_constraint import (
    AnswerWatch,
    GrammarConstraint,
    Vocabulary,
    mask_of,
)
from tokendance.server.grammar_process import make_matcher, make_tokenizer, on_stack
from tokendance.server.schema_fit import fit_schema
from tokendance.server.schema_limits import SchemaTooLargeError, check_schemas
from tokendance.server.settings import ServerSettings
from tokendance.server.shortest import Endings
from tokendance.server.tool_format import ToolFormat

# A text by which to check that llguidance reads a tokenizer correctly.
_SAMPLE = '{"name": "a b", "list": [1, 2]}'


class UnreadableError(ApiError):
    """A schema is none, or has something in it that llguidance does not know."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """What an answer is held to, and what it is not held to though a schema says it."""

    constraint: GrammarConstraint
    unheld: tuple[str, ...]


class Grammars:
    """Makes constraints for a model. Thread-safe."""

    def __init__(self, model: LoadedModel, settings: ServerSettings) -> None:
        self._model = model
        self._settings = settings
        self._lock = threading.Lock()  # for the next two
        self._converted: llguidance.LLTokenizer | None = None
        self._known_vocabulary: Vocabulary | None = None
        self.checker = GrammarChecker(settings, self._describe_tokenizer)

    def start(self) -> None:
        """Prepare for the first request, in a few seconds; nothing happens if it cannot be."""
        with contextlib.suppress(ValueError, ApiError):
            self._vocabulary(self._tokenizer())
            self.checker.start()

    def close(self) -> None:
        """End what was started."""
        self.checker.close()

    def answer(self, wanted: Wanted, tool_format: ToolFormat, tenant: str = "") -> "Fitted":
        """What an answer is held to.

        What a grammar cannot hold of a schema is left to the model, unless its sender wants all of
        it (`strict`).

        Args:
            wanted: of the answer; tools or a schema.
            tool_format: how the model writes a call.
            tenant: who asks; others do not learn what schemas it has.

        Raises:
            ApiError: for a schema that holds more than it may, that is strict and cannot be held,
                or that is none.
        """
        self._check_limits(wanted.tools, "tools")
        if isinstance(wanted.answer, Pattern):
            _check_length(wanted.answer)
        else:
            self._check_limits([wanted.answer] if wanted.answer is not None else (), FORMAT_PARAM)
        unheld: list[str] = []
        tools = {tool.name: self._fit(tool, unheld) for tool in wanted.tools}
        answer: dict[str, Any] | Pattern | None = None
        if isinstance(wanted.answer, Pattern):
            answer = wanted.answer
        elif wanted.answer is not None:
            answer = self._fit(wanted.answer, unheld)
        param = wanted.answer.param if wanted.answer is not None and not tools else "tools"

        def attempt() -> GrammarConstraint:
            lark = answer_grammar(wanted, tools, answer, tool_format)
            parser = partial(CallParser, tool_format, list(tools))
            is_json = isinstance(answer, dict) or wanted.calls is Calls.REQUIRED

            def watch() -> AnswerWatch:
                return AnswerWatch(parser() if tools else None, is_json=is_json)

            endings = partial(find_endings, tools, answer, tool_format)
            is_text = bool(tools) and wanted.calls is Calls.ALLOWED and answer is None
            return self._constraint(lark, param, tenant, watch, endings, is_text=is_text)

        try:
            return Fitted(attempt(), tuple(unheld))
        except UnreadableError:
            if not tools:
                raise
        # One of the tools has something that nobody foresaw. Which one?
        for tool in wanted.tools:
            lark = f"%llguidance {{}}\nstart: %json {json.dumps(tools[tool.name])}\n"
            reason = self.checker.error_of(lark, tenant)
            if reason is None:
                continue
            if tool.strict or not _is_unreadable(reason):
                raise bad_request(f"The parameters of {tool.name!r}: {reason}", "tools")
            tools[tool.name] = json_schema_of({"type": "object"})
            unheld.append(f"{tool.name}: all parameters")
        return Fitted(attempt(), tuple(unheld))

    def _fit(self, schema: NamedSchema, unheld: list[str]) -> dict[str, Any]:
        """What can be held of a schema; notes what cannot."""
        fitted, lost = fit_schema(schema.schema)
        if schema.strict and lost:
            raise bad_request(
                f"{schema.title} is strict, and has {', '.join(map(str, lost))}, which cannot be "
                "held to. Leave it out, or leave `strict` out, and the model is told of it only.",
                schema.param,
            )
        unheld += [f"{schema.name}: {one}" for one in lost]
        if not schema.strict and coerce_one_of(fitted):
            unheld.append(f"{schema.name}: oneOf, held as anyOf")
        return json_schema_of(fitted, coerce=not schema.strict, is_object=schema.param == "tools")

    def _check_limits(self, schemas: Sequence[NamedSchema], param: str) -> None:
        try:
            check_schemas([one.schema for one in schemas], self._settings)
        except SchemaTooLargeError as error:
            raise bad_request(str(error), param) from error

    def _constraint(
        self,
        grammar: str,
        param: str,
        tenant: str,
        watch: Callable[[], AnswerWatch],
        endings: Callable[[], Endings],
        *,
        is_text: bool,
    ) -> GrammarConstraint:
        try:
            tokenizer = self._tokenizer()
        except ValueError as error:
            message = f"This model's answers cannot be constrained: {error}"
            raise bad_request(message, param) from error
        reason = self.checker.error_of(grammar, tenant)
        if reason is None:
            ends = Ends(self._vocabulary(tokenizer).closing, endings(), is_text=is_text)
            constraint = self._compile(tokenizer, grammar, watch, ends)
            reason = constraint.failure()
        if reason is not None:
            message = f"What the answer shall look like cannot be followed: {reason} Simplify it."
            kind = UnreadableError if _is_unreadable(reason) else ApiError
            raise kind(400, message, param=param)
        return constraint

    def _compile(
        self,
        tokenizer: "llguidance.LLTokenizer",
        grammar: str,
        watch: Callable[[], AnswerWatch],
        ends: Ends,
    ) -> GrammarConstraint:
        vocabulary = self._vocabulary(tokenizer)

        def work() -> GrammarConstraint:
            matcher = make_matcher(tokenizer, grammar)
            first = mask_of(matcher, vocabulary.only_end)
            return GrammarConstraint(matcher, vocabulary, first, watch, ends)

        return on_stack(self.checker.stack_bytes, work)

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes of a token; None if its tokenizer cannot be read."""
        try:
            return self._vocabulary(self._tokenizer()).spell(token)
        except ValueError:
            return None

    def _vocabulary(self, tokenizer: "llguidance.LLTokenizer") -> Vocabulary:
        """What constraints know of the model's tokens; read once."""
        with self._lock:
            if self._known_vocabulary is None:
                size = self._model.shape.vocab_size

                texts = [bytes(tokenizer.decode_bytes([token])) for token in range(size)]
                firsts = np.array([text[0] if text else 0 for text in texts])
                only_end = np.ones(size, np.bool_)
                only_end[sorted(self._model.stop_ids)] = False
                self._known_vocabulary = Vocabulary(
                    texts,
                    only_end,
                    digits=np.isin(firsts, list(b"0123456789")),
                    blanks=np.isin(firsts, list(b" \t\n\r\\")),
                    closing=ClosingTokens(texts, tokenizer.greedy_tokenize),
                )
            return self._known_vocabulary

    def _tokenizer(self) -> "llguidance.LLTokenizer":
        """The model's tokenizer for llguidance; reading it takes a second, once.

        Raises:
            ValueError: if it cannot be read, or not correctly.
        """
        with self._lock:
            if self._converted is None:
                converted = make_tokenizer(self._describe_tokenizer())
                ids = copy.deepcopy(self._model.tokenizer)(_SAMPLE, add_special_tokens=False)
                text = converted.decode_bytes(ids.input_ids).decode(errors="replace")
                if text.strip() != _SAMPLE:
                    raise ValueError("its tokenizer is of a kind that is not known.")
                self._converted = converted
            return self._converted

    def _describe_tokenizer(self) -> dict[str, Any]:
        """What `make_tokenizer` is given."""
        model = self._model
        tokenizer = copy.deepcopy(model.tokenizer)  # the engine's thread uses the original
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        # Converted tokenizers may have several decoders, and llguidance looks at the first only. If
        # that is not the byte-level one, it takes a blank for a letter.
        steps = (spec.get("decoder") or {}).get("decoders", [])
        byte_level = [step for step in steps if step["type"] == "ByteLevel"]
        if byte_level:
            spec["decoder"] = byte_level[0]
        return {
            "spec": json.dumps(spec),
            "n_vocab": max(model.shape.vocab_size, len(tokenizer)),
            "eos_token": sorted(model.stop_ids),
        }


def _check_length(pattern: Pattern) -> None:
    if len(pattern.rule) > MAX_PATTERN:
        raise bad_request(
            f"What the answer shall look like has more than {MAX_PATTERN} characters. Simplify it.",
            pattern.param,
        )


def _is_unreadable(reason: str) -> bool:
    """Whether a grammar failed for what a schema says, and not for its size."""
    return "failed to compile JSON schema" in reason
