"""Scoring: load rewards (`rlkit.reward`) by name, and run them so that a failure never looks like a score.

Nothing here imports torch.
"""

from rlkit.scoring.batch import Scores
from rlkit.scoring.budget import ErrorBudget
from rlkit.scoring.load import check_columns, load_rewards
from rlkit.scoring.runner import RewardRunner

__all__ = ["ErrorBudget", "RewardRunner", "Scores", "check_columns", "load_rewards"]
