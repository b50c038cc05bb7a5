"""Models that write texts: on transformers, in vLLM, and on servers that fail now and then."""

import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlkit.errors import UserError
from rlkit.rollouts.text_generation import open_writer, waves

PROMPTS = [[{"role": "user", "content": text}] for text in ("Say a.", "Say b, and more of it.", "c")]
IN_VLLM = """
import json, sys
from rlkit.rollouts.text_generation import open_writer
writer = open_writer(sys.argv[1], "vllm", tokens=12, temperature=float(sys.argv[2]))
prompts = json.loads(sys.argv[3])
texts = [[one.text for one in writer.write(prompts, seeds)] for seeds in ([1, 2, 3], [1, 2, 3], [4, 5, 6])]
# More prompts than are computed in one step.
many = prompts * (2 * writer.wave // 60)
failed = sum(one.error is not None for one in writer.write(many, list(range(len(many)))))
print("found: " + json.dumps([*texts, failed]))
"""


def texts(written):
    assert all(one.error is None for one in written)
    return [one.text for one in written]


@pytest.fixture(scope="module")
def writer(tiny_folder):
    return open_writer(tiny_folder, tokens=12, temperature=1.0)


def test_a_text_depends_on_its_prompt_and_seed_alone(writer):
    first = texts(writer.write(PROMPTS, [1, 2, 3]))
    assert texts(writer.write(PROMPTS[::-1], [3, 2, 1])) == first[::-1]
    assert texts(writer.write(PROMPTS[1:2], [2])) == first[1:2]
    assert texts(writer.write(PROMPTS, [4, 5, 6])) != first
    assert all(1 <= len(text) <= 12 for text in first)


def test_nothing_is_written_for_nothing(writer):
    assert writer.write([], []) == []


def test_the_bundled_model_writes():
    writer = open_writer("bundled:smollm2-135m", tokens=16, temperature=0.0)
    (written,) = writer.write([[{"role": "user", "content": "Name the capital of Italy."}]], [0])
    assert "Rome" in written.text and "<|im_end|>" not in written.text


def test_what_cannot_be_opened_is_one_line():
    with pytest.raises(UserError, match="no model folder"):
        open_writer("./nowhere")
    with pytest.raises(UserError, match="'vllm'"):
        open_writer("bundled:smollm2-135m", "vlm")


@contextmanager
def server(*statuses, port=0, choices=1):
    """An OpenAI-compatible server that gives these statuses and then answers with the seed."""
    left, seen = list(statuses), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(self.path)
            status = left.pop(0) if left else 200
            message = {"role": "assistant", "content": f"{request['model']} {request['seed']}"}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
            answer["choices"] = [choice] * choices
            body = json.dumps(answer if status == 200 else {"error": {"message": "it is ill"}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}/v1", seen
    finally:
        listening.shutdown()
        listening.server_close()


def test_a_server_writes_and_is_asked_again_when_it_fails():
    with server(500, 503) as (url, seen):
        assert texts(open_writer("m", url).write(PROMPTS, [7, 8, 9])) == ["m 7", "m 8", "m 9"]
        assert seen == ["/v1/chat/completions"] * 5


def test_what_a_server_refuses_is_said_and_not_asked_again():
    with server(400) as (url, seen):
        (written,) = open_writer("m", url).write(PROMPTS[:1], [1])
        assert not written.text and "it is ill" in written.error and len(seen) == 1


def test_no_choice_is_an_error():
    with server(choices=0) as (url, _):
        (written,) = open_writer("m", url).write(PROMPTS[:1], [1])
    assert not written.text and "no text" in written.error


def test_a_server_that_is_down_is_an_error_for_each_text():
    with server() as (url, _):
        pass
    writer = open_writer("m", url)
    writer.client = writer.client.with_options(max_retries=1)
    written = writer.write(PROMPTS, [1, 2, 3])
    assert [one.text for one in written] == ["", "", ""]
    assert all("Connection" in one.error for one in written)


@pytest.mark.slow
def test_vllm_in_this_process(vllm_folder):
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-c", IN_VLLM, vllm_folder, "1.0", json.dumps(PROMPTS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, again, other, failed = json.loads(done.stdout.partition("found: ")[2])
    assert first == again != other and all(first) and failed == 0


def test_waves():
    assert [list(wave) for wave in waves([3, 3, 3, 9, 1, 1], 6)] == [[0, 1], [2], [3], [4, 5]]
    assert [list(wave) for wave in waves([3, 3], None)] == [[0, 1]]
    assert list(waves([], 6)) == []
