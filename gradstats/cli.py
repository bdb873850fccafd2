"""The command line: ``gradstats info``, ``gradstats bench`` and ``gradstats compare``."""

from __future__ import annotations

import argparse
import ast
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradstats import bench

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with ``argv`` (by default the process's arguments) and return the exit status."""
    parser = argparse.ArgumentParser(prog="gradstats", description="Statistics of task gradients.")
    commands = parser.add_subparsers(dest="command", required=True)
    info_parser = commands.add_parser("info", help="versions, and which kernels are compiled and usable here")
    info_parser.set_defaults(action=lambda _: info())
    bench_parser = commands.add_parser("bench", help="time pairwise beside other ways and what the hardware can do")
    bench_parser.set_defaults(action=bench.run)
    bench.add_arguments(bench_parser)
    _add_compare(commands)
    options = parser.parse_args(argv)
    try:
        print(options.action(options))
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        parser.exit(1, f"gradstats {options.command}: {error}\n")
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


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser("compare", help="train many weightings with many seeds on one experiment")
    parser.set_defaults(action=compare)
    parser.add_argument("experiment", help="digits, tox21, nyuv2, or a Python file with a subclass of Experiment")
    parser.add_argument("--out", type=Path, required=True, help="folder for results; what is there is not run again")
    parser.add_argument("--data", type=Path, help="folder with the experiment's data")
    parser.add_argument(
        "--weightings",
        nargs="+",
        metavar="NAME",
        help='such as slaw or "autoscale(cost=condition)"; by default all that need no options',
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch in each run (1)")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        type=_setting,
        metavar="NAME=VALUE",
        help="settings of the experiment, such as epochs=5",
    )


def _setting(text: str) -> tuple[str, Any]:
    """A Python value where it is one, otherwise text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"expected name=value, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def compare(options: argparse.Namespace) -> str:
    """Do what ``gradstats compare`` does and return what it prints."""
    import gradstats.compare

    results = gradstats.compare.compare(
        options.experiment,
        out=options.out,
        weightings=options.weightings,
        seeds=options.seeds,
        data=options.data,
        settings=dict(options.set),
        jobs=options.jobs,
        threads=options.threads,
    )
    parts = (results.table(), gradstats.compare.NOTES, "\n".join(results.verdicts()), f"All of it is in {options.out}.")
    return "\n\n".join(part.strip() for part in parts)


if __name__ == "__main__":
    raise SystemExit(main())
