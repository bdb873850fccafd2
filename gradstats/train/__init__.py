"""Reference trainer on Lightning Fabric; needs the extra ``train`` (lightning and tqdm)."""

try:
    import lightning.fabric  # noqa: F401  # whether it is there
    import tqdm  # noqa: F401  # whether it is there
except ImportError as error:
    raise ImportError(
        'gradstats.train needs Lightning Fabric and tqdm; install them with: pip install "gradstats[train]"'
    ) from error

from gradstats.train.history import History
from gradstats.train.trainer import Trainer

__all__ = ["History", "Trainer"]
