"""All CPU benchmarks, one after the other: `make bench`. Each can be run alone with options; see its docstring."""

import subprocess
import sys

BENCHES = (
    "bench_train",
    "bench_parallel",
    "bench_engines",
    "bench_moe",
    "bench_start",
    "bench_loader",
    "bench_build",
    "bench_export",
    "bench_checkpoint",
    "bench_images",
)

if __name__ == "__main__":
    failed = []
    for name in BENCHES:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"tests.bench.{name}"], check=False).returncode:
            failed.append(name)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
