"""Playing a search engine (`simulator-v2`): the tasks on which a simulator is tuned and judged."""

from rlkit.envs.simulator.environment import SimulatorEnvironment

__all__ = ["SimulatorEnvironment"]
