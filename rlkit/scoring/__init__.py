"""Running rewards (`rlkit.reward`): load them by name, and keep their failures apart from their scores.

Whatever else happens than a number or None (an exception, a NaN, a text, more seconds than allowed, a dead
process) makes a rollout *invalid with a reason*, which is not a score of 0: a trainer leaves it out of the
loss. Nothing here imports torch.
"""

from rlkit.scoring.batch import Scores
from rlkit.scoring.budget import ErrorBudget
from rlkit.scoring.load import check_columns, load_rewards
from rlkit.scoring.runner import RewardRunner

__all__ = ["ErrorBudget", "RewardRunner", "Scores", "check_columns", "load_rewards"]
