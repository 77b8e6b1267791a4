"""CAMEL: a thread for each agent, a tool, and a format of the answer."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from camel.agents import ChatAgent
from camel.models import ModelFactory
from camel.toolkits import FunctionTool
from camel.types import ModelPlatformType
from camel.utils import BaseTokenCounter
from people import MODEL, OPENING, TEMPERATURE, Plan, heard, look, read_call, tell


class Words(BaseTokenCounter):  # type: ignore[misc]
    """Counts words. CAMEL's own counter fetches a tokenizer from the network."""

    def count_tokens_from_messages(self, messages: list[dict[str, Any]]) -> int:
        return sum(len(self.encode(str(message.get("content")))) for message in messages)

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def decode(self, token_ids: list[int]) -> str:
        raise NotImplementedError


def main() -> None:
    call = read_call()
    model = ModelFactory.create(
        model_platform=ModelPlatformType.OPENAI_COMPATIBLE_MODEL,
        model_type=MODEL,
        url=call.base_url,
        api_key="none",
        token_counter=Words(),
        model_config_dict={"temperature": TEMPERATURE},
    )
    agents = {
        name: ChatAgent(system, model=model, tools=[FunctionTool(look)], max_iteration=2)
        for name, system in call.people.items()
    }

    def ask(name: str) -> str:
        answer = agents[name].step(question, response_format=Plan)
        return Plan.model_validate_json(answer.msgs[0].content).told()

    rounds: list[dict[str, str]] = []
    question = OPENING
    with ThreadPoolExecutor(len(agents)) as pool:
        for _ in range(call.rounds):
            rounds.append(dict(zip(agents, pool.map(ask, agents), strict=True)))
            question = heard(rounds[-1])
    tell(rounds)


main()
