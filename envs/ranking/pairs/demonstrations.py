"""Training rows for a retriever of demonstrations, scored by a frozen language model.

    {"id": "demonstrations/s17", "query": "Can you recommend a hotel in London?",
     "passages": ["I need a room in Rome.\\nTripTool", "What is the news today?\\nNewsTool"],
     "targets": [0.62, 0.03], "source": "demonstrations", "passage_documents": ["s1", "s9"]}

The target of a demonstration z for a question x is the probability of the correct answer y after it, as a
geometric mean over its tokens, exp(1/|y| Σ_i log p(y_i | x, z, y_<i)). It is in [0, 1]. Within a row, y is
the same, so the order is that of p(y | x, z). Without the mean, all targets of a long answer would be near 0.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlkit.envs.ranking.demonstrate import (
    DemonstrateEnvironment,
    Example,
    demonstration_prompt,
)
from rlkit.envs.ranking.pairs.rows import PairRow, query_key
from rlkit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SOURCE = "demonstrations"


def token_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[dict[str, str]]],
    answers: Sequence[str],
    batch_size: int = 16,
) -> list[list[float]]:
    """Return the log-probability of each token of each answer, and of the EOS token after it.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer, with a chat template and an EOS token.
        prompts: Chat messages before each answer.
        answers: Answers, one per prompt.
        batch_size: Number of answers per forward pass.

    Raises:
        UserError: The tokenizer has no chat template or no EOS token, or a log-probability is not finite.
    """
    import torch

    from rlkit.rollouts.local.generate import left_pad, position_ids
    from rlkit.rollouts.tokenize import tokenize

    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("the tokenizer has no EOS token; use an instruction-tuned model")
    model.eval()
    prompt_ids = tokenize(tokenizer, prompts)
    answer_ids = [[*ids, eos] for ids in tokenizer(list(answers), add_special_tokens=False)["input_ids"]]
    log_probs: list[list[float]] = [[] for _ in prompts]
    # Strings of similar length in one batch need less padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompt_ids[i]) + len(answer_ids[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, mask = left_pad([[*prompt_ids[i], *answer_ids[i]] for i in batch], eos)
        ids, mask = ids.to(model.device), mask.to(model.device)
        max_answer = max(len(answer_ids[i]) for i in batch)
        with torch.no_grad():
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position_ids(mask),
                use_cache=False,
                logits_to_keep=max_answer + 1,
            ).logits[:, :-1]  # (B, T, V); the last position predicts the token after EOS
        targets = ids[:, -max_answer:, None]
        values = logits.float().log_softmax(-1).gather(-1, targets).squeeze(-1).tolist()
        for i, row in zip(batch, values, strict=True):
            log_probs[i] = row[-len(answer_ids[i]) :]
            if not all(map(math.isfinite, log_probs[i])):
                raise UserError("the language model returned NaN or infinite log-probabilities; use float32")
    return log_probs


def answer_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Example],
    candidates: Sequence[Sequence[Example]],
) -> list[list[float]]:
    """Return the probability per token of each question's answer after each of its candidates alone.

    Args:
        model: Frozen language model.
        tokenizer: Tokenizer of the model.
        questions: Questions with their answers, of which the first is scored.
        candidates: Demonstrations of each question.
    """
    prompts = []
    answers = []
    for question, examples in zip(questions, candidates, strict=True):
        prompts += [demonstration_prompt(question.question, [example]) for example in examples]
        answers += [question.answers[0]] * len(examples)
    flat = iter(token_log_probs(model, tokenizer, prompts, answers))
    return [[math.exp(np.mean(next(flat))) for _ in examples] for examples in candidates]


def add_random(
    environment: DemonstrateEnvironment,
    questions: Sequence[Example],
    rankings: Sequence[Sequence[Example]],
    num_random: int,
    seed: int = 0,
) -> list[list[Example]]:
    """Return the demonstrations of each question, with others at the end that are drawn at random.

    Args:
        environment: Environment that draws them.
        questions: Questions.
        rankings: Demonstrations of each question that a retriever has found.
        num_random: Number of random demonstrations per question.
        seed: Random seed.
    """
    candidates = []
    for question, ranking in zip(questions, rankings, strict=True):
        # Some of those drawn may be in the ranking.
        drawn = environment.draw(question, len(ranking) + num_random, seed)
        additional = [example for example in drawn if example not in ranking]
        candidates.append([*ranking, *additional[:num_random]])
    return candidates


def demonstration_rows(
    questions: Sequence[Example],
    candidates: Sequence[Sequence[Example]],
    targets: Sequence[Sequence[float]],
    bank: Iterable[Example],
) -> list[PairRow]:
    """Return one row per question, whose passages are the demonstrations, as the retriever indexes them.

    Args:
        questions: Questions.
        candidates: Demonstrations of each question.
        targets: Target of each demonstration.
        bank: All demonstrations. Those with an answer of a question, or with the question itself, are its
            `answers`, so that the batch has none of them as a negative.
    """
    positions: dict[str, int] = {}
    ids_by_answer: defaultdict[str, set[str]] = defaultdict(set)
    ids_by_question: defaultdict[str, set[str]] = defaultdict(set)
    for position, example in enumerate(bank):
        positions[example.id] = position
        ids_by_question[query_key(example.question)].add(example.id)
        for answer in example.answers:
            ids_by_answer[answer].add(example.id)
    answers = []
    for question in questions:
        of_question = ids_by_question[query_key(question.question)]
        ids = of_question.union(*(ids_by_answer[answer] for answer in question.answers))
        answers.append(tuple(sorted(ids, key=positions.__getitem__)))
    return [
        PairRow(
            f"{SOURCE}/{question.id}",
            question.question,
            tuple(example.text for example in examples),
            tuple(of_question),
            SOURCE,
            passage_documents=tuple(example.id for example in examples),
            answers=ids,
        )
        for question, examples, of_question, ids in zip(questions, candidates, targets, answers, strict=True)
    ]


def token_marginal(weights: Sequence[float], log_probs: Sequence[Sequence[float]]) -> float:
    """Return log Π_i Σ_k p(z_k) p(y_i | x, z_k, y_<i): the answer's log-probability after K demonstrations.

    Each demonstration has a prompt of its own, and every token is predicted by the mixture (RAG-Token).

    Args:
        weights: Weights of the demonstrations, K numbers above 0, which are divided by their sum.
        log_probs: Log-probability of each token of the answer after each demonstration, (K, T).
    """
    log_weights = np.log(np.asarray(weights) / np.sum(weights))
    return float(np.logaddexp.reduce(log_weights[:, None] + np.asarray(log_probs), axis=0).sum())
