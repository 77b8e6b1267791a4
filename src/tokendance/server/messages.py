"""Messages of requests, and what is thought in them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

Speaker = Annotated[str, Field(max_length=256)]
MessageRole = Literal["system", "developer", "user", "assistant", "tool", "function"]
_THOUGHTS = ("thinking", "reasoning", "redacted_thinking")


class Lenient(BaseModel):
    """Takes null for a field that is not there, as many clients send it."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, body: Any) -> Any:
        if isinstance(body, dict) and None in body.values():
            return {key: value for key, value in body.items() if value is not None}
        return body


class TextPart(Lenient):
    """A part of a message's content."""

    type: Literal["text", "refusal"]
    text: str = ""


def _kind_of(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else None
    return kind if isinstance(kind, str) else None


def only_parts(*kinds: str) -> BeforeValidator:
    """Say which parts of a content are not read: those of other kinds, and those of none."""

    def check(content: Any) -> Any:
        for part in content if isinstance(content, list) else ():
            kind = _kind_of(part)
            if isinstance(part, dict) and kind not in kinds:
                has = "without a type" if kind is None else f"of type {kind[:40]!r}"
                message = f"It has a part {has}, and this model reads text only ({kinds[0]})"
                raise PydanticCustomError("unsupported_part", "{text}", {"text": message})
        return content

    return BeforeValidator(check)


TEXT_PARTS = only_parts("text", "refusal")


def _only_text(value: Any) -> Any:
    return value if isinstance(value, str) else None


class Message(Lenient):
    """One message of a conversation. Unknown fields are ignored: other servers add some.

    What a model has thought comes in a field or in parts of the content; whether it is read is up
    to the chat template.
    """

    role: MessageRole
    name: Speaker | None = None
    reasoning_content: Annotated[str | None, BeforeValidator(_only_text)] = None
    reasoning: Annotated[str | None, BeforeValidator(_only_text)] = None

    @model_validator(mode="before")
    @classmethod
    def _take_out_thoughts(cls, message: Any) -> Any:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list):
            return message
        thoughts = [one for one in content if _kind_of(one) in _THOUGHTS]
        if not thoughts:
            return message
        texts = [one.get(key) for one in thoughts for key in ("thinking", "reasoning", "text")]
        thought = "\n".join(text for text in texts if isinstance(text, str))
        rest = [one for one in content if _kind_of(one) not in _THOUGHTS]
        return {"reasoning_content": thought} | message | {"content": rest}

    @property
    def thought(self) -> str | None:
        """What was thought before it was said, if that is known."""
        return self.reasoning_content or self.reasoning
