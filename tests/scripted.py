"""A model that says what a test has written down, and thinks if its chat template knows how."""

import copy
from collections.abc import Callable
from typing import Any

from fake_executor import FakeExecutor
from tiny_models import SPECIALS, VOCAB, fake_model
from tokendance import LLM
from tokendance.executor.step import SamplingRow, SlotArray
from tokendance.options import EngineOptions

_BEGIN = "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}"
_END = "{{ '<|end|>\n' }}{% endfor %}"
# Thoughts are written where an answer is the last; elsewhere they are taken out of its text. Who
# does not want any is given empty ones.
LIKE_QWEN = (
    _BEGIN + "{% set c = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% set t = m['reasoning_content'] %}{% if not t and '</think>' in c %}"
    "{% set t = c.split('</think>')[0].split('<think>')[-1] %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{% if loop.last and t %}{{ '<think>\n' + t.strip() + '\n</think>\n\n' }}{% endif %}"
    "{% set c = c.lstrip() %}{% endif %}{{ c }}"
    + _END
    + "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# The template itself begins the thoughts, and answers of the past have none.
LIKE_DEEPSEEK = (
    _BEGIN + "{% set c = m['content'] %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ c }}"
    + _END
    + "{% if add_generation_prompt %}{{ '<|start|>assistant\n<think>\n' }}{% endif %}"
)

# What is said, after a prompt that ends so.
Script = Callable[[str], str]


class ScriptedExecutor(FakeExecutor):
    """Says what a script has for the prompt, then ends; something else where it may not."""

    def __init__(self, num_slots: int, script: Script, tokenizer: Any) -> None:
        super().__init__(num_slots, VOCAB, SPECIALS)
        self._script = script
        self._tokenizer = copy.deepcopy(tokenizer)  # another thread uses the original
        self._opens = tokenizer.chat_template == LIKE_DEEPSEEK
        self.prompts: list[str] = []  # all that were read

    def _choose(self, context: SlotArray, row: SamplingRow) -> int:
        text = str(self._tokenizer.decode(context.tolist()))
        prompt, mark, said = text.rpartition("<|start|>assistant\n")
        if said.startswith("<think>\n") and self._opens:
            mark, said = mark + "<think>\n", said.removeprefix("<think>\n")
        if not said:
            self.prompts.append(prompt + mark)
        rest = self._script(prompt).removeprefix(said)
        ids = self._tokenizer(rest, add_special_tokens=False).input_ids
        token = int(ids[0]) if ids else 2
        if row.forbidden is not None and row.forbidden[token]:
            return int(row.forbidden.argmin())
        return token


def scripted(
    script: Script, template: str, *, marks_are_tokens: bool = False
) -> tuple[LLM, ScriptedExecutor]:
    """A model that says what a script has, with a chat template of its own.

    Its tokens are characters; the marks of thoughts may be tokens, as models have them.
    """
    num_slots = 2000 * 16
    model = fake_model()
    model.tokenizer.chat_template = template
    if marks_are_tokens:
        model.tokenizer.add_tokens(["<think>", "</think>"])
    executor = ScriptedExecutor(num_slots, script, model.tokenizer)
    budget = num_slots * model.shape.kv_bytes_per_token(model.dtype)
    return LLM.from_loaded(model, EngineOptions(kv_budget=budget), executor=executor), executor
