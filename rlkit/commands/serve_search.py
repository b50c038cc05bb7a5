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
from rlkit.retrieval.server import RequestLimits, make_app, open_served

logger = logging.getLogger(__name__)

KEEP_ALIVE = 75  # seconds for which an idle connection is kept


def main(argv: Sequence[str]) -> int:
    """Serve an index until a signal comes."""
    options = parser().parse_args(argv)
    for name, allowed in (("port", PORT), ("topk", COUNT), ("threads", COUNT)):
        check_number(f"--{name}", getattr(options, name), allowed)
    key = os.environ.get(API_KEY_VARIABLE)
    check_host(options.host, key)
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise UserError("a server needs FastAPI: pip install fastapi uvicorn")
    import uvicorn

    engine = open_served(options.index)
    app = make_app(engine, topk=options.topk, api_key=key, limits=RequestLimits(threads=options.threads))
    logger.info("%s at http://%s:%s/retrieve", options.index, options.host, options.port)
    # A busy client may come back late: a connection that is closed meanwhile would be an error to it.
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE,
    )
    return 0


def parser() -> CommandParser:
    """The options of the command."""
    made = CommandParser(prog="rlkit serve-search", description="Serve an index over HTTP.")
    made.add_argument("index", metavar="INDEX", help="folder of `rlkit index`, or world:SIZE:SEED")
    made.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    made.add_argument("--port", type=int, default=8000, help="port to listen at (default: 8000)")
    made.add_argument(
        "--topk", type=int, default=3, help="documents where a request does not say (default: 3)"
    )
    made.add_argument("--threads", type=int, default=2, help="requests searched for at a time (default: 2)")
    made.epilog = (
        f"The variable {API_KEY_VARIABLE} holds the key that requests must bring; other machines need one."
    )
    return made


def check_host(host: str, key: str | None) -> None:
    """Raise UserError where others could reach the server and no key is set."""
    try:
        near = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        near = False
    if not near and not key:
        raise UserError(
            f"{host} can be reached from other machines: set a key, {API_KEY_VARIABLE}=…, or leave --host at "
            "127.0.0.1"
        )
