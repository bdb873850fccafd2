"""Statistics of task gradients, and multi-task loss weights chosen from them."""

from gradstats.collect import backward, explain, from_losses, shared_parameters
from gradstats.ops.backends import backends
from gradstats.pairwise import PairwisePlan, pairwise
from gradstats.scalarizer import Scalarizer
from gradstats.stats import GradStats

__version__ = "0.1.0"

__all__ = [
    "GradStats",
    "PairwisePlan",
    "Scalarizer",
    "__version__",
    "backends",
    "backward",
    "explain",
    "from_losses",
    "pairwise",
    "shared_parameters",
]
