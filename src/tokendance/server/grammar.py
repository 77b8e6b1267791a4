"""Answers that are sure to parse: JSON, schemas and tool calls, by constrained decoding.

llguidance does the work; it says for every token whether it may come next.
"""

import copy
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt

from tokendance.models.loader import LoadedModel
from tokendance.server.errors import bad_request
from tokendance.server.tool_calls import ToolFormat

# Blanks where people put them, and nowhere else: a small model can write blanks for ever.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# What a tokenizer has to spell as we do.
_SAMPLE = '{"name": "a b", "list": [1, 2]}'


class Grammars:
    """Makes constraints for a model. Safe for several threads."""

    def __init__(self, model: LoadedModel) -> None:
        """Prepare; the tokenizer is read when the first constraint is asked for (a second)."""
        self._model = model
        self._lock = threading.Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None

    def json_schema(self, schema: Mapping[str, Any], param: str) -> "GrammarConstraint":
        """JSON that fits a schema.

        Raises:
            ApiError: for a schema that cannot be followed, naming the request's field `param`.
        """
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides=_JSON
            )
        except ValueError as error:
            raise bad_request(f"The schema cannot be followed: {error}", param) from error
        return self._constraint(grammar, param)

    def tool_calls(
        self,
        tools: Sequence[Mapping[str, Any]],
        written: ToolFormat,
        *,
        required: bool,
        several: bool,
    ) -> "GrammarConstraint":
        """Text that may call tools, or one or several calls and no other text.

        Args:
            tools: functions as OpenAI describes them: name and parameters.
            written: how the model writes a call.
            required: whether there has to be a call, and nothing else.
            several: whether there may be more than one.
        """
        schemas = [_call_schema(tool, written.arguments) for tool in tools]
        call = {"anyOf": schemas, "x-guidance": _JSON}
        if written.begin and not required:
            tag = llguidance.StructTag(
                trigger=written.begin.strip(), begin=written.begin, grammar=call, end=written.end
            )
            grammar = llguidance.StructTag.to_grammar([tag], assume_special=False)
            return self._constraint(grammar, "tools")
        start = "call"
        if not required:
            start = "call | words |"  # without a mark, a call is known by its first character
        elif several and written.begin:
            start = 'call ("\\n" call)*'
        lark = (
            f"%llguidance {{}}\nstart: {start}\n"
            f"call: {_literal(written.begin)} json {_literal(written.end)}\n"
            f"json: %json {json.dumps(call)}\n"
            "words: /[^{](.|\\n)*/\n"
        )
        return self._constraint(llguidance.LLMatcher.grammar_from_lark(lark), "tools")

    def _constraint(self, grammar: str, param: str) -> "GrammarConstraint":
        with self._lock:
            if self._tokenizer is None:
                try:
                    self._tokenizer = _read_tokenizer(self._model)
                except ValueError as error:
                    raise bad_request(
                        f"This model's answers cannot be constrained: {error}", param
                    ) from error
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().splitlines()[0]
            raise bad_request(
                f"What the answer shall look like cannot be followed: {reason}", param
            )
        return GrammarConstraint(matcher, self._model)


class GrammarConstraint:
    """A grammar on its way through one answer; see `engine.constraint.Constraint`."""

    def __init__(self, matcher: "llguidance.LLMatcher", model: LoadedModel) -> None:
        """Begin at the grammar's beginning."""
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
        """Why the grammar cannot be followed any further, if it cannot."""
        # What follows the first line is the parser's state, the whole grammar included.
        return self._matcher.get_error().splitlines()[0] if self._matcher.is_error() else None

    def accept(self, token: int) -> None:
        """Go on with a token that was chosen."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    def copy(self) -> "GrammarConstraint":
        """Another one at the same place, for another answer."""
        return GrammarConstraint(self._matcher.deep_copy(), self._model)

    def restart(self) -> None:
        """Begin anew."""
        self._matcher.reset()


def _read_tokenizer(model: LoadedModel) -> "llguidance.LLTokenizer":
    """Hand a tokenizer to llguidance, which reads its JSON.

    Raises:
        ValueError: if it cannot be read, or is read wrongly.
    """
    tokenizer = copy.deepcopy(model.tokenizer)  # the engine's thread decodes with that one
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    # Tokenizers that were converted may decode in several steps, of which llguidance takes the
    # first for all: then a blank would be a letter to it.
    steps = (spec.get("decoder") or {}).get("decoders", [])
    byte_level = [step for step in steps if step["type"] == "ByteLevel"]
    if byte_level:
        spec["decoder"] = byte_level[0]
    read = llguidance.LLTokenizer(
        json.dumps(spec),
        n_vocab=max(model.shape.vocab_size, len(tokenizer)),
        eos_token=sorted(model.stop_ids),
    )
    ids = tokenizer(_SAMPLE, add_special_tokens=False).input_ids
    if read.decode_bytes(ids).decode(errors="replace").strip() != _SAMPLE:
        raise ValueError("its tokenizer is of a kind that is not known.")
    return read


def _literal(text: str) -> str:
    """A text in a grammar; nothing if there is none of it."""
    return json.dumps(text) if text else ""


def _call_schema(tool: Mapping[str, Any], arguments: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool["name"]},
            arguments: tool.get("parameters") or {"type": "object"},
        },
        "required": ["name", arguments],
        "additionalProperties": False,
    }
