"""POST /tokenize and /detokenize, in the form that vLLM gives them."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from tokendance.errors import InputError
from tokendance.rounds.prompts import Prompt, strip_separator
from tokendance.rounds.segments import TokenIds
from tokendance.server.chat_prompt import check_length, encode_chat
from tokendance.server.context import ServerContext
from tokendance.server.errors import bad_request
from tokendance.server.protocol import (
    Body,
    ChatMessage,
    ChatRequest,
    TemplateOptions,
    TokenList,
    Tool,
)
from tokendance.server.unsupported import leave_out_neutral


class TokenizeRequest(Body):
    """Body of /tokenize: a text, or messages as chat takes them.

    Attributes:
        model: may be left out.
        prompt: a text.
        messages: of a conversation, in place of a text.
        add_special_tokens: whether a text begins with the token that the model expects there.
        return_token_strs: whether to tell the text of each token, too.
        tools: as in a chat request, likewise the next.
    """

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    chat_template_kwargs: TemplateOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_neutral(cls, body: Any) -> Any:
        return leave_out_neutral(body, cls.model_fields)


class Tokens(BaseModel):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Body):
    """Body of /detokenize."""

    model: str | None = None
    tokens: TokenList


class Detokenized(BaseModel):
    """Answer of /detokenize."""

    prompt: str


async def tokenize(context: ServerContext, tenant: str, body: TokenizeRequest) -> Tokens:
    """The tokens that a text or a conversation becomes in a prompt; raises ApiError."""
    if body.model is not None:
        context.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("Give a prompt or messages, one of them.", "prompt")
    if len(body.messages or ()) > context.settings.max_messages:
        message = f"At most {context.settings.max_messages} messages are taken."
        raise bad_request(message, "messages")
    with context.admission.admitted(tenant):
        return await context.in_thread(tenant, lambda: _tokens(context, tenant, body))


async def detokenize(context: ServerContext, tenant: str, body: DetokenizeRequest) -> Detokenized:
    """The text of tokens, special ones included; raises ApiError."""
    if body.model is not None:
        context.check_model(body.model)
    check_token_ids(body.tokens, context, "tokens")
    with context.admission.admitted(tenant):
        text = await context.in_thread(
            tenant, lambda: str(context.llm.model.tokenizer.decode(body.tokens))
        )
    return Detokenized(prompt=text)


def check_token_ids(token_ids: Sequence[int], context: ServerContext, param: str) -> None:
    """Raise ApiError for what is no token id, and for more than a context holds."""
    shape = context.llm.model.shape
    if len(token_ids) > shape.max_context:
        raise bad_request(
            f"There are {len(token_ids)} tokens, more than the model's context of "
            f"{shape.max_context}. Send them in parts.",
            param,
        )
    if any(not 0 <= token < shape.vocab_size for token in token_ids):
        raise bad_request(f"A token id lies between 0 and {shape.vocab_size - 1}.", param)


def _tokens(context: ServerContext, tenant: str, body: TokenizeRequest) -> Tokens:
    token_ids = _token_ids(context, tenant, body)
    strings = [context.token_text(token) for token in token_ids] if body.return_token_strs else None
    return Tokens(
        count=len(token_ids),
        max_model_len=context.llm.model.shape.max_context,
        tokens=token_ids,
        token_strs=strings,
    )


def _token_ids(context: ServerContext, tenant: str, body: TokenizeRequest) -> list[int]:
    encoder, most = context.encoder(tenant), context.max_characters
    if body.messages is not None:
        chat = ChatRequest(
            model=context.model_name,
            messages=body.messages,
            tools=body.tools,
            chat_template_kwargs=body.chat_template_kwargs,
        )
        prompt = encode_chat(chat, encoder, context.tools, most)
        return _as_list(prompt.token_ids)
    text = strip_separator(body.prompt or "")
    check_length([text], most, "prompt")
    if not text:
        return []
    try:
        if body.add_special_tokens is False:
            return _as_list(encoder.text_ids(text))
        return _as_list(encoder.encode(Prompt(text)).token_ids)
    except InputError as error:
        raise bad_request(str(error), "prompt") from error


def _as_list(token_ids: TokenIds) -> list[int]:
    return [int(token) for token in token_ids]
