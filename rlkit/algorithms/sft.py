"""Supervised fine-tuning on TRL's trainer, with checkpoints that are known to be whole."""

from typing import Any

import trl

from rlkit.state import Checkpoints, Stateful


class SFTTrainer(Checkpoints, trl.SFTTrainer):
    """TRL's SFTTrainer, which forgets how many tokens it has seen when it is resumed."""

    def stateful(self) -> dict[str, Stateful]:
        """The number of tokens so far."""
        return {"tokens": Tokens(self)}


class Tokens:
    """TRL's count of the tokens trained on, logged as `num_tokens`."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """The count; TRL keeps an int, or a tensor after its first step."""
        return {"count": int(self.trainer._total_train_tokens)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.trainer._total_train_tokens = state["count"]
