"""Text generation on transformers, on vLLM in this process, and on servers that fail now and then."""

import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlkit.errors import UserError
from rlkit.rollouts.text_generation import load_text_model, split_by_tokens

PROMPTS = [[{"role": "user", "content": text}] for text in ("Say a.", "Say b, and more of it.", "c")]
VLLM_SCRIPT = """
import json, sys
from rlkit.rollouts.text_generation import load_text_model
model = load_text_model(sys.argv[1], "vllm", max_tokens=12, temperature=float(sys.argv[2]))
prompts = json.loads(sys.argv[3])
texts = []
for seeds in ([1, 2, 3], [1, 2, 3], [4, 5, 6]):
    texts.append([generation.text for generation in model.generate(prompts, seeds)])
# More prompts than one step can prefill.
prompts = prompts * (2 * model.wave_tokens // 60)
generations = model.generate(prompts, list(range(len(prompts))))
num_failed = sum(generation.error is not None for generation in generations)
print("results: " + json.dumps([*texts, num_failed]))
"""


def texts(generations):
    assert all(generation.error is None for generation in generations)
    return [generation.text for generation in generations]


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_text_model(tiny_folder, max_tokens=12, temperature=1.0)


def test_generation_depends_only_on_prompt_and_seed(model):
    first = texts(model.generate(PROMPTS, [1, 2, 3]))
    assert texts(model.generate(PROMPTS[::-1], [3, 2, 1])) == first[::-1]
    assert texts(model.generate(PROMPTS[1:2], [2])) == first[1:2]
    assert texts(model.generate(PROMPTS, [4, 5, 6])) != first
    assert all(1 <= len(text) <= 12 for text in first)


def test_generate_accepts_no_prompts(model):
    assert model.generate([], []) == []


def test_bundled_model_generates_text():
    model = load_text_model("bundled:smollm2-135m", max_tokens=16, temperature=0.0)
    (generation,) = model.generate([[{"role": "user", "content": "Name the capital of Italy."}]], [0])
    assert "Rome" in generation.text and "<|im_end|>" not in generation.text


def test_load_text_model_rejects_bad_models_and_backends():
    with pytest.raises(UserError, match="no model folder"):
        load_text_model("./nowhere")
    message = r"unknown backend 'vlm' .*'vllm'.*: expected transformers, vllm or a URL"
    with pytest.raises(UserError, match=message):
        load_text_model("bundled:smollm2-135m", "vlm")


@contextmanager
def server(*statuses, port=0, choices=1):
    """Run an OpenAI-compatible server that returns these statuses, and then completions with the seed."""
    statuses, paths = list(statuses), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            paths.append(self.path)
            status = statuses.pop(0) if statuses else 200
            message = {"role": "assistant", "content": f"{request['model']} {request['seed']}"}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            completion = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
            completion["choices"] = [choice] * choices
            response = completion if status == 200 else {"error": {"message": "out of memory"}}
            body = json.dumps(response).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    http_server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http_server.server_port}/v1", paths
    finally:
        http_server.shutdown()
        http_server.server_close()


def test_server_model_retries_failed_requests():
    with server(500, 503) as (url, paths):
        assert texts(load_text_model("m", url).generate(PROMPTS, [7, 8, 9])) == ["m 7", "m 8", "m 9"]
        assert paths == ["/v1/chat/completions"] * 5


def test_server_model_does_not_retry_rejected_requests():
    with server(400) as (url, paths):
        (generation,) = load_text_model("m", url).generate(PROMPTS[:1], [1])
        assert not generation.text and "out of memory" in generation.error and len(paths) == 1


def test_server_model_reports_a_completion_without_choices():
    with server(choices=0) as (url, _):
        (generation,) = load_text_model("m", url).generate(PROMPTS[:1], [1])
    assert not generation.text and "no choices" in generation.error


def test_server_model_reports_a_server_that_is_down():
    with server() as (url, _):
        pass
    model = load_text_model("m", url)
    model.client = model.client.with_options(max_retries=1)
    generations = model.generate(PROMPTS, [1, 2, 3])
    assert [generation.text for generation in generations] == ["", "", ""]
    assert all("Connection" in generation.error for generation in generations)


@pytest.mark.slow
def test_vllm_model_generates_in_this_process(vllm_folder):
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-c", VLLM_SCRIPT, vllm_folder, "1.0", json.dumps(PROMPTS)]
    process = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    first, repeated, reseeded, num_failed = json.loads(process.stdout.partition("results: ")[2])
    assert first == repeated != reseeded and all(first) and num_failed == 0


def test_split_by_tokens():
    assert [list(wave) for wave in split_by_tokens([3, 3, 3, 9, 1, 1], 6)] == [[0, 1], [2], [3], [4, 5]]
    assert [list(wave) for wave in split_by_tokens([3, 3], None)] == [[0, 1]]
    assert list(split_by_tokens([], 6)) == []
