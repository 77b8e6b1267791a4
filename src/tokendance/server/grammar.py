"""Constrained decoding: answers that are sure to parse as JSON, by a schema, or as tool calls.

llguidance computes which tokens may come next.
"""

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt

from tokendance.models.loader import LoadedModel
from tokendance.server.errors import bad_request
from tokendance.server.tool_calls import ToolFormat

# Whitespace in its usual places only: a small model may write whitespace for ever.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# A text by which to check that llguidance reads a tokenizer correctly.
_SAMPLE = '{"name": "a b", "list": [1, 2]}'


class Grammars:
    """Makes constraints for a model. Thread-safe."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model

    def json_schema(self, schema: Mapping[str, Any], param: str) -> "GrammarConstraint":
        """An answer that is JSON of a schema.

        Raises:
            ApiError: for a schema that is not supported, naming the request's field `param`.
        """
        text = json.dumps(schema)
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_JSON)
        except ValueError as error:
            raise bad_request(f"The schema cannot be followed: {error}", param) from error
        return self._constraint(grammar, param)

    def tool_calls(
        self,
        functions: Sequence[Mapping[str, Any]],
        tool_format: ToolFormat,
        *,
        required: bool,
        several: bool,
    ) -> "GrammarConstraint":
        """An answer that may call functions.

        Args:
            functions: in OpenAI's format: name and parameters.
            tool_format: how the model writes a call.
            required: the answer has to be a call, without other text.
            several: the answer may be several calls, if one is required.

        Raises:
            ApiError: for parameters whose schema is not supported.
        """
        schemas = [_call_schema(function, tool_format.arguments) for function in functions]
        call = {"anyOf": schemas, "x-guidance": _JSON}
        begin, end = tool_format.begin, tool_format.end
        if begin and not required:
            tag = llguidance.StructTag(trigger=begin.strip(), begin=begin, grammar=call, end=end)
            grammar = llguidance.StructTag.to_grammar([tag], assume_special=False)
            return self._constraint(grammar, "tools")
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
        return self._constraint(llguidance.LLMatcher.grammar_from_lark(lark), "tools")

    def _constraint(self, grammar: str, param: str) -> "GrammarConstraint":
        try:
            tokenizer = self._tokenizer
        except ValueError as error:
            message = f"This model's answers cannot be constrained: {error}"
            raise bad_request(message, param) from error
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        constraint = GrammarConstraint(matcher, self._model)
        if (reason := constraint.failure()) is not None:
            message = f"What the answer shall look like cannot be followed: {reason}"
            raise bad_request(message, param)
        return constraint

    @functools.cached_property
    def _tokenizer(self) -> "llguidance.LLTokenizer":
        """The model's tokenizer for llguidance; reading it takes a second.

        Raises:
            ValueError: if it cannot be read, or not correctly.
        """
        model = self._model
        tokenizer = copy.deepcopy(model.tokenizer)  # the engine's thread uses the original
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        # Converted tokenizers may have several decoders, and llguidance looks at the first only. If
        # that is not the byte-level one, it takes a blank for a letter.
        steps = (spec.get("decoder") or {}).get("decoders", [])
        byte_level = [step for step in steps if step["type"] == "ByteLevel"]
        if byte_level:
            spec["decoder"] = byte_level[0]
        converted = llguidance.LLTokenizer(
            json.dumps(spec),
            n_vocab=max(model.shape.vocab_size, len(tokenizer)),
            eos_token=sorted(model.stop_ids),
        )
        ids = tokenizer(_SAMPLE, add_special_tokens=False).input_ids
        if converted.decode_bytes(ids).decode(errors="replace").strip() != _SAMPLE:
            raise ValueError("its tokenizer is of a kind that is not known.")
        return converted


class GrammarConstraint:
    """The state of a grammar within one answer; see `engine.constraint.Constraint`."""

    def __init__(self, matcher: "llguidance.LLMatcher", model: LoadedModel) -> None:
        self._matcher = matcher
        self._model = model
        self._only_end = np.ones(model.shape.vocab_size, np.bool_)
        self._only_end[sorted(model.stop_ids)] = False

    def forbidden(self) -> npt.NDArray[np.bool_]:
        """Tokens that may not come next: bool (vocabulary,)."""
        if self._matcher.is_stopped():
            return self._only_end
        allowed = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)
        forbidden: npt.NDArray[np.bool_] = allowed[: len(self._only_end)] == 0
        return forbidden

    def failure(self) -> str | None:
        """Why the grammar has failed, if it has."""
        # The lines after the first are the parser's state, the whole grammar included.
        return self._matcher.get_error().splitlines()[0] if self._matcher.is_error() else None

    def accept(self, token: int) -> None:
        """Advance by a token that was chosen."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    def copy(self) -> "GrammarConstraint":
        """Copy the state, for another answer."""
        return GrammarConstraint(self._matcher.deep_copy(), self._model)

    def restart(self) -> None:
        """Go back to the beginning."""
        self._matcher.reset()


def _call_schema(function: Mapping[str, Any], arguments: str) -> dict[str, Any]:
    parameters = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, arguments: parameters},
        "required": ["name", arguments],
        "additionalProperties": False,
    }
