"""`rlkit serve-search INDEX`: serve a search index over HTTP."""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec

from rlkit.arguments.bounds import COUNT, PORT, check_number
from rlkit.arguments.command_line import CommandParser
from rlkit.errors import UserError
from rlkit.retrieval.engines.remote import API_KEY_VARIABLE
from rlkit.retrieval.server import RequestLimits, make_app, open_served_engine

logger = logging.getLogger(__name__)

# Longer than the pauses of a busy client: a request on a connection that the server just closed would fail.
KEEP_ALIVE_SECONDS = 75


def main(argv: Sequence[str]) -> int:
    """Serve an index until the process receives a signal, then return the exit code."""
    options = build_parser().parse_args(argv)
    for name, allowed in (("port", PORT), ("topk", COUNT), ("threads", COUNT)):
        check_number(f"--{name}", getattr(options, name), allowed)
    key = os.environ.get(API_KEY_VARIABLE)
    check_host(options.host, key)
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise UserError("rlkit serve-search requires FastAPI: pip install fastapi uvicorn")
    import uvicorn

    engine = open_served_engine(options.index)
    app = make_app(engine, topk=options.topk, api_key=key, limits=RequestLimits(num_threads=options.threads))
    logger.info("serving %s at http://%s:%s/retrieve", options.index, options.host, options.port)
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
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
    add("--threads", type=int, default=2, metavar="N",
        help="number of requests processed concurrently (default: 2)")  # fmt: skip
    return parser


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
