"""Tool calls with the chat templates of the model families, which TRL ships.

The tokenizer has the marks of each template as special tokens, as in the family's own tokenizers.
"""

import copy
import re
from pathlib import Path

import datasets
import pytest
import trl

from rlkit.environment import Environment, Reply
from rlkit.envs.search.tool_calls import write_call
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.retrieval.documents import Document, Result
from rlkit.rollouts import Sampling
from rlkit.rollouts.loop import Loop, RolloutLimits
from rlkit.rollouts.scripted import ScriptedEngine
from rlkit.rollouts.tokenize import tokenize
from rlkit.training.demonstrations import scripted_demonstrations

FOLDER = Path(trl.__file__).parent / "chat_templates"
# What ends an assistant turn, according to the models' generation configs.
EOS_TOKENS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|user|>", "<|observation|>", "<|return|>", "<|call|>",
    "<turn|>", "<|tool_response>",
)  # fmt: skip
SUPPORTED = (
    "qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6",
    "qwen3_8", "llama3_1", "llama3_2", "glm4moe", "lfm2_v2", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl",
    "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning", "gptoss", "gemma4",
    "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "diffusion_gemma",
)  # fmt: skip
# Without tools (Llama 3, Gemma 3, …), without tool calls (LFM2), or with calls that are not read (Muse).
REJECTED = (
    "llama3",
    "gemma3",
    "cohere2",
    "deepseek_r1_distill",
    "deepseekv3",
    "phi3_5",
    "lfm2",
    "muse_glimmer",
)
END_OF_THOUGHT = "</think>\n\n"  # with which a scripted turn begins, if the template has opened a thought
TEXT = 'He said "elk",\nnot <|im_end|> \\ deer. '


@pytest.fixture(scope="module")
def make_tokenizer(tiny_tokenizer):
    """Return a function that makes a tokenizer with the chat template and special tokens of a family."""

    def make(name):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
        marks = sorted(set(re.findall(r"<\|[a-z_]+\|?>|<[a-z_]+\|>|<\|\"\|>", tokenizer.chat_template)))
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
        tokenizer.bos_token = "<|bos|>"
        tokenizer.eos_ids = tokenizer.convert_tokens_to_ids([t for t in EOS_TOKENS if t in marks])
        return tokenizer

    return make


class ListEngine:
    """Search engine that finds the same document for every query, and records the queries."""

    def __init__(self):
        self.queries = []

    def search(self, queries, k):
        self.queries += [query.text for query in queries]
        return [Result((Document("7", "Deer", TEXT),)) for _ in queries]


@pytest.fixture
def environment(monkeypatch):
    environment = load_environment("search-v3", protocol="tools", world_size=300)
    environment.__dict__["engine"] = environment.__dict__["held_out"] = ListEngine()
    monkeypatch.setattr(
        environment, "script", lambda task: [write_call("red deer"), environment.answer(task)]
    )
    return environment


TASK = {"prompt": [{"role": "user", "content": "Who?"}], "task_id": "1", "split": "train", "question": "Who?"}
TASK |= {"answers": ["Oskel"]}


def roll_out(environment, tokenizer, script):
    """Return the rollout of scripted turns, and the loop."""
    loop = Loop(
        environment, tokenizer, RolloutLimits(9000, max_turns=environment.max_turns), tokenizer.eos_ids
    )
    engine = ScriptedEngine(tokenizer, [script], loop.replies.eos_token_id)
    prompts = tokenize(tokenizer, [TASK["prompt"]], **loop.template)
    (rollout,) = loop(engine, Sampling(tuple(tokenizer.eos_ids), environment.stop), [TASK], prompts)
    return rollout, loop


@pytest.mark.parametrize("name", SUPPORTED)
def test_calls_in_the_templates_own_form_are_searched_for(name, environment, make_tokenizer):
    tokenizer = make_tokenizer(name)
    loop = Loop(environment, tokenizer, RolloutLimits(9000), tokenizer.eos_ids)
    queries = ['what\'s "red deer"?', "elk: [1] {a}"]
    turn = loop.replies.template.write_calls([("search", {"query_list": queries})])
    rollout, _ = roll_out(environment, tokenizer, [turn, "<answer>Oskel</answer>"])
    assert rollout.invalid is None and [t["role"] for t in rollout.turns] == [
        "assistant",
        "tool",
        "assistant",
    ]
    assert environment.engine.queries == queries
    assert rollout.turns[1]["documents"] == ["7", "7"]
    # The model sees what the template writes for the same conversation.
    messages = [
        *TASK["prompt"],
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "rlkit0000",
                    "type": "function",
                    "function": {"name": "search", "arguments": {"query_list": queries}},
                }
            ],
        },
        {
            "role": "tool",
            "name": "search",
            "tool_call_id": "rlkit0000",
            "content": rollout.turns[1]["content"],
        },
    ]
    rendered = tokenizer.apply_chat_template(
        messages, tools=loop.template["tools"], add_generation_prompt=True, tokenize=False
    )
    seen = tokenizer.decode([*rollout.prompt_ids, *rollout.ids]).partition("<answer>")[0]
    if not rendered.endswith(END_OF_THOUGHT):
        seen = seen.removesuffix(END_OF_THOUGHT)
    # What the template writes after the call: how it renders the thought before it depends on what follows.
    assert seen.endswith(rendered[rendered.rindex("{a}") :])


@pytest.mark.parametrize("name", ["qwen3_5_nothink", "llama3_2", "glm4moe", "gptoss", "lfm2_2_5"])
def test_demonstrations_have_the_calls_and_eos_tokens_of_the_template(name, environment, make_tokenizer):
    tokenizer = make_tokenizer(name)
    tasks = datasets.Dataset.from_list([TASK])
    (row,) = scripted_demonstrations(
        environment, tasks, tokenizer, tokenizer.eos_ids, max_completion_length=9000
    )
    trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    template = Loop(environment, tokenizer, RolloutLimits(9000), tokenizer.eos_ids).replies.template
    call = template.write_calls([("search", {"query_list": ["red deer"]})])
    answer_eos = tokenizer.decode([template.frame("user").eos_token_id])
    assert tokenizer.decode(trained) == f"{call}<answer>Oskel</answer>{answer_eos}"
    assert environment.engine.queries == ["red deer"]


@pytest.mark.parametrize("name", REJECTED)
def test_templates_whose_calls_cannot_be_read_are_rejected_before_training(name, environment, make_tokenizer):
    tokenizer = make_tokenizer(name)
    with pytest.raises(UserError, match="protocol tags") as error:
        Loop(environment, tokenizer, RolloutLimits(9000), tokenizer.eos_ids or [2])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*SUPPORTED, "llama3", "gemma3", "cohere2", "phi3_5"])
def test_replies_are_rendered_as_by_the_template(name, make_tokenizer):
    tokenizer = make_tokenizer(name)
    environment = EchoEnvironment()
    loop = Loop(environment, tokenizer, RolloutLimits(9000, max_turns=2), tokenizer.eos_ids or [2])
    engine = ScriptedEngine(tokenizer, [["hm", "ok"]], loop.replies.eos_token_id)
    prompts = tokenize(tokenizer, [TASK["prompt"]])
    (rollout,) = loop(engine, Sampling(tuple(loop.replies.eos_token_ids)), [TASK], prompts)
    messages = [*TASK["prompt"], {"role": "assistant", "content": "hm"}, {"role": "user", "content": TEXT}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    seen = tokenizer.decode([*rollout.prompt_ids, *rollout.ids]).rpartition("ok")[0]
    if not rendered.endswith(END_OF_THOUGHT):
        seen = seen.removesuffix(END_OF_THOUGHT)
    assert seen.endswith(rendered[rendered.rindex("He said") :])
    frame = loop.replies.template.frame("user")
    _, ids = loop.replies(TEXT, closed=True)
    content_ids = ids[len(frame.before) : len(ids) - len(frame.after)]
    assert not set(content_ids) & set(tokenizer.all_special_ids)  # special tokens in a reply are plain text


class EchoEnvironment(Environment):
    """Replies to every turn with `TEXT`."""

    id = "echo-v1"
    metric = "any"
    rewards = {"any": lambda completion: 1.0}  # noqa: RUF012
    reward_weights = {"any": 1.0}  # noqa: RUF012
    max_turns = 2

    def tasks(self, split, n=None, seed=0):
        raise NotImplementedError

    def answer(self, task):
        return ""

    def respond(self, turns):
        return [Reply(TEXT) for _ in turns]
