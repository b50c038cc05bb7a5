"""How a model searches by calling a function, in the form of its own chat template.

Two forms are read: `<tool_call>{"name": "search", "arguments": {…}}</tool_call>`, of Hermes and Qwen2.5, once
or several times in a turn, and a turn that is bare JSON, `{"name": "search", "parameters": {…}}`, of Llama
3.2. The answer stays between answer tags. Function and argument are those of Dr. Zero (arXiv 2601.07055).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from rlkit.envs.search.protocol import Action, read_action, write_documents
from rlkit.retrieval.documents import Result

MOST = 10  # queries of a turn
SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Searches a collection of passages and returns the best ones for each query.",
        "parameters": {
            "type": "object",
            "properties": {
                "query_list": {
                    "type": "array",
                    "items": {"type": "string"},
                    "description": f"What to search for: up to {MOST} queries.",
                }
            },
            "required": ["query_list"],
        },
    },
}
INVALID = (
    "That was neither a valid call of the search function nor an answer. Call it with a list of queries, or "
    "write the answer between <answer> and </answer>."
)
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


def read_call(turn: str) -> Action:
    """What a turn asks for: the queries of all its calls, or else an answer.

    One call that cannot be read makes the turn invalid, whatever else it holds.
    """
    calls = _CALL.findall(turn)
    if not calls and turn.lstrip().startswith("{"):
        calls = [turn]
    if not calls:
        action = read_action(turn)
        return action if action.kind == "answer" else Action("invalid")
    read = [_queries(call) for call in calls]
    queries = [query for one in read if one is not None for query in one]
    if None in read or not 1 <= len(queries) <= MOST:
        return Action("invalid")
    return Action("search", queries=tuple(queries))


def _queries(call: str) -> list[str] | None:
    """The queries of one call; None where it is not one of the function."""
    try:
        data = json.loads(call)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, Mapping) or data.get("name") != "search":
        return None
    arguments = data.get("arguments", data.get("parameters"))
    queries = arguments.get("query_list") if isinstance(arguments, Mapping) else None
    if not isinstance(queries, list) or not all(isinstance(one, str) and one.strip() for one in queries):
        return None
    # JSON can spell half of a character, which no tokenizer and no server takes.
    return [query.encode("utf-8", "replace").decode().strip() for query in queries]


def write_call(query: str) -> str:
    """A call as a model writes it."""
    call = {"name": "search", "arguments": {"query_list": [query]}}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def write_tool_results(results: Sequence[Result], most_words: int) -> str:
    """The content of the tool's message: the documents of each query, parted by a line `---`."""
    return "\n---\n".join(write_documents(result.documents, most_words) for result in results)
