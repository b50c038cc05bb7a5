r"""Math problems with a final answer in `\boxed{}`: generated arithmetic, or any dataset (`math-v1`)."""

from rlkit.envs.math.environment import MathEnvironment

__all__ = ["MathEnvironment"]
