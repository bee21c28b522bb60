"""Seconds from the command to the first finished step of recipe bench-12m, in a fresh process each.

    python -m tests.bench.bench_start [--rounds 3]

"warm compile" has filled the compile cache with one run before. The run has one step, and its line in metrics.jsonl is
what is waited for.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pretrain.data import build_tiny_shards

AIMS = {"eager": 4.0, "warm compile": 7.0}


def seconds_to_first_step(folder: Path, name: str, compiled: bool) -> float:
    run_dir = folder / name
    command = [sys.executable, "-m", "launch.cli", "run", "bench-12m", f"run.dir={run_dir}", "train.steps=1"]
    command += [
        f"train.compile={'on' if compiled else 'off'}",
        f'data.sources=[{{shards="{folder}/data/train-*.tar"}}]',
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    start = time.perf_counter()
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            metrics = run_dir / "metrics.jsonl"
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None or time.perf_counter() - start > 300:
                    raise RuntimeError((folder / f"{name}.log").read_text()[-2000:])
                time.sleep(0.02)
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_tiny_shards(folder / "data")
        print(f"cold or warm, as found: {seconds_to_first_step(folder, 'fill', True):.1f} s with compile")
        for label, compiled in (("eager", False), ("warm compile", True)):
            found = [seconds_to_first_step(folder, f"{label}-{turn}", compiled) for turn in range(rounds)]
            print(f"{label:14} median {statistics.median(found):.2f} s, min {min(found):.2f} (aim {AIMS[label]})")


if __name__ == "__main__":
    main()
