"""An OpenAI-compatible server that records requests, and sends failures and replies as told."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class ScriptedServer:
    """What a server has received, and what it sends.

    Attributes:
        url: URL of the API.
        responses: Statuses of the next responses, in order.
        requests: Bodies of the requests.
        respond: Function of a request that returns the body, the body and its type, or a generator of the
            parts of the body. None: the reply is the name of the model and the seed.
        released: Event that ends the requests that hang.
    """

    url: str = ""
    responses: list = field(default_factory=list)
    requests: list = field(default_factory=list)
    respond: Callable | None = None
    released: threading.Event = field(default_factory=threading.Event)


def completion(content, **fields):
    message = {"role": "assistant", "content": content, **fields}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


@contextmanager
def scripted_server():
    scripted = ScriptedServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            scripted.requests.append({**request, "path": self.path, "key": self.headers["Authorization"]})
            status = scripted.responses.pop(0) if scripted.responses else 200
            body, content_type = {"error": {"message": "out of memory"}}, "application/json"
            if status == 200:
                body = completion(f"{request['model']} {request.get('seed')}")
            if status == 200 and scripted.respond is not None:
                body, content_type = scripted.respond(request), "application/json"
            if isinstance(body, tuple):
                body, content_type = body
            if isinstance(body, Iterator):
                self.send_response(200)
                self.end_headers()
                with suppress(OSError):  # the client has gone
                    for part in body:
                        self.wfile.write(part)
                return
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    scripted.url = f"http://127.0.0.1:{http_server.server_port}/v1"
    try:
        yield scripted
    finally:
        scripted.released.set()
        http_server.shutdown()
        http_server.server_close()
