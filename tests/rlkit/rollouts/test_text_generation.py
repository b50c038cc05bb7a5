"""Text generation on transformers, on vLLM in this process, and on servers that fail now and then."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai._models import construct_type
from openai.types.chat import ChatCompletion

from rlkit.errors import UnavailableError, UserError
from rlkit.rollouts import text_generation
from rlkit.rollouts.text_generation import load_text_model, read_completion, split_by_tokens
from tests.rlkit.retrieval.serving import free_port
from tests.rlkit.rollouts.chat_server import completion, scripted_server

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


def test_truncated_generations_are_marked(tiny_folder, server):
    generations = load_text_model(tiny_folder, max_tokens=4, temperature=1.0).generate(
        PROMPTS * 20, range(60)
    )
    # One character is one token here, and the EOS token ends the reply.
    assert all(len(g.text) < 4 or g.truncated for g in generations)
    assert 0 < sum(g.truncated for g in generations) < 60
    body = completion("a reply")
    server.respond = lambda request: body
    server_model = load_text_model("m", server.url)
    assert not server_model.generate(PROMPTS[:1], [1])[0].truncated
    body["choices"][0]["finish_reason"] = "length"
    assert server_model.generate(PROMPTS[:1], [1])[0].truncated


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


@pytest.fixture
def server():
    """Yield an OpenAI-compatible server; `server.responses` are sent before replies with the seed."""
    with scripted_server() as running:
        yield running


def test_server_model_retries_failed_requests(server):
    model = load_text_model("m", server.url)
    server.responses += [500, 503]
    assert texts(model.generate(PROMPTS, [7, 8, 9])) == ["m 7", "m 8", "m 9"]
    assert [request["path"] for request in server.requests] == ["/v1/chat/completions"] * 6


def test_server_model_does_not_retry_rejected_requests(server):
    model = load_text_model("m", server.url)
    server.responses.append(400)
    (generation,) = model.generate(PROMPTS[:1], [1])
    assert not generation.text and "out of memory" in generation.error and len(server.requests) == 2


HTML = (b"<html>log in</html>", "text/html")
BAD_REPLIES = {
    "no choices": {**completion("x"), "choices": []},
    "null choices": {**completion("x"), "choices": None},
    "choices of another type": {**completion("x"), "choices": "abc"},
    "a null choice": {**completion("x"), "choices": [None]},
    "a choice without message": {**completion("x"), "choices": [{"index": 0}]},
    "a null message": {**completion("x"), "choices": [{"index": 0, "message": None}]},
    "a message that is a string": {**completion("x"), "choices": [{"index": 0, "message": "hi"}]},
    "null content": completion(None),
    "content of another type": completion(7),
    "content in parts": completion([{"type": "text", "text": "x"}]),
    "HTML": HTML,
    "HTML declared as JSON": HTML[0],
    "no body": b"",
    "bytes that are not UTF-8": b'{"choices": "\xff"}',
    "a number": b"7",
    "null": b"null",
    "a list": b"[]",
    "a string": b'"text"',
    "an error with status 200": {"error": {"message": "out of memory"}},
    "nested brackets": b"[" * 100_000,
}


@pytest.mark.parametrize("body", BAD_REPLIES.values(), ids=BAD_REPLIES)
def test_bad_reply_of_a_server_is_an_error_of_its_prompt_alone(server, body):
    model = load_text_model("m", server.url)
    server.respond = lambda request: body if request["seed"] == 8 else completion(f"seed {request['seed']}")
    first, bad, last = model.generate(PROMPTS, [7, 8, 9])
    assert texts([first, last]) == ["seed 7", "seed 9"]
    assert bad.error and not bad.text and "\n" not in bad.error


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=5,
)


@given(
    st.sampled_from(["id", "model", "choices", "usage", "message", "content", "reasoning_content", "extra"]),
    JSON_VALUES,
)
@settings(max_examples=100, deadline=None)
def test_completion_with_any_value_in_a_field_is_text_or_an_error(name, value):
    reply = completion("fine")
    message = reply["choices"][0]["message"]
    target = {"message": reply["choices"][0], "content": message, "reasoning_content": message}
    target.get(name, reply)[name] = value
    generation = read_completion(construct_type(type_=ChatCompletion, value=reply))
    assert isinstance(generation.text, str) and (generation.error is None or not generation.text)


def test_lone_surrogates_of_prompts_and_replies_are_replaced(server):
    model = load_text_model("m", server.url)
    server.respond = lambda request: completion(request["messages"][0]["content"] + " \udc80")
    prompt = [{"role": "user", "content": "a \ud800"}]
    assert texts(model.generate([prompt], [1])) == ["a ? ?"]


def test_engine_model_replaces_lone_surrogates_and_reports_prompts_that_cannot_be_tokenized(model):
    surrogate = [{"role": "user", "content": "Say \ud800."}]
    bad = [None, 7, [{"role": "user", "content": None}], [{"content": "x"}], [["user", "x"]]]
    generations = model.generate([PROMPTS[0], *bad, surrogate, PROMPTS[2]], [1, *range(10, 15), 5, 3])
    expected = texts(
        model.generate([PROMPTS[0], [{"role": "user", "content": "Say ?."}], PROMPTS[2]], [1, 5, 3])
    )
    assert texts([generations[0], generations[6], generations[7]]) == expected
    assert all(generation.error or generation.text for generation in generations[1:6])
    assert any("cannot be tokenized" in (generation.error or "") for generation in generations[1:6])


def test_server_model_keeps_the_finished_generations_at_the_deadline(server, monkeypatch):
    monkeypatch.setattr(text_generation, "CONCURRENCY", 2)
    model = load_text_model("m", server.url, timeout=2.0)

    def respond(request):
        if request["seed"] >= 10:
            server.released.wait()
        return completion("fine")

    server.respond = respond
    # The third prompt that hangs has no turn before the deadline.
    generations = model.generate([PROMPTS[0]] * 5, [1, 10, 11, 12, 2])
    assert [generation.text for generation in generations] == ["fine", "", "", "", ""]
    assert all("no reply within 2 s" in generation.error for generation in generations[1:])
    # Without the probe, and sorted, because concurrent requests arrive in any order.
    assert sorted(request["seed"] for request in server.requests[1:]) == [1, 10, 11]


def test_server_model_that_drips_is_an_error_of_its_prompt(server):
    def drip():
        while not server.released.wait(0.05):
            yield b" "

    model = load_text_model("m", server.url, timeout=1.5)
    server.respond = lambda request: drip() if request["seed"] == 1 else completion("fine")
    slow, fast = model.generate(PROMPTS[:2], [1, 2])
    assert "no reply within 1.5 s" in slow.error and texts([fast]) == ["fine"]


def test_server_model_reports_a_reply_of_thoughts_alone(server):
    model = load_text_model("m", server.url)
    fields = iter([{"reasoning_content": "let me think"}, {"reasoning": "let me think"}, {}])
    server.respond = lambda request: completion("", **next(fields))
    thoughts, also_thoughts, empty = (model.generate(PROMPTS[:1], [1])[0] for _ in range(3))
    assert "only thoughts" in thoughts.error and "only thoughts" in also_thoughts.error
    assert empty.error is None and empty.text == ""


def test_template_and_extra_body_are_sent_to_a_server(server):
    body = {"top_k": 4, "chat_template_kwargs": {"documents": []}}
    model = load_text_model("m", server.url, template={"enable_thinking": False}, extra_body=body)
    texts(model.generate(PROMPTS[:1], [1]))
    expected = {"enable_thinking": False, "documents": []}
    assert [request["chat_template_kwargs"] for request in server.requests] == [expected] * 2
    assert [request["top_k"] for request in server.requests] == [4, 4]


def test_template_is_rendered_by_an_engine(tiny_folder, model):
    other = load_text_model(tiny_folder, max_tokens=12, temperature=1.0, template={"enable_thinking": False})
    assert other.generate(PROMPTS[:1], [1]) == model.generate(PROMPTS[:1], [1])  # its template ignores it
    other.tokenizer.chat_template = "{{ messages[0].content }}{% if enable_thinking is false %}/no{% endif %}"
    (ids,) = other._tokenize(PROMPTS[:1])
    assert other.tokenizer.decode(ids).endswith("/no")


def test_engine_model_keeps_the_tags_of_thoughts(tiny_folder):
    """A thought that the chat template opens, or that special tokens surround, is told from a reply."""
    model = load_text_model(tiny_folder, max_tokens=12, temperature=1.0)
    (plain,) = texts(model.generate(PROMPTS[:1], [1]))
    model.tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    (thought,) = texts(model.generate(PROMPTS[:1], [1]))
    assert thought.startswith("<think>") and not plain.startswith("<think>")
    character = plain[0]
    model.tokenizer.chat_template = model.tokenizer.chat_template.replace("<think>\n", "")
    model.tokenizer.add_special_tokens({"additional_special_tokens": [character]})
    assert texts(model.generate(PROMPTS[:1], [1])) == [plain]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "enable_thinking"}, "template must be a mapping"),
        ({"template": {"add_generation_prompt": False}}, "the chat template fails"),
        ({"extra_body": [1]}, "extra_body must be a mapping"),
        ({"extra_body": {"top_k": 1}}, "extra_body is for a server"),
        ({"backend": "http://127.0.0.1:9/v1", "extra_body": {"stream": True}}, "must not contain 'stream'"),
        ({"backend": "http://127.0.0.1:9/v1", "timeout": 0}, "timeout must be a positive number"),
        ({"backend": "http://127.0.0.1:9/v1", "timeout": "45"}, "timeout must be a positive number"),
    ],
)
def test_load_text_model_rejects_bad_arguments(tiny_folder, arguments, message):
    with pytest.raises(UserError, match=message):
        load_text_model(tiny_folder, **arguments)


def test_load_text_model_rejects_a_server_that_does_not_answer(server):
    for status, remedy in ((404, "name under which"), (401, "OPENAI_API_KEY"), (500, "check the model")):
        server.responses.append(status)
        with pytest.raises(UnavailableError, match=remedy) as raised:
            load_text_model("m", server.url)
        assert "out of memory" in str(raised.value) and "\n" not in str(raised.value)
    assert len(server.requests) == 3 and all(request["max_tokens"] == 1 for request in server.requests)
    server.responses.append(429)
    load_text_model("m", server.url)  # it is up
    with pytest.raises(UnavailableError, match="start the server"):
        load_text_model("m", f"http://127.0.0.1:{free_port()}/v1")
    server.respond = lambda request: HTML
    with pytest.raises(UnavailableError, match="not a chat completion"):
        load_text_model("m", server.url)


def test_server_model_reports_a_server_that_is_down():
    with scripted_server() as server:
        model = load_text_model("m", server.url, timeout=3.0)
    generations = model.generate(PROMPTS, [1, 2, 3])
    assert [generation.text for generation in generations] == ["", "", ""]
    assert all(generation.error.startswith("request to m failed") for generation in generations)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_commands")
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
