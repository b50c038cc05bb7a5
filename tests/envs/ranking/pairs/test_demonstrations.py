"""Scores of demonstrations: the answer's probability, and the marginal over several demonstrations."""

import math

import numpy as np
import pytest
import torch
from trl import ModelConfig

from rlkit.envs.ranking.demonstrate import DemonstrateEnvironment, Example, demonstration_prompt
from rlkit.envs.ranking.pairs.demonstrations import (
    add_random,
    answer_probabilities,
    demonstration_rows,
    token_log_probs,
    token_marginal,
)
from rlkit.envs.ranking.pairs.rows import read_rows, write_rows
from rlkit.models.load import load_model

WEATHER = Example("w", "Will it rain in Paris?", ("WeatherTool",))
NEWS = Example("n", "What happened in Rome yesterday, and why does it matter?", ("NewsTool",))
QUESTION = Example("q", "Will it rain in Oslo?", ("WeatherTool", "NewsTool"))


def test_token_marginal_is_the_product_of_the_mixtures():
    log_probs = np.log([[0.5, 0.4], [0.1, 0.9]])
    # The mixture of whole answers would be .7 · .5 · .4 + .3 · .1 · .9 = .167.
    assert math.exp(token_marginal([0.7, 0.3], log_probs)) == pytest.approx(0.38 * 0.55)  # .209
    # The weights of the first K documents of a longer ranking are normalized.
    assert math.exp(token_marginal([0.35, 0.15], log_probs)) == pytest.approx(0.209)
    assert token_marginal([2.0], log_probs[:1]) == pytest.approx(math.log(0.5 * 0.4))


def test_rows_have_the_demonstrations_as_retrievers_index_them(tmp_path):
    same = Example("s", " will it rain in oslo? ", ("BoatTool",))
    bank = [WEATHER, NEWS, same, Example("b", "Is there a boat?", ("BoatTool",))]
    rows = demonstration_rows([QUESTION], [[WEATHER, NEWS]], [[0.9, 0.2]], bank)
    write_rows(tmp_path / "rows.jsonl", rows)
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert row.query == "Will it rain in Oslo?"
    assert row.passages == ("Will it rain in Paris?\nWeatherTool", f"{NEWS.question}\nNewsTool")
    assert (row.targets, row.passage_documents) == ((0.9, 0.2), ("w", "n"))
    assert row.answers == ("w", "n", "s")  # no negatives of the question in a batch


def test_random_candidates_are_not_repeated():
    environment = DemonstrateEnvironment(collection="generated:300:0", retriever="random")
    questions = environment.questions("train")[:4]
    rankings = environment.find(questions, 5, seed=1)
    for question, ranking, candidates in zip(
        questions, rankings, add_random(environment, questions, rankings, 3, seed=1), strict=True
    ):
        assert candidates[:5] == ranking
        assert len({example.id for example in candidates} - {question.id}) == 8


def test_probabilities_of_the_bundled_model_equal_a_forward_pass_without_padding():
    model, tokenizer = load_model(ModelConfig(model_name_or_path="bundled:smollm2-135m", dtype="float32"))
    candidates = [WEATHER, NEWS]
    expected = []
    for example in candidates:
        messages = demonstration_prompt(QUESTION.question, [example])
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        turn = [*messages, {"role": "assistant", "content": "WeatherTool"}]
        # The template writes a line break after the token that ends the turn.
        full = tokenizer.apply_chat_template(turn, return_dict=True)["input_ids"]
        full = full[: len(full) - full[::-1].index(tokenizer.eos_token_id)]
        assert full[: len(prompt)] == prompt
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([full])).logits[0].log_softmax(-1)
        answer = range(len(prompt), len(full))
        expected.append([float(log_probs[i - 1, full[i]]) for i in answer])
    prompts = [demonstration_prompt(QUESTION.question, [example]) for example in candidates]
    log_probs = token_log_probs(model, tokenizer, prompts, ["WeatherTool"] * 2)
    for row, expected_row in zip(log_probs, expected, strict=True):
        assert row == pytest.approx(expected_row, abs=1e-3)
    ((weather, news),) = answer_probabilities(model, tokenizer, [QUESTION], [candidates])
    assert weather == pytest.approx(math.exp(np.mean(expected[0])), rel=1e-3)
    assert 1 > weather > news > 0  # the demonstration with the answer helps
