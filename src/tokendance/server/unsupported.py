"""Fields of requests that other servers know and this one does not.

A value that says nothing is left out without a word: many clients send all fields that there are.
Any other is refused with what to do in its place.
"""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic_core import PydanticCustomError

_LEAVE_OUT = "Leave it out."
_FORMAT = "Send the schema as response_format."
Fields = Mapping[str, tuple[tuple[Any, ...], str]]
# For each field: the values that say nothing, and what to do in place of others. Null never does.
_FIELDS: Fields = {
    "best_of": ((1,), "Use n."),
    "length_penalty": ((1,), _LEAVE_OUT),
    "early_stopping": ((False,), _LEAVE_OUT),
    "use_beam_search": ((False,), _LEAVE_OUT),
    "include_stop_str_in_output": ((False,), "Add the stop text to the answer yourself."),
    "skip_special_tokens": (
        (True,),
        "Answers have none of them; return_token_ids: true shows all tokens.",
    ),
    "spaces_between_special_tokens": ((True, False), _LEAVE_OUT),
    "detokenize": ((True,), _LEAVE_OUT),
    "add_generation_prompt": ((True,), _LEAVE_OUT),
    "continue_final_message": ((False,), "Ask /v1/completions to go on with a text."),
    "add_special_tokens": ((True, False), _LEAVE_OUT),
    "echo": ((False,), "Put the prompt before the answer yourself."),
    "suffix": (("",), _LEAVE_OUT),
    "prompt_logprobs": ((), "Ask for one prompt at a time."),
    "truncate_prompt_tokens": ((), "Shorten the prompt yourself."),
    "return_token_ids": ((False,), "Ask for one prompt at a time."),
    "return_tokens_as_token_ids": ((False,), _LEAVE_OUT),
    "bad_words": (([],), "Use logit_bias."),
    "allowed_token_ids": (([],), "Use logit_bias."),
    "logits_processors": (([],), _LEAVE_OUT),
    "logit_processors": (([],), _LEAVE_OUT),
    "structured_outputs": (({},), _FORMAT),
    "guided_json": (({},), _FORMAT),
    "guided_regex": (("",), _FORMAT),
    "guided_choice": (([],), _FORMAT),
    "guided_grammar": (("",), _FORMAT),
    "guided_decoding_backend": ((), _LEAVE_OUT),
    "guided_whitespace_pattern": ((), _LEAVE_OUT),
    "cache_salt": (("",), "It goes with the round, not with an agent."),
    "documents": (([],), "Put them into a message."),
    "chat_template": ((), "Start the server with another template."),
    "functions": (([],), "Send the same as tools."),
    "function_call": (("none", "auto"), "Send it as tool_choice."),
    "web_search_options": (({},), _LEAVE_OUT),
    "audio": (({},), "Answers are text."),
    "prediction": (({},), _LEAVE_OUT),
    "mm_processor_kwargs": (({},), _LEAVE_OUT),
    "kv_transfer_params": (({},), _LEAVE_OUT),
    "top_a": ((0,), _LEAVE_OUT),
    "typical_p": ((1,), _LEAVE_OUT),
    "mirostat": ((0,), _LEAVE_OUT),
}


def leave_out_neutral(body: Any, known: Collection[str], fields: Fields = _FIELDS) -> Any:
    """Leave out what says nothing of some fields, but for those that a request knows.

    Raises:
        PydanticCustomError: for a field that says something which is not supported.
    """
    if not isinstance(body, dict):
        return body
    unsupported = (body.keys() & fields.keys()) - set(known)
    for name in unsupported:
        neutral, advice = fields[name]
        if body[name] is not None and body[name] not in neutral:
            found = {"field": name, "advice": advice}
            raise PydanticCustomError("unsupported", "{field} is not supported. {advice}", found)
    return {key: value for key, value in body.items() if key not in unsupported}


# As vLLM's clients have said it before, and how they say it now.
_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice"}


def read_guided(body: Any) -> Any:
    """Read `guided_json` and its like as `structured_outputs`; empty ones say nothing."""
    if not isinstance(body, dict):
        return body
    known = {"structured_outputs", *_GUIDED}
    wanted = {new: body[old] for old, new in _GUIDED.items() if body.get(old)}
    outputs = body.get("structured_outputs")
    if isinstance(outputs, dict):  # what is false or null says nothing
        outputs = {key: value for key, value in outputs.items() if value not in (None, False)}
    rest = {key: value for key, value in body.items() if key not in known}
    if outputs and wanted:
        raise PydanticCustomError("structured", "Give either guided fields or structured_outputs")
    return {**rest, "structured_outputs": outputs or wanted} if outputs or wanted else rest
