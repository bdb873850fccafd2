"""Real data for examples, tests and benchmarks. Nothing here downloads anything."""

from gradstats.data.digits import OverlaidDigits, overlaid_digits

__all__ = ["OverlaidDigits", "overlaid_digits"]
