"""A run that takes a second: overrides of recipe `tiny`."""

from pathlib import Path

SMALL = [
    "model.layers=2",
    "model.hidden=48",
    "model.heads=3",
    "model.kv_heads=1",
    "model.ffn=96",
    "data.seq_len=64",
    "train.global_batch=8",
    "train.micro_batch=4",
    "train.compile=off",
    "log.tensorboard=false",
    "schedule.name=cosine",
    "schedule.warmup=1",
]


def small_overrides(run_dir: Path, shards: Path) -> list[str]:
    """Of a small run in `run_dir` on the shards in a folder."""
    return [*SMALL, f'data.sources=[{{shards="{shards}/train-*.tar"}}]', f"run.dir={run_dir}"]
