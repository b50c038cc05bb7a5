"""Sampling with a shared prefill equals `model.generate` on each prompt alone."""

import peft
import pytest
import torch
from transformers import GenerationConfig

from rlkit.errors import UserError
from rlkit.rollouts.local import generate as module
from rlkit.rollouts.local.generate import (
    continues_from_cache,
    cut_after_eos,
    generate,
    group_prompts,
    left_pad,
    position_ids,
)

SLIDING = {"sliding_window": 4}
# Models with a cache of their own, without positions, without a cache, and with a recurrent state.
OTHER_CACHES = [
    ("minimax", {"layer_types": ["full_attention", "linear_attention"]}),
    ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    ("bloom", {"n_head": 4, "n_layer": 2}),
    ("openai-gpt", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    ("mamba", {}),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}),
]
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


def generate_alone(model, prompt, config):
    output = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=config
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("kind", "options"), MODELS, ids=[kind for kind, _ in MODELS])
def test_generate_equals_each_prompt_alone(tiny_model, kind, options):
    model = tiny_model(kind, **options)
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    completions = generate(model, prompts, greedy(), "cpu")
    expected = [generate_alone(model, prompt, greedy()) for prompt in PROMPTS]
    assert completions == [completion for completion in expected for _ in range(3)]
    assert len({tuple(c) for c in expected}) == len(PROMPTS)  # the model does read its prompts


@pytest.mark.parametrize(("kind", "options"), MODELS, ids=[kind for kind, _ in MODELS])
def test_generate_repeats_only_dynamic_caches(tiny_model, kind, options, monkeypatch):
    results = []

    def has_only_dynamic_layers(cache, original=module.has_only_dynamic_layers):
        results.append(original(cache))
        return results[-1]

    monkeypatch.setattr(module, "has_only_dynamic_layers", has_only_dynamic_layers)
    generate(tiny_model(kind, **options), [[5, 6, 7]] * 2, greedy(2), "cpu")
    assert results == [not options]


@pytest.mark.parametrize(("kind", "options"), OTHER_CACHES, ids=[kind for kind, _ in OTHER_CACHES])
def test_generate_equals_that_of_models_with_other_caches(tiny_model, kind, options):
    model = tiny_model(kind, **options)
    assert not continues_from_cache(model)
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    ids, mask = left_pad(prompts, pad_id=2)
    with torch.no_grad():
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy())
    expected = [cut_after_eos(row, [2, 3]) for row in output[:, ids.size(1) :].tolist()]
    assert generate(model, prompts, greedy(), "cpu") == expected


def drop_cache(module, args, kwargs):
    return args, {name: value for name, value in kwargs.items() if name != "past_key_values"}


def test_attention_that_writes_nothing_to_the_cache_is_an_error_of_one_line(tiny_model):
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(drop_cache, with_kwargs=True)
    with pytest.raises(UserError, match="cannot sample from LlamaForCausalLM: its attention does not write"):
        generate(model, PROMPTS, greedy(), "cpu")


def test_layer_that_shares_the_keys_of_another_turns_off_the_shared_prefill(tiny_model, monkeypatch):
    def prefill(*args, original=module.prefill):
        cache = original(*args)
        cache.layers[1] = type(cache.layers[1])()  # such a layer writes nothing
        return cache

    monkeypatch.setattr(module, "prefill", prefill)
    model = tiny_model()
    assert generate(model, PROMPTS, greedy(), "cpu") == [
        generate_alone(model, prompt, greedy()) for prompt in PROMPTS
    ]


def test_models_with_lora_share_the_prefill(tiny_model):
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(), config)
    assert continues_from_cache(model)
    assert generate(model, PROMPTS, greedy(), "cpu") == [
        generate_alone(model, prompt, greedy()) for prompt in PROMPTS
    ]


def test_generate_accepts_prompts_of_one_token(tiny_model):
    model = tiny_model()
    assert generate(model, [[7], [7], [9]], greedy(), "cpu") == [
        generate_alone(model, prompt, greedy()) for prompt in ([7], [7], [9])
    ]


def test_generate_accepts_distinct_prompts(tiny_model):
    model = tiny_model()
    assert generate(model, PROMPTS, greedy(), "cpu") == [
        generate_alone(model, prompt, greedy()) for prompt in PROMPTS
    ]


def test_generate_stops_at_any_eos_token(tiny_model):
    model = tiny_model(seed=3)
    free = generate_alone(model, PROMPTS[0], greedy(12))
    config = greedy(12)
    config.eos_token_id = [2, free[4]]
    first = free.index(free[4])
    assert generate(model, [PROMPTS[0]] * 2 + [PROMPTS[1]], config, "cpu")[:2] == [free[: first + 1]] * 2


def test_generate_draws_different_samples_of_one_prompt(tiny_model):
    torch.manual_seed(0)
    config = GenerationConfig(max_new_tokens=6, do_sample=True, top_k=0, eos_token_id=2, pad_token_id=2)
    assert len({tuple(c) for c in generate(tiny_model(), [PROMPTS[0]] * 8, config, "cpu")}) > 4


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([5, 6, 2, 2], [5, 6, 2]), ([5, 3, 6, 2], [5, 3]), ([5, 6], [5, 6]), ([2], [2]), ([], [])],
)
def test_cut_after_eos(tokens, expected):
    assert cut_after_eos(tokens, [2, 3]) == expected


def test_group_prompts():
    assert group_prompts([[1, 2], [3], [1, 2], [3], [4]]) == ([(1, 2), (3,), (4,)], [0, 1, 0, 1, 2])


def test_position_ids_skip_left_padding():
    ids, mask = left_pad([[5, 6, 7], [8]], pad_id=0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert position_ids(mask).tolist() == [[0, 1, 2], [0, 0, 0]]
