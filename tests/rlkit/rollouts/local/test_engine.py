"""The transformers engine: its greedy samples equal `model.generate`, whatever shares their batch."""

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
EOS = 2
GREEDY = Sampling((EOS,), temperature=0.0)


def generate_alone(model, ids, length):
    settings = GenerationConfig(max_new_tokens=length, do_sample=False, eos_token_id=EOS, pad_token_id=EOS)
    output = model.generate(input_ids=torch.tensor([ids]), generation_config=settings)
    return output[0, len(ids) :].tolist()


def sample(engine, requests, sampling=GREEDY):
    engine.submit(requests, sampling)
    return dict(engine.collect(wait=True))


def request(index, ids, limit, start=0):
    return Request(index, index, ids, limit, start)


def test_engine_applies_the_limit_of_each_request(tiny_model, tiny_tokenizer):
    model = tiny_model(seed=5)
    engine = TransformersEngine(model, tiny_tokenizer)
    samples = sample(engine, [request(7, [5, 6, 7], 9), request(3, [5, 6, 7], 2), request(1, [8], 5)])
    assert {index: s.ids for index, s in samples.items()} == {
        7: generate_alone(model, [5, 6, 7], 9),
        3: generate_alone(model, [5, 6, 7], 2),
        1: generate_alone(model, [8], 5),
    }
    for index, s in samples.items():
        limit = {7: 9, 3: 2, 1: 5}[index]
        assert s.finish_reason == ("eos" if s.ids[-1] == EOS else "length") and len(s.ids) <= limit
    assert engine.collect(wait=True) == []


def test_engine_keeps_the_stop_string_that_ends_a_turn(tiny_model, tiny_tokenizer):
    model = tiny_model(seed=5)
    plain = generate_alone(model, [5, 6, 7], 9)
    text = tiny_tokenizer.decode(plain)
    stop = text[2:4]  # two tokens long
    length = text.index(stop) + 2
    engine = TransformersEngine(model, tiny_tokenizer)
    sampling = Sampling((EOS,), (stop,), temperature=0.0)
    requests = [request(i, [5, 6, 7], limit) for i, limit in enumerate((9, length, length - 1))]
    samples = sample(engine, requests, sampling)
    assert [samples[i].ids for i in range(3)] == [plain[:length], plain[:length], plain[: length - 1]]
    assert [samples[i].finish_reason for i in range(3)] == ["stop", "stop", "length"]


def test_engine_samples_the_same_rollout_in_one_turn_or_two(tiny_model, tiny_tokenizer):
    """The second turn continues the rollout's random numbers. The rest of the batch makes no difference."""
    engine = TransformersEngine(tiny_model(seed=1), tiny_tokenizer)
    sampling = Sampling((EOS,), key=(0, 1))
    single = sample(engine, [request(4, [5, 6], 8), request(9, [5, 6], 8)], sampling)[9].ids
    first = sample(engine, [request(9, [5, 6], 3)], sampling)[9].ids
    second = sample(engine, [request(9, [5, 6, *first], 5, start=3), request(2, [8], 5)], sampling)[9].ids
    assert first + second == single
    assert single != sample(engine, [request(9, [5, 6], 8)], Sampling((EOS,), key=(0, 2)))[9].ids


@pytest.mark.parametrize("batch_size", [None, 2])
def test_sampler_keeps_the_order_and_marks_truncation(tiny_model, tiny_tokenizer, batch_size):
    model = tiny_model(seed=5)
    loop = Loop(load_environment(LETTERS), tiny_tokenizer, RolloutLimits(5), [EOS])
    tasks = [{"prompt": [{"role": "user", "content": text}]} for text in ("a long question?", "b", "cc")]
    engine = TransformersEngine(model, tiny_tokenizer, batch_size=batch_size)
    rollouts = RolloutSampler(loop, GREEDY)(engine, tasks, 2)
    for task, samples in zip(tasks, rollouts, strict=True):
        expected = generate_alone(model, tokenize(tiny_tokenizer, [task["prompt"]])[0], 5)
        assert [rollout.ids for rollout in samples] == [expected] * 2
        assert samples[0].truncated == (expected[-1] != EOS)
        assert samples[0].text == tiny_tokenizer.decode(expected, skip_special_tokens=True)


def test_engine_ignores_the_models_generation_config(tiny_model, tiny_tokenizer):
    """Qwen2.5's generation config, for example, has a repetition penalty."""
    model = tiny_model(seed=5)
    engine = TransformersEngine(model, tiny_tokenizer)
    plain = sample(engine, [request(0, [40, 40, 40], 20)])[0].ids
    model.generation_config.repetition_penalty = 50.0
    assert sample(engine, [request(0, [40, 40, 40], 20)])[0].ids == plain
