import json

import pytest

from rlkit.envs.ranking.pairs import partial
from rlkit.envs.ranking.pairs.partial import Prompt, generate_replies, open_results, prompt_seed
from rlkit.errors import UserError
from rlkit.rollouts.text_generation import load_text_model
from tests.rlkit.rollouts.chat_server import scripted_server

SETTINGS = {"model": "m", "examples": [["a", "b"]], "seed": 0}


@pytest.fixture
def server():
    """Yield a chat server whose replies are the model's name and the seed."""
    with scripted_server() as running:
        yield running


@pytest.fixture
def prompts(monkeypatch):
    """Five prompts, two of which make a batch."""
    monkeypatch.setattr(partial, "BATCH_SIZE", 2)
    return [Prompt(f"p{i}", [{"role": "user", "content": f"{i}"}], i) for i in range(5)]


def contents(server):
    """Return what the server was asked since the last call, without the probe of a new model."""
    requests = [request["messages"][0]["content"] for request in server.requests]
    server.requests.clear()
    return sorted(content for content in requests if content != "Hi")


def test_failed_request_loses_no_other_reply_and_a_second_run_resumes(server, prompts, tmp_path):
    path = tmp_path / "out.partial"
    model = load_text_model("m", server.url)

    def fail(request):
        if request["messages"][0]["content"] == "3":
            return {"choices": []}
        reason = "length" if request["messages"][0]["content"] == "4" else "stop"
        message = {"role": "assistant", "content": "a reply"}
        return {"choices": [{"index": 0, "message": message, "finish_reason": reason}]}

    server.respond = fail
    with pytest.raises(UserError, match=r"failed to generate 1 of 5 replies: .* has the 4 others"):
        generate_replies(model, prompts, path, SETTINGS)
    assert contents(server) == ["0", "1", "2", "3", "4"]
    server.respond = None
    result = generate_replies(model, prompts, path, SETTINGS)
    assert contents(server) == ["3"]
    texts = {name: reply.text for name, reply in result.items()}
    assert texts == {"p0": "a reply", "p1": "a reply", "p2": "a reply", "p4": "a reply", "p3": "m 3"}
    assert [name for name, reply in result.items() if reply.truncated] == ["p4"]
    assert generate_replies(model, prompts, path, SETTINGS) == result
    assert contents(server) == []


def test_incomplete_last_line_is_dropped(server, prompts, tmp_path):
    path = tmp_path / "out.partial"
    model = load_text_model("m", server.url)
    result = generate_replies(model, prompts, path, SETTINGS)
    content = path.read_bytes()
    path.write_bytes(content[:-4])  # inside the last reply
    contents(server)
    assert generate_replies(model, prompts, path, SETTINGS) == result
    assert contents(server) == ["4"] and path.read_bytes() == content
    path.write_bytes(content[:9])  # inside the settings
    assert open_results(path, SETTINGS) == {}
    assert json.loads(path.read_text()) == {"settings": SETTINGS}


def test_other_prompts_are_other_settings(server, prompts, tmp_path):
    path = tmp_path / "out.partial"
    model = load_text_model("m", server.url)
    generate_replies(model, prompts, path, SETTINGS)
    with pytest.raises(UserError, match=r"different settings \(prompts\)"):
        generate_replies(model, prompts[1:], path, SETTINGS)


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "out.partial"
    assert open_results(path, SETTINGS | {"seed": 5}) == {}  # a run that stops before its first result
    assert open_results(path, SETTINGS) == {}
    with path.open("a") as file:
        file.write('{"id": "p0", "result": "a reply"}\n')
    assert open_results(path, SETTINGS | {"examples": [("a", "b")]}) == {"p0": "a reply"}
    with pytest.raises(UserError, match=r"different settings \(seed, depth\): delete it, or use another -o"):
        open_results(path, SETTINGS | {"seed": 1, "depth": 2})


def test_prompt_seeds_are_fixed_numbers_below_2_to_the_31():
    assert prompt_seed(0, "few_shot/a/0") == prompt_seed(0, "few_shot/a/0")
    seeds = {prompt_seed(seed, f"few_shot/a/{i}") for seed in range(2) for i in range(500)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**31 for seed in seeds)
