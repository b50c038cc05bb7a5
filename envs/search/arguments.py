"""Validation of the arguments of `SearchEnvironment`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlkit.envs.search import protocol as tags
from rlkit.envs.search.simulated import open_simulated
from rlkit.errors import UserError, check_choice, check_integer, nearest
from rlkit.retrieval.engines.remote import Remote

if TYPE_CHECKING:
    from rlkit.envs.search.environment import SearchEnvironment

PROTOCOLS = ("tags", "tools")
SOLUTION_STYLES = ("steps", "verbose", "mixed")


def check_search(environment: SearchEnvironment) -> None:
    """Raise `UserError` if an argument of a `SearchEnvironment` is invalid or contradicts another one."""
    hops, unanswerable, style = environment.hops, environment.unanswerable, environment.prompt_style
    if not hops or not set(hops) <= {1, 2, 3, 4}:
        raise UserError(f"hops must be numbers from 1 to 4, not {hops!r}")
    if not 0 <= unanswerable < 1:
        raise UserError(f"unanswerable must be a fraction of at least 0 and below 1, not {unanswerable}")
    check_integer("world_size", environment.world_size, 100, 10**7)
    check_integer("topk", environment.topk, 1, 100)
    check_integer("max_searches", environment.max_searches, 1, 100)
    check_integer("document_words", environment.document_words, 1, 10**5)
    if environment.data is None and max(hops) > environment.max_searches:
        raise UserError(
            f"a question with {max(hops)} hops needs {max(hops)} searches, but max_searches is"
            f" {environment.max_searches}: raise max_searches or lower hops"
        )
    check_choice("prompt_style", style, tags.STYLES)
    check_choice("solution_style", environment.solution_style, SOLUTION_STYLES)
    check_choice("protocol", environment.protocol, PROTOCOLS)
    if environment.protocol == "tools" and environment.solution_style != "steps":
        raise UserError(
            "with protocol 'tools', solution_style must be 'steps', because not every chat template keeps"
            " text before a tool call"
        )
    check_choice("document_format", environment.document_format, tags.DOCUMENT_FORMATS)
    _check_engines(environment)


def _check_engines(environment: SearchEnvironment) -> None:
    # `name` is None only if `data` is set without an engine.
    name, held_out = environment.engine_name, environment.held_out_name
    if environment.data is not None and (name is None or "bm25" in (name, held_out)):
        raise UserError(
            "data requires passages to search: set engine to an index folder, a server URL or 'simulated';"
            " 'bm25' searches only the generated world"
        )
    if held_out is None or (held_out == "simulated" and environment.data is None):
        raise UserError(
            "evaluation with a simulated engine says little about the policy: set held_out_engine to an "
            "index folder, a server URL or, without data, 'bm25'"
        )
    if environment.is_simulated and environment.unanswerable:
        raise UserError(
            "unanswerable must be 0 with a simulated engine, which writes an answer to every question"
        )
    if "simulated" in (name, held_out) and not environment.engine_args.get("model"):
        raise UserError(
            "a simulated engine requires a model that writes the documents: set engine_args: {model: ...}"
        )


def engine_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the environment's `engine_args` that belong to an engine; others are ignored.

    The arguments of all kinds of engines may be set together, so that a change of `engine` is enough to
    replace a simulated engine by a real one.

    Raises:
        UserError: A name is an argument of no kind of engine.
    """
    of_simulated, of_server = (
        [key for key in inspect.signature(target).parameters if key != "url"]
        for target in (open_simulated, Remote)
    )
    for key in arguments:
        if key not in (*of_simulated, *of_server):
            hint = nearest(key, {*of_simulated, *of_server})
            raise UserError(f"engine_args has no argument {key!r} for any engine{hint}")
    own: list[str] = []
    if name == "simulated":
        own = of_simulated
    elif "://" in name:
        own = of_server
    return {key: value for key, value in arguments.items() if key in own}
