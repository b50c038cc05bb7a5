"""A run on disk and over time: its directory, checkpoints, records, guards, launch and preemption."""
