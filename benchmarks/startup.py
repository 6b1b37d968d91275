"""How long the command line takes to answer: --help, and a typo in a recipe.

python benchmarks/startup.py [--rounds 11]
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from results import machine, save

RECIPE = Path(__file__).parents[1] / "recipes" / "tinystories-3m-to-1m.yaml"
CASES = {"--help": (["--help"], 0, 0.3), "a typo in a recipe": (["distill", str(RECIPE), "stepz=1"], 2, 1.0)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    results = {}
    for name, (words, code, bar_s) in CASES.items():
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            done = subprocess.run([Path(sys.executable).parent / "stillroom", *words], capture_output=True, check=False)
            times.append(time.perf_counter() - start)
            assert done.returncode == code, done
        results[name] = {"median_s": statistics.median(times), "max_s": max(times), "bar_s": bar_s}
        print(f"{name:20} median {results[name]['median_s']:.3f} s, slowest {max(times):.3f} s (bar {bar_s} s)")
    save(__file__, {"machine": machine(), "results": results})


if __name__ == "__main__":
    main()
