"""Simulating a search engine (`simulator-v3`): tasks for tuning and evaluating a simulator."""

from rlkit.envs.simulator.environment import SimulatorEnvironment

__all__ = ["SimulatorEnvironment"]
