"""Weightings: policies from losses and Gramian to one weight per task, by name.

Every method of the public record that is a function of the Gramian, of the losses and of a small state has a name here.
GradDrop and ExcessMTL have none: they work on the signs and squares of single entries of the gradients, which no
weighting sees.
"""

from __future__ import annotations

import inspect
from typing import Any

from gradstats.weighting.autoscale import AutoScale, WindowReport
from gradstats.weighting.base import Facts, Weighting
from gradstats.weighting.constant import Fixed, Uniform
from gradstats.weighting.gram_based import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    ExactSLW,
    FairGrad,
    NashMTL,
    UPGrad,
)
from gradstats.weighting.learned import FAMO, IMTL, IMTLL, UW, GradNorm
from gradstats.weighting.loss_based import COSMOS, DBMTL, DWA, GLS, PBI, RLW, STCH, GO4Align
from gradstats.weighting.slaw import SLAW
from gradstats.weighting.smoothed import CRMOGM
from gradstats.weighting.surgery import GradVac, PCGrad
from gradstats.weighting.two_batch import MoDo, SDMGrad
from gradstats.weighting.unequal import PCD, Krum

_BY_NAME: dict[str, type[Weighting]] = {
    "uniform": Uniform,
    "fixed": Fixed,
    "autoscale": AutoScale,
    "slaw": SLAW,
    "uw": UW,
    "dwa": DWA,
    "rlw": RLW,
    "gls": GLS,
    "famo": FAMO,
    "stch": STCH,
    "cosmos": COSMOS,
    "pbi": PBI,
    "imtl": IMTL,
    "imtl_l": IMTLL,
    "gradnorm": GradNorm,
    "db_mtl": DBMTL,
    "go4align": GO4Align,
    "exact_slw": ExactSLW,
    "mgda": MGDA,
    "pcgrad": PCGrad,
    "gradvac": GradVac,
    "cagrad": CAGrad,
    "imtl_g": IMTLG,
    "nash_mtl": NashMTL,
    "fairgrad": FairGrad,
    "aligned_mtl": AlignedMTL,
    "upgrad": UPGrad,
    "dualproj": DualProj,
    "config": ConFIG,
    "sdmgrad": SDMGrad,
    "modo": MoDo,
    "pcd": PCD,
    "krum": Krum,
    "cr_mogm": CRMOGM,
}

__all__ = [
    "COSMOS",
    "CRMOGM",
    "DBMTL",
    "DWA",
    "FAMO",
    "GLS",
    "IMTL",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "PBI",
    "PCD",
    "RLW",
    "SLAW",
    "STCH",
    "UW",
    "AlignedMTL",
    "AutoScale",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "ExactSLW",
    "Facts",
    "FairGrad",
    "Fixed",
    "GO4Align",
    "GradNorm",
    "GradVac",
    "Krum",
    "MoDo",
    "NashMTL",
    "PCGrad",
    "SDMGrad",
    "UPGrad",
    "Uniform",
    "Weighting",
    "WindowReport",
    "available",
    "create",
    "facts",
    "options",
]


def available() -> tuple[str, ...]:
    """Names that :func:`create` knows."""
    return tuple(_BY_NAME)


def facts(name: str) -> Facts:
    """What the documentation says of the weighting called ``name``."""
    return _BY_NAME[name].FACTS


def options(name: str) -> dict[str, inspect.Parameter]:
    """What :func:`create` takes for the weighting called ``name``, beside the number of tasks."""
    _num_tasks, *parameters = inspect.signature(_BY_NAME[name]).parameters.items()
    return dict(parameters)


def create(name: str, num_tasks: int, **options: Any) -> Weighting:
    """Make the weighting called ``name`` for ``num_tasks`` tasks; ``options`` are those of its class.

    Raises:
        ValueError: If there is no weighting of that name, or an option has a wrong value.
        TypeError: If the weighting has no such option, or a required one is missing.
    """
    if name not in _BY_NAME:
        raise ValueError(f"weighting: expected one of {', '.join(_BY_NAME)}, got {name!r}")
    return _BY_NAME[name](num_tasks, **options)
