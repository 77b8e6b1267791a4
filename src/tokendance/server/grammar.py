"""Constrained decoding: answers that are sure to parse as JSON, by a schema, or as tool calls.

llguidance computes which tokens may come next.
"""

import contextlib
import copy
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt

from tokendance.models.loader import LoadedModel
from tokendance.server.errors import ApiError, bad_request
from tokendance.server.grammar_check import GrammarChecker
from tokendance.server.grammar_process import error_of, make_matcher, make_tokenizer, on_stack
from tokendance.server.schema_limits import SchemaTooLargeError, check_schemas
from tokendance.server.settings import ServerSettings
from tokendance.server.tool_calls import ToolFormat

# Whitespace in its usual places only: a small model may write whitespace for ever.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

Mask = npt.NDArray[np.bool_]

# A text by which to check that llguidance reads a tokenizer correctly.
_SAMPLE = '{"name": "a b", "list": [1, 2]}'


class Grammars:
    """Makes constraints for a model. Thread-safe."""

    def __init__(self, model: LoadedModel, settings: ServerSettings) -> None:
        self._model = model
        self._settings = settings
        self._lock = threading.Lock()  # for the next
        self._converted: llguidance.LLTokenizer | None = None
        self.checker = GrammarChecker(settings, self._describe_tokenizer)

    def start(self) -> None:
        """Prepare for the first request, in a few seconds; nothing happens if it cannot be."""
        with contextlib.suppress(ValueError, ApiError):
            self._tokenizer()
            self.checker.start()

    def close(self) -> None:
        """End what was started."""
        self.checker.close()

    def json_schema(
        self, schema: Mapping[str, Any], param: str, tenant: str = ""
    ) -> "GrammarConstraint":
        """An answer that is JSON of a schema.

        Raises:
            ApiError: for a schema that is not supported, or holds more than it may, naming the
                request's field `param`.
        """
        self._check_limits([schema], param)
        text = json.dumps(schema)
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_JSON)
        except ValueError as error:
            raise bad_request(f"The schema cannot be followed: {error}", param) from error
        return self._constraint(grammar, param, tenant)

    def tool_calls(
        self,
        functions: Sequence[Mapping[str, Any]],
        tool_format: ToolFormat,
        *,
        required: bool,
        several: bool,
        tenant: str = "",
    ) -> "GrammarConstraint":
        """An answer that may call functions.

        Args:
            functions: in OpenAI's format: name and parameters.
            tool_format: how the model writes a call.
            required: the answer has to be a call, without other text.
            several: the answer may be several calls, if one is required.
            tenant: who asks; others do not learn what schemas it has.

        Raises:
            ApiError: for parameters whose schema is not supported, or holds more than it may.
        """
        self._check_limits([function.get("parameters") or {} for function in functions], "tools")
        schemas = [_call_schema(function, tool_format.arguments) for function in functions]
        call = {"anyOf": schemas, "x-guidance": _JSON}
        begin, end = tool_format.begin, tool_format.end
        if begin and not required:
            tag = llguidance.StructTag(trigger=begin.strip(), begin=begin, grammar=call, end=end)
            grammar = llguidance.StructTag.to_grammar([tag], assume_special=False)
            return self._constraint(grammar, "tools", tenant)
        start = "call"
        if not required:
            start = "call | words |"  # a call without a mark is recognized by its first character
        elif several and begin:
            start = 'call ("\\n" call)*'
        marked = " json ".join(json.dumps(mark) if mark else "" for mark in (begin, end))
        lark = (
            f"%llguidance {{}}\nstart: {start}\n"
            f"call: {marked}\n"
            f"json: %json {json.dumps(call)}\n"
            "words: /[^{](.|\\n)*/\n"
        )
        return self._constraint(lark, "tools", tenant)

    def _check_limits(self, schemas: Sequence[Mapping[str, Any]], param: str) -> None:
        try:
            check_schemas(schemas, self._settings)
        except SchemaTooLargeError as error:
            raise bad_request(str(error), param) from error

    def _constraint(self, grammar: str, param: str, tenant: str) -> "GrammarConstraint":
        try:
            tokenizer = self._tokenizer()
        except ValueError as error:
            message = f"This model's answers cannot be constrained: {error}"
            raise bad_request(message, param) from error
        reason = self.checker.error_of(grammar, tenant)
        if reason is None:
            constraint = self._compile(tokenizer, grammar)
            reason = constraint.failure()
        if reason is not None:
            message = f"What the answer shall look like cannot be followed: {reason} Simplify it."
            raise bad_request(message, param)
        return constraint

    def _compile(self, tokenizer: "llguidance.LLTokenizer", grammar: str) -> "GrammarConstraint":
        def work() -> GrammarConstraint:
            only_end = np.ones(self._model.shape.vocab_size, np.bool_)
            only_end[sorted(self._model.stop_ids)] = False
            matcher = make_matcher(tokenizer, grammar)
            return GrammarConstraint(matcher, only_end, _mask(matcher, only_end))

        return on_stack(self.checker.stack_bytes, work)

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


class GrammarConstraint:
    """The state of a grammar within one answer; see `engine.constraint.Constraint`."""

    def __init__(self, matcher: "llguidance.LLMatcher", only_end: Mask, first: Mask) -> None:
        """Begin an answer.

        Args:
            matcher: of nobody else, at its beginning.
            only_end: forbids all but the end of the answer. Neither mask is changed.
            first: what may not come first.
        """
        self._matcher = matcher
        self._only_end = only_end
        self._first = first
        self._forbidden: Mask | None = first
        self._accepted: list[int] = []  # and not told to the matcher

    @property
    def is_ready(self) -> bool:
        """Whether `forbidden` answers at once."""
        return self._forbidden is not None

    def prepare(self) -> None:
        """Find out what may come next, most often in 0.1 ms."""
        if self._forbidden is not None:
            return
        for token in self._accepted:
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token)
        self._accepted.clear()
        self._forbidden = _mask(self._matcher, self._only_end)

    def forbidden(self) -> Mask:
        """Tokens that may not come next: bool (vocabulary,)."""
        self.prepare()
        assert self._forbidden is not None
        return self._forbidden

    def failure(self) -> str | None:
        """Why the grammar has failed, if it has."""
        return error_of(self._matcher)

    def accept(self, token: int) -> None:
        """Go on with a token that was chosen."""
        self._accepted.append(token)
        self._forbidden = None

    def copy(self) -> "GrammarConstraint":
        """One for another answer; while this one is at its beginning."""
        return GrammarConstraint(self._matcher.deep_copy(), self._only_end, self._first)

    def restart(self) -> None:
        """Go back to the beginning."""
        self._matcher.reset()
        self._accepted.clear()
        self._forbidden = self._first


def _mask(matcher: "llguidance.LLMatcher", only_end: Mask) -> Mask:
    if matcher.is_stopped():
        return only_end
    allowed = np.frombuffer(matcher.compute_logit_bias(), np.uint8)
    forbidden: Mask = allowed[: len(only_end)] == 0
    return forbidden


def _call_schema(function: Mapping[str, Any], arguments: str) -> dict[str, Any]:
    parameters = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, arguments: parameters},
        "required": ["name", arguments],
        "additionalProperties": False,
    }
