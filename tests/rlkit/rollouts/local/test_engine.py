"""transformers as an engine: greedy answers are those of `model.generate`, whatever is batched with them."""

import pytest
import torch
from transformers import GenerationConfig

from rlkit import load_environment
from rlkit.rollouts import Request, Sampling
from rlkit.rollouts.local.engine import TransformersEngine
from rlkit.rollouts.loop import Loop, RolloutLimits
from rlkit.rollouts.sampler import RolloutSampler
from rlkit.rollouts.tokenize import tokenize
from tests.quick import TOY

LETTERS = TOY + ":Letters"
END = 2
GREEDY = Sampling((END,), temperature=0.0)


def alone(model, ids, length):
    settings = GenerationConfig(max_new_tokens=length, do_sample=False, eos_token_id=END, pad_token_id=END)
    output = model.generate(input_ids=torch.tensor([ids]), generation_config=settings)
    return output[0, len(ids) :].tolist()


def sample(engine, requests, sampling=GREEDY):
    engine.submit(requests, sampling)
    return dict(engine.collect(wait=True))


def request(row, ids, limit, start=0):
    return Request(row, row, ids, limit, start)


def test_each_row_has_its_own_limit(tiny_model, tiny_tokenizer):
    model = tiny_model(seed=5)
    engine = TransformersEngine(model, tiny_tokenizer)
    samples = sample(engine, [request(7, [5, 6, 7], 9), request(3, [5, 6, 7], 2), request(1, [8], 5)])
    assert {row: s.ids for row, s in samples.items()} == {
        7: alone(model, [5, 6, 7], 9),
        3: alone(model, [5, 6, 7], 2),
        1: alone(model, [8], 5),
    }
    for row, s in samples.items():
        limit = {7: 9, 3: 2, 1: 5}[row]
        assert s.finish == ("end" if s.ids[-1] == END else "length") and len(s.ids) <= limit
    assert engine.collect(wait=True) == []


def test_a_stop_string_ends_a_turn_and_stays(tiny_model, tiny_tokenizer):
    model = tiny_model(seed=5)
    plain = alone(model, [5, 6, 7], 9)
    text = tiny_tokenizer.decode(plain)
    stop = text[2:4]  # over two tokens
    at = text.index(stop) + 2
    engine = TransformersEngine(model, tiny_tokenizer)
    sampling = Sampling((END,), (stop,), temperature=0.0)
    found = sample(
        engine, [request(0, [5, 6, 7], 9), request(1, [5, 6, 7], at), request(2, [5, 6, 7], at - 1)], sampling
    )
    assert [found[i].ids for i in range(3)] == [plain[:at], plain[:at], plain[: at - 1]]
    assert [found[i].finish for i in range(3)] == ["stop", "stop", "length"]


def test_the_numbers_of_a_rollout_go_on_where_its_last_turn_ended(tiny_model, tiny_tokenizer):
    """Sampled in one piece or in two, alone or with others, a rollout is the same."""
    engine = TransformersEngine(tiny_model(seed=1), tiny_tokenizer)
    sampling = Sampling((END,), key=(0, 1))
    whole = sample(engine, [request(4, [5, 6], 8), request(9, [5, 6], 8)], sampling)[9].ids
    first = sample(engine, [request(9, [5, 6], 3)], sampling)[9].ids
    rest = sample(engine, [request(9, [5, 6, *first], 5, start=3), request(2, [8], 5)], sampling)[9].ids
    assert first + rest == whole
    assert whole != sample(engine, [request(9, [5, 6], 8)], Sampling((END,), key=(0, 2)))[9].ids


@pytest.mark.parametrize("size", [None, 2])
def test_generator_answers_in_order_and_marks_truncation(tiny_model, tiny_tokenizer, size):
    model = tiny_model(seed=5)
    loop = Loop(load_environment(LETTERS), tiny_tokenizer, RolloutLimits(5), [END])
    tasks = [{"prompt": [{"role": "user", "content": text}]} for text in ("a long question?", "b", "cc")]
    engine = TransformersEngine(model, tiny_tokenizer, batch_size=size)
    answers = RolloutSampler(loop, GREEDY)(engine, tasks, 2)
    for task, samples in zip(tasks, answers, strict=True):
        expected = alone(model, tokenize(tiny_tokenizer, [task["prompt"]])[0], 5)
        assert [rollout.ids for rollout in samples] == [expected] * 2
        assert samples[0].truncated == (expected[-1] != END)
        assert samples[0].text == tiny_tokenizer.decode(expected, skip_special_tokens=True)


def test_the_models_own_sampling_defaults_do_not_touch_greedy_answers(tiny_model, tiny_tokenizer):
    """Qwen2.5 declares a repetition penalty, for one."""
    model = tiny_model(seed=5)
    engine = TransformersEngine(model, tiny_tokenizer)
    plain = sample(engine, [request(0, [40, 40, 40], 20)])[0].ids
    model.generation_config.repetition_penalty = 50.0
    assert sample(engine, [request(0, [40, 40, 40], 20)])[0].ids == plain
