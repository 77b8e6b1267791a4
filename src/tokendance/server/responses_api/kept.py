"""Remembers answers, each for the tenant that asked, so that a later request can go on from one.

What is remembered of an answer is its document and what was new in it; all before that is found by
the id of the answer before. Whoever goes on from an answer uses all that came before it, too, so
those are never forgotten earlier.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from tokendance.server.errors import ApiError
from tokendance.server.protocol import ChatMessage
from tokendance.server.settings import ServerSettings

# Different items that a request may refer to.
_MOST_REFERENCES = 256


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """An answer that is remembered.

    Attributes:
        document: that was sent.
        messages: what was new: those of the request, and the answer.
        previous_id: of the answer that it goes on from.
        num_bytes: that it counts for.
        input_items: of the request, as documents.
    """

    document: dict[str, Any]
    messages: Sequence[ChatMessage]
    previous_id: str | None
    num_bytes: int
    input_items: Sequence[dict[str, Any]] = ()

    @property
    def items(self) -> list[dict[str, Any]]:
        """Of the request, and of the answer."""
        return [*self.input_items, *self.document["output"]]


class _Tenant:
    def __init__(self) -> None:
        self.answers: OrderedDict[str, KeptAnswer] = OrderedDict()  # the least recently used first
        self.num_bytes = 0
        self.where: dict[str, list[str]] = {}  # for each item, the answers that have it

    def forget(self, answer_id: str) -> None:
        answer = self.answers.pop(answer_id)
        self.num_bytes -= answer.num_bytes
        for item_id in {item["id"] for item in answer.items}:
            self.where[item_id].remove(answer_id)
            if not self.where[item_id]:
                del self.where[item_id]


class KeptAnswers:
    """Answers that are remembered. All of it happens in the event loop."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._tenants: defaultdict[str, _Tenant] = defaultdict(_Tenant)

    def get(self, tenant: str, answer_id: str) -> KeptAnswer:
        """An answer to a tenant, which counts as used.

        Raises:
            ApiError: 404 if there is none of that id, any more or at all, or if it is another's.
        """
        answers = self._tenants[tenant].answers if tenant in self._tenants else {}
        if answer_id not in answers:
            raise ApiError(404, _not_found(answer_id), param="response_id")
        self._use(tenant, answer_id)
        return answers[answer_id]

    def items(self, tenant: str, item_ids: Collection[str]) -> dict[str, dict[str, Any]]:
        """Items of a tenant's by their ids, of which the answers count as used.

        Raises:
            ApiError: 404 as `get` does; 413 if there are too many.
        """
        if len(item_ids) > _MOST_REFERENCES:
            message = (
                f"There are references to {len(item_ids)} items, and at most {_MOST_REFERENCES} "
                "are taken. Send the items themselves."
            )
            raise ApiError(413, message, param="input")
        where = self._tenants[tenant].where if tenant in self._tenants else {}
        found: dict[str, dict[str, Any]] = {}
        for item_id in item_ids:
            if item_id not in where:
                message = f"Item with id {item_id[:64]!r} not found. {_WHY} Send the item itself."
                raise ApiError(404, message, param="input", code="item_not_found")
            if item_id not in found:
                found |= {item["id"]: item for item in self.get(tenant, where[item_id][-1]).items}
        return {item_id: found[item_id] for item_id in item_ids}

    def messages(self, tenant: str, answer_id: str | None) -> list[ChatMessage]:
        """All that was said up to an answer and with it; nothing if there is no id.

        Raises:
            ApiError: as OpenAI has it for an answer that is not remembered.
        """
        answers = self._tenants[tenant].answers if tenant in self._tenants else {}
        turns: list[Sequence[ChatMessage]] = []
        last_id = answer_id
        while answer_id is not None:
            if answer_id not in answers:
                raise ApiError(
                    400,
                    _not_found(answer_id),
                    param="previous_response_id",
                    code="previous_response_not_found",
                )
            turns.append(answers[answer_id].messages)
            answer_id = answers[answer_id].previous_id
        if last_id is not None:
            self._use(tenant, last_id)
        return [message for turn in reversed(turns) for message in turn]

    def keep(self, tenant: str, answer_id: str, answer: KeptAnswer) -> None:
        """Remember an answer, and forget what has not been used for longest beyond the limits."""
        kept, settings = self._tenants[tenant], self._settings
        kept.answers[answer_id] = answer
        kept.num_bytes += answer.num_bytes
        for item_id in {item["id"] for item in answer.items}:
            kept.where.setdefault(item_id, []).append(answer_id)
        self._use(tenant, answer_id)
        while (
            len(kept.answers) > settings.max_responses
            or kept.num_bytes > settings.max_responses_bytes
        ):
            kept.forget(next(iter(kept.answers)))

    def forget(self, tenant: str, answer_id: str) -> None:
        """Forget an answer; raises ApiError as `get` does."""
        self.get(tenant, answer_id)
        self._tenants[tenant].forget(answer_id)

    def _use(self, tenant: str, answer_id: str | None) -> None:
        """Put an answer behind all others, and behind it those that it goes on from."""
        answers = self._tenants[tenant].answers
        while answer_id is not None and answer_id in answers:
            answers.move_to_end(answer_id)
            answer_id = answers[answer_id].previous_id


_WHY = (
    "It was made with store: false, was deleted, is another key's, or made room for later ones "
    "(--max-responses, --max-responses-size)."
)


def _not_found(answer_id: str) -> str:
    return (
        f"Previous response with id {answer_id[:64]!r} not found. {_WHY} Send all items as input."
    )
