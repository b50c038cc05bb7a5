"""The life of a run: its directory, checkpoints, rollout records, guards, launch and preemption."""
