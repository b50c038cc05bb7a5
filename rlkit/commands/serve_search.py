"""`rlkit serve-search INDEX`: serve a search index over HTTP."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec

from rlkit.arguments.bounds import COUNT, PORT, Range, check_number
from rlkit.arguments.command_line import CommandParser
from rlkit.errors import UserError
from rlkit.retrieval.engines.remote import API_KEY_VARIABLE
from rlkit.retrieval.server import listen, make_app, make_server, open_served_engine
from rlkit.retrieval.server_requests import RequestLimits

logger = logging.getLogger(__name__)

LIMITS = RequestLimits()  # the defaults
THREADS = Range(1, 1024)
TIMEOUT = Range(0, 86_400, open_low=True)
REQUIREMENTS = ("starlette", "uvicorn", "pydantic")


def main(argv: Sequence[str]) -> int:
    """Serve an index until the process receives a signal, then return the exit code."""
    options = build_parser().parse_args(argv)
    limits = read_limits(options)
    check_number("--port", options.port, PORT)
    check_number("--topk", options.topk, Range(1, limits.max_topk))
    # An empty variable is how a shell script or a container sets no key.
    key = os.environ.get(API_KEY_VARIABLE) or None
    check_key(key)
    check_host(options.host, key)
    if missing := [name for name in REQUIREMENTS if find_spec(name) is None]:
        raise UserError(f"rlkit serve-search requires {missing[0]}: pip install {' '.join(REQUIREMENTS)}")

    # The socket first: building the index of a world may take minutes.
    with listen(options.host, options.port) as listener:
        engine = open_served_engine(options.index)
        app = make_app(engine, topk=options.topk, api_key=key, limits=limits)
        host = f"[{options.host}]" if ":" in options.host else options.host
        logger.info("serving %s at http://%s:%s/retrieve", options.index, host, options.port)
        make_server(app, limits).run([listener])
    return 0


def build_parser() -> CommandParser:
    """Build the parser of the command."""
    parser = CommandParser(
        prog="rlkit serve-search",
        description="Serve a search index over HTTP.",
        epilog=f"If the environment variable {API_KEY_VARIABLE} is set, requests must contain this API key. "
        "A server that other machines can reach requires one.",
    )
    add = parser.add_argument
    add("index", metavar="INDEX", help="folder written by `rlkit index`, or world:SIZE:SEED")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    add("--topk", type=int, default=3, metavar="K",
        help="number of documents for requests that do not set topk (default: 3)")  # fmt: skip
    add("--threads", type=int, default=LIMITS.num_threads, metavar="N",
        help="number of threads that search (default: %(default)s)")  # fmt: skip
    add("--timeout", type=float, default=LIMITS.timeout_seconds, metavar="SECONDS",
        help="time to receive a request, and again to search for it (default: %(default)g)")  # fmt: skip
    add("--max_topk", type=int, default=LIMITS.max_topk, metavar="K",
        help="maximum number of documents per query (default: %(default)s)")  # fmt: skip
    add("--max_queries", type=int, default=LIMITS.max_queries, metavar="N",
        help="maximum number of queries in a request (default: %(default)s)")  # fmt: skip
    add("--max_query_characters", type=int, default=LIMITS.max_query_characters, metavar="N",
        help="length to which longer queries are truncated (default: %(default)s)")  # fmt: skip
    add("--max_body_bytes", type=int, default=LIMITS.max_body_bytes, metavar="N",
        help="maximum size of a request (default: %(default)s)")  # fmt: skip
    add("--max_waiting", type=int, default=LIMITS.max_waiting, metavar="N",
        help="maximum number of requests in progress; others get a 503 (default: %(default)s)")  # fmt: skip
    return parser


def read_limits(options: argparse.Namespace) -> RequestLimits:
    """Return the limits that the options set; raises UserError if one is out of range."""
    check_number("--threads", options.threads, THREADS)
    check_number("--timeout", options.timeout, TIMEOUT)
    for name in ("max_topk", "max_queries", "max_query_characters", "max_body_bytes", "max_waiting"):
        check_number(f"--{name}", getattr(options, name), COUNT)
    return RequestLimits(
        max_body_bytes=options.max_body_bytes,
        max_queries=options.max_queries,
        max_query_characters=options.max_query_characters,
        max_topk=options.max_topk,
        timeout_seconds=options.timeout,
        max_waiting=options.max_waiting,
        num_threads=options.threads,
    )


def check_key(key: str | None) -> None:
    """Raise UserError if an HTTP header cannot carry an API key."""
    if key is None:
        return
    if key != key.strip() or any(ord(character) < 32 or ord(character) == 127 for character in key):
        raise UserError(
            f"{API_KEY_VARIABLE} begins or ends with white space, or contains a control character, which "
            "an HTTP header cannot carry: choose another key"
        )


def check_host(host: str, key: str | None) -> None:
    """Raise UserError if other machines can reach the server and there is no API key.

    Args:
        host: Address that the server listens on.
        key: API key that requests must contain, or None.
    """
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if not is_local and not key:
        raise UserError(
            f"other machines can reach {host}: set an API key with {API_KEY_VARIABLE}=…, or use "
            "--host 127.0.0.1"
        )
