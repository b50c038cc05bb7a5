"""Sampling with given random numbers: the distribution is right, and rollouts do not depend on the batch."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from rlkit.errors import UserError
from rlkit.rollouts.local.generate import generate
from rlkit.rollouts.local.sampling import InverseCDFSampler, draw, is_supported, processors


def config(**options):
    defaults = {"do_sample": True, "max_new_tokens": 6, "eos_token_id": [2], "pad_token_id": 2, "top_k": 0}
    return GenerationConfig(**(defaults | options))


def test_draw_depends_only_on_key_and_row():
    numbers = draw((3, 1), range(6), 4)
    assert torch.equal(draw((3, 1), [4, 5], 4), numbers[4:])
    assert not torch.equal(draw((3, 2), range(6), 4), numbers)
    assert numbers.unique().numel() == 24 and (numbers < 1).all() and (numbers >= 0).all()


def test_inverse_cdf_sampler_draws_tokens_by_their_probability():
    scores = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0]).log()
    uniforms = torch.linspace(0, 1 - 2**-53, 4001, dtype=torch.float64)[:, None]
    chosen = InverseCDFSampler(uniforms)(None, scores.expand(4001, -1)).argmax(1)
    share = np.bincount(chosen, minlength=5) / 4001
    np.testing.assert_allclose(share, [0.5, 0.25, 0.125, 0.125, 0], atol=1e-3)


def test_inverse_cdf_sampler_draws_from_a_long_tail():
    """150,000 tokens share a probability of 0.001; each is below the resolution of float32 sums near 1."""
    tail = 150_000
    scores = torch.cat([torch.tensor([0.999]), torch.full((tail,), 0.001 / tail)]).log()
    uniforms = torch.tensor([[0.99], [0.9995]], dtype=torch.float64)
    chosen = InverseCDFSampler(uniforms)(None, scores.expand(2, -1)).argmax(1).tolist()
    assert chosen[0] == 0
    assert chosen[1] == pytest.approx(tail / 2, rel=0.01)


@pytest.mark.parametrize("impossible", [0, 4])
def test_inverse_cdf_sampler_never_draws_a_token_of_probability_0(impossible):
    scores = torch.zeros(2, 5)
    scores[:, impossible] = -torch.inf
    chosen = InverseCDFSampler(torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64))(None, scores).argmax(
        1
    )
    assert impossible not in chosen.tolist()


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"repetition_penalty": 2.0}],
)
def test_sampling_has_the_frequencies_of_transformers(tiny_model, options):
    """Sample a single token many times with the random numbers, and with transformers' own sampling."""
    model, n = tiny_model("llama"), 4000
    settings = config(max_new_tokens=1, eos_token_id=[127], **options)
    torch.manual_seed(0)
    prompts = [[5, 6, 7, 5]] * n
    theirs = np.bincount([t[0] for t in generate(model, prompts, settings, "cpu")], minlength=128)
    uniforms = draw((0,), range(n), 1)
    ours = np.bincount([t[0] for t in generate(model, prompts, settings, "cpu", uniforms)], minlength=128)
    assert set(np.flatnonzero(ours > 30)) <= set(np.flatnonzero(theirs))
    # Total variation of two samples of one distribution over k tokens is about sqrt(k / (pi n)).
    tokens = (theirs + ours > 0).sum()
    assert abs(ours - theirs).sum() / n / 2 < 2 * np.sqrt(tokens / (np.pi * n))


def test_samples_do_not_depend_on_the_batch(tiny_model):
    model = tiny_model("llama")
    prompts = [[5, 6, 7]] * 4 + [[8, 9]] * 4
    uniforms = draw((1,), range(8), 6)
    full = generate(model, prompts, config(), "cpu", uniforms)
    halves = [generate(model, prompts[i : i + 4], config(), "cpu", uniforms[i : i + 4]) for i in (0, 4)]
    assert full == halves[0] + halves[1]
    assert len({tuple(tokens) for tokens in full}) > 4


def test_logits_that_are_not_finite_are_an_error_of_one_line(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    for options in ({}, {"top_p": 0.9}, {"top_k": 3}, {"temperature": 0.5}):
        with pytest.raises(UserError, match=r"logits are not finite, .*: check config\.json"):
            generate(model, [[5, 6, 7]] * 2, config(**options), "cpu", draw((0,), range(2), 6))


def test_generate_leaves_unsupported_settings_to_transformers(tiny_model):
    assert is_supported(config())
    assert not is_supported(config(typical_p=0.5)) and not is_supported(config(do_sample=False))
    settings = config(epsilon_cutoff=0.2, max_new_tokens=1)
    assert len(generate(tiny_model("llama"), [[5, 6]] * 3, settings, "cpu", draw((0,), range(3), 1))) == 3


def test_processors_are_in_the_order_of_transformers():
    settings = config(temperature=2.0, top_k=3, top_p=0.5)
    names = [type(processor).__name__ for processor in processors(settings, draw((0,), [0], 1))]
    assert names == ["TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "InverseCDFSampler"]
