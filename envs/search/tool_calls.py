"""Tool-call protocol, by which a model searches with a function call in the format of its chat template.

Two formats are parsed: `<tool_call>{"name": "search", "arguments": {…}}</tool_call>` of Hermes and Qwen2.5,
one or more per turn, and a turn that is bare JSON, `{"name": "search", "parameters": {…}}`, of Llama 3.2.
Answers use answer tags in both formats. The function and its argument are those of Dr. Zero
(arXiv 2601.07055).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from rlkit.envs.search.protocol import Action, read_action, write_documents
from rlkit.retrieval.documents import Result
from rlkit.rewards.search import SEPARATOR

MAX_QUERIES = 10  # per turn
SEARCH_TOOL = {
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
                    "description": f"What to search for: up to {MAX_QUERIES} queries.",
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
# The closing tag may be missing: the model may end its turn with the EOS token instead.
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


def read_call(turn: str) -> Action:
    """Return the action of a turn: a search with the queries of all its calls, or an answer.

    A single call that cannot be parsed makes the entire turn invalid.
    """
    calls = _CALL.findall(turn)
    if not calls and turn.lstrip().startswith("{"):
        calls = [turn]
    if not calls:
        action = read_action(turn)
        return action if action.kind == "answer" else Action("invalid")
    queries: list[str] = []
    for call in calls:
        call_queries = _parse_queries(call)
        if call_queries is None:
            return Action("invalid")
        queries += call_queries
    if not 1 <= len(queries) <= MAX_QUERIES:
        return Action("invalid")
    return Action("search", queries=tuple(queries))


def _parse_queries(call: str) -> list[str] | None:
    """Return the queries of a call, or None if it is not a valid call of the search function."""
    try:
        data = json.loads(call)
    except (ValueError, RecursionError):  # RecursionError: deeply nested brackets
        return None
    if not isinstance(data, Mapping) or data.get("name") != "search":
        return None
    arguments = data.get("arguments", data.get("parameters"))
    queries = arguments.get("query_list") if isinstance(arguments, Mapping) else None
    if not isinstance(queries, list):
        return None
    if not all(isinstance(query, str) and query.strip() for query in queries):
        return None
    # JSON can encode lone surrogates, which tokenizers and servers reject. They become "?". A query is one
    # line, because rewards count the lines of `query`.
    return [" ".join(query.encode("utf-8", "replace").decode().split()) for query in queries]


def write_call(query: str) -> str:
    """Return a call in the Hermes format."""
    call = {"name": "search", "arguments": {"query_list": [query]}}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def write_tool_results(results: Sequence[Result], max_words: int) -> str:
    """Return the content of the tool message: the documents of each query, separated by `---` lines."""
    return SEPARATOR.join(write_documents(result.documents, max_words) for result in results)
