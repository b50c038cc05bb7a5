r"""Problems whose answer stands in `\boxed{}`: arithmetic of our own, or any data set (`math-v1`)."""

from rlkit.envs.math.environment import MathEnvironment

__all__ = ["MathEnvironment"]
