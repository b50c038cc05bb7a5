"""Hyperparameter sweeps: many runs of one config with other keys.

Points come from a grid, random search or Optuna. They run on this machine, on Slurm or under W&B agents.

A sweep is a folder. `study.journal` is Optuna's journal and holds the points and their values.
`points/NNNN/` holds one point: its keys in `point.json`, a run directory and a log for each seed, and
`outcome.json` once the point has ended. A worker needs nothing but this folder, so a sweep can be stopped at
any time and resumed.
"""
