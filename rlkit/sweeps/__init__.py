"""Many runs of one config with other keys: a grid, at random, by Optuna; here, on Slurm, by W&B's agents.

A sweep is a folder. `study.journal` (Optuna's) holds the points and their values, `points/NNNN/` what one
point left: `point.json` with its keys, a run directory and a log for each seed, `outcome.json` at its end.
Whoever works on a point needs nothing but the folder, so a sweep can be stopped at any time and continued.
"""
