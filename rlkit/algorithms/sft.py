"""Supervised fine-tuning on TRL's trainer, with checkpoints that are known to be whole."""

import trl

from rlkit.state import Checkpoints


class SFTTrainer(Checkpoints, trl.SFTTrainer):
    """TRL's SFTTrainer; nothing in it remembers but what transformers saves."""
