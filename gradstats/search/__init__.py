"""Search for fixed loss weights on Ray Tune; needs the extra ``search`` (ray[tune], beside what training needs)."""

import os

# Before Ray is imported: whoever wants to send usage statistics to its makers says so in this variable.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Seconds between notes of where every trial stands: what a killed search loses beside the epochs in progress.
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")

try:
    import ray.tune  # noqa: F401  # whether it is there
except ImportError as error:
    raise ImportError('gradstats.search needs Ray Tune; install it with: pip install "gradstats[search]"') from error

from gradstats.search.searches import Found, grid_search, population_based_training, random_search

__all__ = ["Found", "grid_search", "population_based_training", "random_search"]
