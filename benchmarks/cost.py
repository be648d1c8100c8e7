"""How far speed ratios between models repeat: `secateur cost` twice, and the ratios of the two runs side by side.

    python benchmarks/cost.py FULL CUT [CUT ...] [--rounds 10] [--thorough]

Each run is a process of its own. The first model is what the others are divided by. Tells the load of the machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from secateur.results import CostRow, Costs, load

TIMES = {
    "short texts per second": lambda row: row.texts_per_second,
    "long texts per second": lambda row: row.long_texts_per_second,
    "latency, 1 / p50": lambda row: 1 / row.latency_p50,
}


def main() -> None:
    args = arguments()
    runs = [run(args), run(args)]
    reference = runs[0][0].model
    print(f"{'speed against ' + reference:40} {'run 1':>8} {'run 2':>8} {'apart':>8}")
    worst = 0.0
    for first, second in list(zip(*runs, strict=True))[1:]:
        for name, speed in TIMES.items():
            ratios = [speed(row) / speed(rows[0]) for row, rows in zip((first, second), runs, strict=True)]
            apart = abs(ratios[1] / ratios[0] - 1)
            worst = max(worst, apart)
            print(f"{first.model + ', ' + name:40} {ratios[0]:8.3f} {ratios[1]:8.3f} {apart:8.1%}")
    print(f"largest difference {worst:.1%}; {os.cpu_count()} cores, {runs[0][0].threads} threads")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="model folders, the one to divide by first")
    parser.add_argument("--rounds", type=int, default=10, help="timed repetitions of each run")
    parser.add_argument("--thorough", action="store_true")
    return parser.parse_args()


def run(args: argparse.Namespace) -> list[CostRow]:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "secateur", "cost", *map(str, args.models), "-o", out]
        command += ["--repetitions", str(args.rounds), *(["--thorough"] if args.thorough else [])]
        before = os.getloadavg()[0]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        print(f"load average {before:.1f} before the run, {os.getloadavg()[0]:.1f} after")
        return list(load(Path(out), Costs).rows)


if __name__ == "__main__":
    main()
