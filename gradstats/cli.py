"""The command line: ``gradstats info``."""

from __future__ import annotations

import argparse
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with ``argv`` (by default the process's arguments) and return the exit status."""
    parser = argparse.ArgumentParser(prog="gradstats", description="Statistics of task gradients.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, and which kernels are compiled and usable here")
    parser.parse_args(argv)
    print(info())
    return 0


def info() -> str:
    """What ``gradstats info`` prints."""
    import torch

    import gradstats

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["none"]
    lines = [
        f"gradstats {gradstats.__version__}",
        f"python    {platform.python_version()}, {platform.machine()}",
        f"torch     {torch.__version__}, CUDA {torch.version.cuda or 'none'}, GPU {', '.join(gpus)}",
        "",
        "backend    tensors on  usable  detail",
    ]
    found = gradstats.backends().values()
    lines += [f"{b.name:9}  {b.devices:10}  {'yes' if b.available else 'no':6}  {b.detail}" for b in found]
    if not any(b.available for b in found if b.name != "reference"):
        lines += ["", "No compiled kernels here: everything runs on the reference backend, which is correct but slow."]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
