"""Rewards for short completions, which judge one rollout at a time. Those of a group are in `length_group`.

`length` is L, the tokens of a completion without its end token; `correct` is y, the environment's metric,
which is 1 for a right answer. A reward here either *replaces* the reward for being right, because y is a part
of it, or is *added* to it: each says which.
"""

import math


def l1_exact(length: int, correct: float, budget: float, alpha: float = 0.0003) -> float:
    """y - alpha |budget - L|: as long as the prompt asks for. Replaces the reward for being right.

    The prompt has to name the budget ("Think for n tokens."). LCPO's L1-Exact, code cmu-l3/l1,
    `get_delta_score_linear`; alpha as in its `run_l1_exact.sh`.
    """
    return correct - alpha * abs(budget - length)


def l1_max(length: int, correct: float, budget: float, alpha: float = 0.002) -> float:
    """y (clip(alpha (budget - L), -1, 1) + 1) / 2: at most as long as the prompt asks for. Replaces.

    A right answer gets 1/2 at the budget, 1 at 1/alpha tokens below it and 0 at 1/alpha above. LCPO's L1-Max,
    code cmu-l3/l1, `get_delta_score_linear_both` with `multiplier_reward`.

    Raises:
        ValueError: a budget that is not positive; in that code a negative one stands for this reward.
    """
    if budget <= 0:
        raise ValueError(f"the budget is {budget}: it must be a positive number of tokens")
    return correct * (min(max(alpha * (budget - length), -1.0), 1.0) + 1) / 2


def soft_overlong(length: int, max_length: int, cache: int | None = None) -> float:
    """0 up to max_length - cache, falling to -1 at max_length and beyond. Added to y.

    `cache` is a fifth of max_length unless given, as 4096 of 20480. Soft overlong punishment of DAPO, arXiv
    2503.14476; TRL's `get_soft_overlong_punishment` counts the end token too.

    Raises:
        ValueError: a cache that is not between 1 and max_length.
    """
    cache = max(max_length // 5, 1) if cache is None else cache
    if not 1 <= cache <= max_length:
        raise ValueError(f"the cache is {cache}: it must be at least 1 and at most max_length, {max_length}")
    return -min(max((length - (max_length - cache)) / cache, 0.0), 1.0)


def laser(length: int, correct: float, target: float, bonus: float = 0.5, wrong: float = -0.5) -> float:
    """1 for a right answer, plus `bonus` if L <= target; `wrong` for a wrong one. Replaces.

    LASER, code hkust-nlp/Laser, `verl/utils/reward_score/length_penalty.py`.
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
    """Half a cosine from the value for L = 0 to that for L = max_length and beyond. Replaces.

    A right answer is worth less the longer it is, a wrong one more: thinking on may still help. Code
    huggingface/open-r1, `get_cosine_scaled_reward`, which counts characters.
    """
    short, long = (correct_short, correct_long) if correct >= 1 else (wrong_short, wrong_long)
    progress = min(length / max_length, 1.0)
    return long + (short - long) * (1 + math.cos(math.pi * progress)) / 2


def think_prune(length: int, correct: float, truncated: bool, limit: int | None = None) -> float:
    """y where the completion ended by itself, within `limit` tokens if one is given, else 0. Replaces.

    ThinkPrune states the limit in the prompt and lowers it in stages, from 4000 tokens to 3000 and so on.
    Without `limit` it is the run's `max_completion_length`. Code UCSB-NLP-Chang/ThinkPrune.
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
    """(Lref - L) / L + alpha (y - yref), clipped to [-2, 4]. Replaces.

    Lref and yref are the mean length and accuracy of a reference model on this task, columns that the data
    set must have. O1-Pruner, code StarDewXXX/O1-Pruner, `construct_dataset.py`, where the values are then
    standardised over the data set for an offline loss; here the trainer's own scaling comes after. An empty
    completion counts as one token.
    """
    tokens = max(length, 1)
    shorter = (reference_length - tokens) / tokens
    return min(max(shorter + alpha * (correct - reference_accuracy), -2.0), 4.0)
