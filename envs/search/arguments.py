"""What a search environment may be asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlkit.envs.search import protocol as tags
from rlkit.errors import UserError, check_choice

if TYPE_CHECKING:
    from rlkit.envs.search.environment import SearchEnvironment

PROTOCOLS = ("tags", "tools")


def check_search(environment: SearchEnvironment) -> None:
    """Raise UserError where the arguments of a `SearchEnvironment` do not fit."""
    hops, unanswerable, style = environment.hops, environment.unanswerable, environment.prompt_style
    if not hops or not set(hops) <= {1, 2, 3, 4}:
        raise UserError(f"hops is {hops!r}: choose from 1, 2, 3 and 4")
    if not 0 <= unanswerable < 1:
        raise UserError(f"unanswerable is {unanswerable}: it is a share, from 0 to less than 1")
    limits = {"world_size": (100, 10**7), "topk": (1, 100), "max_searches": (1, 100)}
    for name, (least, most) in {**limits, "document_words": (1, 10**5)}.items():
        number = getattr(environment, name)
        if not isinstance(number, int) or not least <= number <= most:
            raise UserError(f"{name} is {number!r}: it must be a whole number from {least} to {most}")
    if environment.data is None and max(hops) > environment.max_searches:
        raise UserError(f"a question of {max(hops)} hops needs as many searches: raise max_searches")
    check_choice("prompt_style", style, tags.STYLES)
    check_choice("protocol", environment.protocol, PROTOCOLS)
    _check_engines(environment)


def _check_engines(environment: SearchEnvironment) -> None:
    name, held_out = environment.engine_name, environment.held_out_name
    if environment.data is not None and (name is None or "bm25" in (name, held_out)):
        raise UserError(
            "data needs passages to search: set engine to the folder of an index, the URL of a server, or "
            "simulated; bm25 is over the generated world"
        )
    if held_out is None or (held_out == "simulated" and environment.data is None):
        raise UserError(
            "a simulated engine says little about held-out questions: set held_out_engine to a real one"
        )
    if environment.simulated and environment.unanswerable:
        raise UserError("a simulated engine answers everything: unanswerable must be 0")
    if environment.simulated and not environment.engine_args.get("model"):
        raise UserError("a simulated engine needs engine_args: {model: ...}, the model that writes documents")
