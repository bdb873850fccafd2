"""``gradstats bench``, with results and picture where the documents have them. It takes the same options.

python -m benchmarks.pairwise --threads 1 2    # on a machine that does nothing else
python benchmarks/render.py                    # then makes the tables
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from gradstats.cli import main

ROOT = Path(__file__).parents[1]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    known, options = parser.parse_known_args()
    name = f"bench_{known.device}"
    files = ["--out", f"{ROOT}/benchmarks/results/{name}.json", "--picture", f"{ROOT}/docs/images/{name}.png"]
    raise SystemExit(main(["bench", "--device", known.device, *files, *options]))
