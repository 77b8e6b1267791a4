"""From what a caller writes to token ids, and back.

Every part is tokenized by itself, so that a shared part has the same ids in every prompt. Special
tokens are recognized in the chat template's own text only: a user's text that spells one becomes
ordinary tokens.
"""

import copy
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
import numpy as np

from tokendance.errors import PromptError
from tokendance.models.thoughts import (
    Said,
    Standing,
    ThoughtMarks,
    ThoughtParser,
    count_thought_tokens,
)
from tokendance.rounds.prompts import (
    Ending,
    Message,
    Part,
    Prompt,
    message_parts,
    private,
    split_text,
)
from tokendance.rounds.segments import EncodedPrompt, Salt, TokenIds, as_token_ids, build_prompt

# Tokens that may follow a mark of a template: blanks, most often.
_MARGIN = 8
# Characters. What a template itself writes is short; tools that it lists need not be.
_LONGEST_CACHED = 10_000


class PromptEncoder:
    """Encodes prompts with a model's tokenizer and chat template. Safe for several threads."""

    def __init__(self, tokenizer: Any, vocab_size: int, salt: Salt) -> None:
        """Wrap a transformers tokenizer; `vocab_size` bounds the ids that callers may give."""
        self._tokenizer = tokenizer
        # Whether a tokenizer reads special tokens in a text is a switch inside of it, which two
        # threads that encode at a time would throw for each other. So there are two, one for the
        # template's text and one for users', and each throws it here for the last time.
        self._user_tokenizer = copy.deepcopy(tokenizer)
        self._tokenizer("a", add_special_tokens=False)
        self._user_tokenizer("a", add_special_tokens=False, split_special_tokens=True)
        self._vocab_size = vocab_size
        self._salt = salt
        self._cache: dict[str, TokenIds] = {}
        self._texts: dict[str, TokenIds] | None = None  # that users gave, if they are remembered
        added = tokenizer.added_tokens_decoder.items()
        self._special_ids = set(tokenizer.all_special_ids) | {i for i, t in added if t.special}
        special = tokenizer.convert_ids_to_tokens(sorted(self._special_ids))
        self._special_texts = [str(token) for token in special]

    @property
    def salt(self) -> Salt:
        """What its prompts are hashed with."""
        return self._salt

    @property
    def special_ids(self) -> frozenset[int]:
        """Token ids that no text of a user becomes."""
        return frozenset(self._special_ids)

    def with_salt(self, salt: Salt) -> "PromptEncoder":
        """The same encoder for prompts that share nothing with those of other salts."""
        _ = self.drops_thoughts  # so that each salt need not find out what the template does
        other = copy.copy(self)
        other._salt = salt
        return other

    def remembering(self) -> "PromptEncoder":
        """The same encoder for prompts that have texts in common: it reads each text once.

        It keeps all of them, so let go of it when the prompts are encoded.
        """
        other = copy.copy(self)
        other._texts = {}
        return other

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Encode one prompt.

        Raises:
            PromptError: if it is empty, of an unknown kind, or refused by the chat template.
        """
        encoded = build_prompt(self._contents(prompt), self._salt)
        if len(encoded) == 0:
            raise PromptError("A prompt is empty. Give it at least one token.")
        return encoded

    def _contents(self, prompt: Prompt) -> list[tuple[TokenIds, bool]]:
        """What segments are made of: token ids, and whether they are shared."""
        content = prompt.content
        if prompt.tools and not (content and isinstance(content[0], Mapping)):
            raise PromptError("Tools go with chat messages. Describe them in the text instead.")
        if isinstance(content, str):
            return self._parts(split_text(content))
        if not isinstance(content, Sequence) and not isinstance(content, np.ndarray):
            raise PromptError(
                f"A prompt is a {type(content).__name__}. "
                "Give text, token ids, a list of shared()/private() parts, or chat messages."
            )
        if all(isinstance(item, Part) for item in content):
            return self._parts(content)  # type: ignore[arg-type]
        if all(isinstance(item, Mapping) for item in content):
            return self._messages(content, prompt)  # type: ignore[arg-type]
        if all(isinstance(item, int | np.integer) for item in content):
            return [(self._checked(content), False)]  # type: ignore[arg-type]
        raise PromptError(
            "A prompt's list mixes kinds. Give token ids, parts or messages, one kind only."
        )

    def text_ids(self, text: str) -> TokenIds:
        """Token ids of a user's text; what spells a special token becomes ordinary tokens."""
        if self._texts is not None and text in self._texts:
            return self._texts[text]
        try:
            ids = self._user_tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        except (TypeError, UnicodeError) as error:
            raise PromptError(
                "A text holds half a character (a lone surrogate), which no tokenizer reads. "
                "Decode it as UTF-16 first, or leave the character out."
            ) from error
        token_ids = as_token_ids(ids.input_ids)
        if self._texts is not None:
            self._texts[text] = token_ids
        return token_ids

    def without_special(self, token_ids: Sequence[int]) -> list[int]:
        """Token ids without special ones, which would end or forge a turn in another's prompt."""
        return [token for token in token_ids if token not in self._special_ids]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    # -- thoughts -------------------------------------------------------------------------------

    @cached_property
    def thought_marks(self) -> ThoughtMarks | None:
        """What the chat template has before and behind thoughts; None if it knows none.

        Special tokens are no marks: no answer's text has them.
        """
        try:
            template = str(self._tokenizer.get_chat_template())
        except ValueError:
            return None  # there is no template
        marks = ThoughtMarks.found_in(template)
        if marks is None or self.spells_special(marks.begin + marks.end):
            return None
        return marks

    @cached_property
    def drops_thoughts(self) -> bool:
        """Whether the chat template leaves thoughts out that an earlier answer has in its text."""
        marks, word = self.thought_marks, f"x{secrets.token_hex(8)}"
        if marks is None:
            return False
        said = f"{marks.begin}\n{word}\n{marks.end}\n\nb"
        question = {"role": "user", "content": "a"}
        try:
            return word not in self.render(
                [question, {"role": "assistant", "content": said}, question]
            )
        except PromptError:
            return False

    def standing_behind(self, prompt_ids: TokenIds) -> Standing:
        """Where an answer to a prompt begins: inside of thoughts if the template has begun them."""
        marks = self.thought_marks
        if marks is None:
            return Standing.BEHIND
        length = len(marks.end.encode()) + _MARGIN
        last = self._tokenizer.decode(list(prompt_ids[-length:]), skip_special_tokens=False)
        tail = str(last).rstrip()
        if tail.endswith(marks.end):
            return Standing.BEHIND  # it has been told not to think
        return Standing.INSIDE if tail.endswith(marks.begin) else Standing.BEFORE

    def thought_parser(self, standing: Standing) -> ThoughtParser | None:
        """What reads an answer that begins so; None where there can be no thoughts."""
        if self.thought_marks is None or standing is Standing.BEHIND:
            return None
        return ThoughtParser(self.thought_marks, standing)

    def split_answer(self, prompt_ids: TokenIds, text: str, *, is_cut: bool) -> Said | None:
        """Split the answer to a prompt; None if it has no thoughts.

        Args:
            prompt_ids: of the prompt.
            text: of the answer.
            is_cut: whether it ended by its length.
        """
        parser = self.thought_parser(self.standing_behind(prompt_ids))
        if parser is None:
            return None
        said = parser.whole(text, is_cut=is_cut)
        return said if parser.has_thoughts else None

    def told(self, prompt: TokenIds, text: str, *, is_cut: bool, with_thoughts: bool) -> str | None:
        """The text of an answer as others are told it, without its thoughts or with them.

        None for an answer without any: they are told all of it, as it is.
        """
        said = self.split_answer(prompt, text, is_cut=is_cut)
        if said is None or self.thought_marks is None or not (with_thoughts and said.thought):
            return None if said is None else said.text
        return self.thought_marks.join(said)

    def count_thoughts(self, standing: Standing, token_ids: Sequence[int]) -> int:
        """How many of an answer's tokens are thoughts, if it begins so."""
        marks = self.thought_marks
        if marks is None or standing is Standing.BEHIND:
            return 0
        return count_thought_tokens(lambda: ThoughtParser(marks, standing), token_ids, self.decode)

    # -- the chat template ----------------------------------------------------------------------

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        ending: Ending = "answer",
    ) -> str:
        """What the chat template makes of messages, of tools that may be called, and of options.

        Args:
            messages: as the template reads them.
            tools: see `Prompt`.
            options: likewise.
            ending: likewise; "continue" ends like "message" here.

        Raises:
            PromptError: if there is no template, if it refuses them, or for tools that spell a
                special token, which would be read as one in the template's text.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise PromptError(
                "The model's tokenizer has no chat template. Give text or parts, not messages."
            )
        if tools and self.spells_special(json.dumps(list(tools), ensure_ascii=False)):
            raise PromptError("A tool's description spells a special token of the model.")
        if options and self.spells_special(json.dumps(dict(options), ensure_ascii=False)):
            raise PromptError("An option of the chat template spells a special token of the model.")
        callable_tools = list(tools) or None
        try:
            # There may be another template for conversations with tools.
            template = self._tokenizer.get_chat_template(tools=callable_tools)
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tools=callable_tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=ending == "answer",
                **{name: value for name, value in (options or {}).items() if name in template},
            )
        except (
            jinja2.exceptions.TemplateError,
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:
            raise PromptError(
                f"The model's chat template refuses the messages: {error}. "
                "Check which roles it knows and the order that it wants."
            ) from error
        if callable_tools and "tools" not in template:
            raise PromptError(
                "The model's chat template lists no tools. Describe them in a message."
            )
        return text

    def spells_special(self, text: str) -> bool:
        """Whether a text holds what the tokenizer reads as a special token in a template's text."""
        return any(token in text for token in self._special_texts)

    def _parts(self, parts: Sequence[Part]) -> list[tuple[TokenIds, bool]]:
        contents = [(self._part_ids(part), part.shared) for part in parts]
        # A prompt that begins as text begins with the token that the model expects there.
        if parts and isinstance(parts[0].content, str):
            bos = getattr(self._tokenizer, "bos_token_id", None)
            if bos is not None and self._tokenizer("a").input_ids[:1] == [bos]:
                contents.insert(0, (as_token_ids([bos]), False))
        return contents

    def _part_ids(self, part: Part) -> TokenIds:
        if isinstance(part.content, str):
            return self.text_ids(part.content)
        return self._checked(part.content)

    def _checked(self, values: Sequence[int]) -> TokenIds:
        for value in values:
            if not isinstance(value, int | np.integer):
                raise PromptError(f"A token id is a {type(value).__name__}. Give whole numbers.")
            if not 0 <= value < self._vocab_size:
                raise PromptError(
                    f"The token id {value} is not in the model's vocabulary of "
                    f"{self._vocab_size}. Encode the prompt with this model's tokenizer."
                )
        return as_token_ids(values)

    def _messages(self, messages: Sequence[Message], prompt: Prompt) -> list[tuple[TokenIds, bool]]:
        """Render the chat template around placeholders, then fill in the parts' ids.

        The template's text before a message of one part is one segment with it, so that shared
        messages that follow each other form one run. Where there are more parts that text is
        private, so that a part has the same hash wherever among them it stands.
        """
        nonce = secrets.token_hex(8)
        parts: list[Part] = []
        marked: list[dict[str, Any]] = []
        alone: set[int] = set()  # parts that are a whole message
        thoughts: set[int] = set()  # which the template may leave out

        def mark(part: Part) -> str:
            parts.append(part)
            return f"{nonce}x{len(parts) - 1}x"

        for message in messages:
            filled = {"role": self._role(message)}
            if thought := message.get("reasoning_content"):
                thoughts.add(len(parts))
                filled["reasoning_content"] = mark(private(thought))
            of_message = message_parts(message)
            if len(of_message) == 1:
                alone.add(len(parts))
            filled["content"] = "".join(map(mark, of_message))
            marked.append(filled)
        text = self.render(marked, prompt.tools, prompt.template_options, prompt.ending)
        # The template's text and the numbers of parts by turns, the former first and last.
        split = re.split(f"{nonce}x(\\d+)x", text)
        numbers = [int(number) for number in split[1::2]]
        contents: list[tuple[TokenIds, bool]] = []
        for text, number in zip(split[::2], numbers, strict=False):
            glue, part = self._template_ids(text), parts[number]
            if number in alone:
                contents.append((np.concatenate([glue, self._part_ids(part)]), part.shared))
            else:
                contents += [(glue, False), (self._part_ids(part), part.shared)]
        if numbers != [i for i in range(len(parts)) if i not in thoughts or i in numbers]:
            raise PromptError(
                "The model's chat template leaves out or reorders messages of this conversation. "
                "Check which roles it knows and the order that it wants."
            )
        if prompt.ending != "continue":
            return [*contents, (self._template_ids(split[-1]), False)]
        if messages[-1].get("role") != "assistant" or not message_parts(messages[-1]):
            raise PromptError(
                "There is no answer to go on with. Let the last message be an assistant's, with "
                "a text."
            )
        return contents

    def _role(self, message: Message) -> str:
        """A message's role; it goes into the template's text, where special tokens are read."""
        unknown = set(message) - {"role", "content", "name", "reasoning_content"}
        role = message.get("role")
        if unknown:
            raise PromptError(
                f"A message has {', '.join(sorted(map(repr, unknown)))}, which is not known. "
                "Give it role, content, name and reasoning_content."
            )
        if not isinstance(role, str) or not re.fullmatch("[A-Za-z_]+", role):
            raise PromptError(f"A message's role is {role!r}. It must be a word, such as 'user'.")
        return role

    def _template_ids(self, text: str) -> TokenIds:
        ids = self._cache.get(text)
        if ids is None:
            ids = as_token_ids(self._tokenizer(text, add_special_tokens=False).input_ids)
            if len(text) > _LONGEST_CACHED:
                return ids
            if len(self._cache) > 1000:  # a template may print the time of day
                self._cache.clear()
            self._cache[text] = ids
        return ids
