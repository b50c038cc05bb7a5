"""Browse the rollouts of a run in the terminal."""
