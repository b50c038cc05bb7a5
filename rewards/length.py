"""Rewards for short completions that score one rollout at a time. See `length_group` for rewards of a group.

`length` is L, the number of completion tokens without the EOS token. `correct` is y, the value of the
environment's metric, which is 1 for a correct answer. A reward either *replaces* the correctness reward,
because y is a part of it, or is *added* to it, as its docstring states.
"""

import math


def l1_exact(length: int, correct: float, budget: float, alpha: float = 0.0003) -> float:
    """Return y - alpha |budget - L|, for a completion of exactly the length in the prompt. Replaces y.

    The prompt must state the budget ("Think for n tokens."). This is L1-Exact of LCPO, code cmu-l3/l1,
    `get_delta_score_linear`; alpha is that of its `run_l1_exact.sh`.
    """
    return correct - alpha * abs(budget - length)


def l1_max(length: int, correct: float, budget: float, alpha: float = 0.002) -> float:
    """Return y (clip(alpha (budget - L), -1, 1) + 1) / 2, for at most the length in the prompt. Replaces y.

    A correct answer gets 1/2 at the budget, 1 from 1/alpha tokens below it and 0 from 1/alpha tokens above.
    This is L1-Max of LCPO, code cmu-l3/l1, `get_delta_score_linear_both` with `multiplier_reward`.

    Raises:
        ValueError: The budget is not positive. In the original code, a negative budget selects L1-Max.
    """
    if budget <= 0:
        raise ValueError(f"budget must be a positive number of tokens, not {budget}")
    return correct * (min(max(alpha * (budget - length), -1.0), 1.0) + 1) / 2


def soft_overlong(length: int, max_length: int, cache: int | None = None) -> float:
    """Return 0 up to max_length - cache tokens, then fall linearly to -1 at max_length. Added to y.

    `cache` defaults to a fifth of max_length, as in the paper: 4096 of 20480. This is the soft overlong
    punishment of DAPO, arXiv 2503.14476; TRL's `get_soft_overlong_punishment` also counts the EOS token.

    Raises:
        ValueError: `cache` is not between 1 and max_length.
    """
    cache = max(max_length // 5, 1) if cache is None else cache
    if not 1 <= cache <= max_length:
        raise ValueError(f"cache must be between 1 and max_length ({max_length}), not {cache}")
    return -min(max((length - (max_length - cache)) / cache, 0.0), 1.0)


def laser(length: int, correct: float, target: float, bonus: float = 0.5, wrong: float = -0.5) -> float:
    """Return 1 for a correct answer, plus `bonus` if L <= target; `wrong` for a wrong answer. Replaces y.

    This is LASER, code hkust-nlp/Laser, `verl/utils/reward_score/length_penalty.py`.
    """
    if correct < 1:
        return wrong
    return 1.0 + (bonus if length <= target else 0.0)


def cosine(
    length: int,
    correct: float,
    max_length: int,
    *,
    correct_short: float = 1.0,
    correct_long: float = 0.5,
    wrong_short: float = -1.0,
    wrong_long: float = -0.5,
) -> float:
    """Interpolate along a half cosine from the value at L = 0 to that at L >= max_length. Replaces y.

    A correct answer is worth less the longer it is. A wrong answer is worth more, because more thinking may
    still help. Code huggingface/open-r1, `get_cosine_scaled_reward`, which counts characters.
    """
    short, long = (correct_short, correct_long) if correct >= 1 else (wrong_short, wrong_long)
    progress = min(length / max_length, 1.0)
    return long + (short - long) * (1 + math.cos(math.pi * progress)) / 2


def think_prune(length: int, correct: float, truncated: bool, limit: int | None = None) -> float:
    """Return y if the completion is not truncated and has at most `limit` tokens, else 0. Replaces y.

    ThinkPrune states the limit in the prompt and lowers it in stages, from 4000 tokens to 3000 and so on.
    Without `limit`, only the run's `max_completion_length` applies. Code UCSB-NLP-Chang/ThinkPrune.
    """
    finished = not truncated and (limit is None or length <= limit)
    return float(correct) if finished else 0.0


def o1_pruner(
    length: int,
    correct: float,
    reference_length: float,
    reference_accuracy: float,
    alpha: float = 5.0,
) -> float:
    """Return (Lref - L) / L + alpha (y - yref), clipped to [-2, 4]. Replaces y.

    Lref and yref are the mean length and accuracy of a reference model on this task; the dataset must have
    columns for them. This is O1-Pruner, code StarDewXXX/O1-Pruner, `construct_dataset.py`. That code then
    standardizes the values over the dataset for an offline loss; here the trainer scales the rewards. An
    empty completion counts as one token.
    """
    tokens = max(length, 1)
    shorter = (reference_length - tokens) / tokens
    return min(max(shorter + alpha * (correct - reference_accuracy), -2.0), 4.0)
