"""Tool-call protocol, by which a model searches with a function call in the format of its chat template.

`rlkit.rewards.tool_calls` reads the calls in the formats of the common model families. Answers use answer
tags in all of them. The function and its argument are those of Dr. Zero (arXiv 2601.07055).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from rlkit.envs.search.protocol import Action, clean_query, write_documents
from rlkit.retrieval.documents import Result
from rlkit.rewards.search import SEPARATOR
from rlkit.rewards.tags import tag_contents
from rlkit.rewards.thinking import outside_thoughts
from rlkit.rewards.tool_calls import ToolCall, ToolCallError, read_literal, read_tool_calls

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
# Models also write these names for the argument, whatever its schema says.
ARGUMENTS = ("query_list", "queries", "query")


def read_call(turn: str) -> Action:
    """Return the action of a turn: a search with the queries of all its calls, or an answer.

    What is in a thought does not count. A single call that cannot be parsed makes the entire turn invalid.
    """
    try:
        calls = read_tool_calls(turn)
    except ToolCallError:
        return Action("invalid")
    if not calls:
        # Search tags, which a model may mention, have no effect in this protocol.
        return Action("answer" if tag_contents(outside_thoughts(turn), "answer") else "invalid")
    queries: list[str] = []
    for call in calls:
        call_queries = _read_queries(call)
        if call_queries is None:
            return Action("invalid")
        queries += call_queries
    if not 1 <= len(queries) <= MAX_QUERIES:
        return Action("invalid")
    return Action("search", queries=tuple(queries))


def _read_queries(call: ToolCall) -> list[str] | None:
    """Return the queries of a call, or None if it is not a valid call of the search function."""
    names = [name for name in ARGUMENTS if name in call.arguments]
    if call.name != "search" or len(names) != 1:
        return None
    value = call.arguments[names[0]]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = read_literal(value)  # Llama writes a list as a string
    queries = [value] if isinstance(value, str) else value
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        return None
    cleaned = [clean_query(query) for query in queries]
    return cleaned if all(cleaned) else None


def write_call(query: str) -> str:
    """Return a call in the Hermes format, which `rlkit sft` rewrites in the format of the chat template."""
    call = {"name": "search", "arguments": {"query_list": [query]}}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def write_tool_results(results: Sequence[Result], max_words: int, document_format: str = "search_r1") -> str:
    """Return the content of the tool message: the documents of each query, separated by `---` lines."""
    return SEPARATOR.join(write_documents(result.documents, max_words, document_format) for result in results)
