"""LangGraph: a node for each agent, side by side, and a host who opens each round."""

from collections.abc import Callable
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from people import MAX_TOKENS, MODEL, NEXT, OPENING, TEMPERATURE, read_call, tell


class Town(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]
    round: int


def main() -> None:
    call = read_call()
    model = ChatOpenAI(
        model=MODEL,
        base_url=call.base_url,
        api_key="none",
        max_tokens=MAX_TOKENS,
        temperature=TEMPERATURE,
    )

    def resident(name: str, system: str) -> Callable[[Town], dict[str, Any]]:
        def speak(state: Town) -> dict[str, Any]:
            answer = model.invoke([SystemMessage(system), *state["messages"]])
            return {"messages": [AIMessage(answer.content, name=name)]}

        return speak

    def host(state: Town) -> dict[str, Any]:
        words = NEXT if state["messages"] else OPENING
        return {"messages": [HumanMessage(words)], "round": state["round"] + 1}

    def who_speaks(state: Town) -> list[str] | str:
        return names if state["round"] <= call.rounds else END

    names = list(call.people)
    graph = StateGraph(Town)
    graph.add_node("host", host)
    graph.add_edge(START, "host")
    for name, system in call.people.items():
        graph.add_node(name, resident(name, system))
    graph.add_conditional_edges("host", who_speaks, [*names, END])
    graph.add_edge(names, "host")  # when all have spoken
    final = graph.compile().invoke({"messages": [], "round": 0})

    said = [message for message in final["messages"] if isinstance(message, AIMessage)]
    rounds = [said[first : first + len(names)] for first in range(0, len(said), len(names))]
    tell([{str(message.name): str(message.content) for message in one} for one in rounds])


main()
