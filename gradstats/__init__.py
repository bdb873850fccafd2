"""Statistics of task gradients, and multi-task loss weights chosen from them."""

from gradstats.ops.backends import backends
from gradstats.pairwise import pairwise
from gradstats.stats import GradStats

__version__ = "0.1.0"

__all__ = ["GradStats", "__version__", "backends", "pairwise"]
