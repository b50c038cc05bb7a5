"""Terminal viewer for the rollouts of a run."""
