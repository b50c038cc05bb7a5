"""Sampling with shared prompts gives what `model.generate` gives for each prompt alone."""

import pytest
import torch
from transformers import GenerationConfig

from rlkit.rollouts.local import generate as module
from rlkit.rollouts.local.generate import cut_after_end, generate, group_prompts, left_pad, position_ids

SLIDING = {"sliding_window": 4}
MODELS = [
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("mistral", SLIDING),
    ("gemma3_text", SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}),
]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [30, 31, 32, 33], [40]]


def greedy(tokens=8):
    return GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=[2, 3], pad_token_id=2)


def alone(model, prompt, config):
    output = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=config
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("kind", "options"), MODELS, ids=[kind for kind, _ in MODELS])
def test_grouped_prompts_equal_prompts_alone(tiny_model, kind, options):
    model = tiny_model(kind, **options)
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    completions = generate(model, prompts, greedy(), "cpu")
    expected = [alone(model, prompt, greedy()) for prompt in PROMPTS]
    assert completions == [completion for completion in expected for _ in range(3)]
    assert len({tuple(c) for c in expected}) == len(PROMPTS)  # the model does read its prompt


@pytest.mark.parametrize(("kind", "options"), MODELS, ids=[kind for kind, _ in MODELS])
def test_only_plain_caches_are_repeated(tiny_model, kind, options, monkeypatch):
    seen = []
    monkeypatch.setattr(
        module, "is_plain", lambda cache, real=module.is_plain: seen.append(real(cache)) or seen[-1]
    )
    generate(tiny_model(kind, **options), [[5, 6, 7]] * 2, greedy(2), "cpu")
    assert seen == [not options]


def test_prompts_of_one_token(tiny_model):
    model = tiny_model()
    assert generate(model, [[7], [7], [9]], greedy(), "cpu") == [
        alone(model, prompt, greedy()) for prompt in ([7], [7], [9])
    ]


def test_prompts_that_all_differ(tiny_model):
    model = tiny_model()
    assert generate(model, PROMPTS, greedy(), "cpu") == [alone(model, prompt, greedy()) for prompt in PROMPTS]


def test_completions_stop_at_any_end_token(tiny_model):
    model = tiny_model(seed=3)
    free = alone(model, PROMPTS[0], greedy(12))
    config = greedy(12)
    config.eos_token_id = [2, free[4]]
    first = free.index(free[4])
    assert generate(model, [PROMPTS[0]] * 2 + [PROMPTS[1]], config, "cpu")[:2] == [free[: first + 1]] * 2


def test_samples_of_a_group_differ(tiny_model):
    torch.manual_seed(0)
    config = GenerationConfig(max_new_tokens=6, do_sample=True, top_k=0, eos_token_id=2, pad_token_id=2)
    assert len({tuple(c) for c in generate(tiny_model(), [PROMPTS[0]] * 8, config, "cpu")}) > 4


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([5, 6, 2, 2], [5, 6, 2]), ([5, 3, 6, 2], [5, 3]), ([5, 6], [5, 6]), ([2], [2]), ([], [])],
)
def test_cut_after_end(tokens, expected):
    assert cut_after_end(tokens, [2, 3]) == expected


def test_group_prompts():
    assert group_prompts([[1, 2], [3], [1, 2], [3], [4]]) == ([(1, 2), (3,), (4,)], [0, 1, 0, 1, 2])


def test_left_padding_does_not_shift_positions():
    ids, mask = left_pad([[5, 6, 7], [8]], pad_id=0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert position_ids(mask).tolist() == [[0, 1, 2], [0, 0, 0]]
