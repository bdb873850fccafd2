"""Real data for examples, experiments and tests. Nothing here downloads anything."""

from gradstats.data.digits import OverlaidDigits, overlaid_digits
from gradstats.data.domains import DomainSampler
from gradstats.data.nyuv2 import nyuv2
from gradstats.data.samples import Samples, batches
from gradstats.data.tox21 import tox21

__all__ = ["DomainSampler", "OverlaidDigits", "Samples", "batches", "nyuv2", "overlaid_digits", "tox21"]
