"""What a machine with a GPU has to show. Skips visibly without one (exit code 2).

    make gpu-check        (or: python -m tests.bench.gpu_check [--steps 20] [--micro-batch 4] [--skip-kernels])

1. every attention back end against the fp64 reference, forward and gradients; experts in one kernel too, and their
   rate against dense products (tests.bench.gpu_attention, tests.bench.gpu_experts);
2. a 1B dense model (recipe llama3-1b, sequence 4096, bf16, compiled): tokens/s, MFU, peak memory, beside a bare loop
   around transformers' Llama with SDPA (or flash-attn) and compile on the same GPU;
3. bitwise resume;
4. every engine that is installed: the same 20 steps, losses within 1e-3 of each other (`pretrain compare`, fp32).

MFU = model FLOPs (6 per matmul parameter and token, plus causal attention) over the datasheet's dense bf16 peak.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from checkpoints.store import CheckpointStore
from launch.commands.compare import read_result
from parallel.engine import ENGINES, check_installed
from parallel.hardware import device_peak_flops
from parallel.world import World
from pretrain.config import RunConfig, resolve
from pretrain.data import build_tiny_shards
from pretrain.engine import build_engine
from pretrain.objectives import OBJECTIVES
from pretrain.train import train

SEQ_LEN = 4096
WARMUP = 5
MODEL = [f"data.seq_len={SEQ_LEN}", "model.max_seq_len=8192", "model.vocab_size=32768", "objective.document_mask=false"]


def one_billion(micro_batch: int) -> RunConfig:
    batch = [f"train.micro_batch={micro_batch}", f"train.global_batch={micro_batch}"]
    return resolve("llama3-1b", [*MODEL, *batch])[0]


def ours(config: RunConfig, steps: int) -> list[float]:
    device = torch.device("cuda", 0)
    objective = OBJECTIVES["causal"][1](config.objective)
    objective.compile()
    engine = build_engine(config, World(0, 1, device), objective, compiling=True)
    tokens = torch.randint(0, config.model.vocab_size, (config.train.micro_batch, SEQ_LEN + 1))
    batch = objective.collate({"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()})
    print(objective.describe(batch, config.model, "bf16", device))
    count = torch.tensor(tokens[:, 1:].numel(), device=device)

    def step() -> None:
        engine.forward_backward([batch], count)
        engine.clip_grad_norm()
        engine.step(1e-4)

    return timed(step, steps)


def transformers_loop(config: RunConfig, steps: int) -> list[float]:
    import transformers

    m = config.model
    llama = transformers.LlamaConfig(
        vocab_size=m.vocab_size,
        hidden_size=m.hidden,
        intermediate_size=m.ffn,
        num_hidden_layers=m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.num_kv_heads,
        head_dim=m.dim_per_head,
        max_position_embeddings=8192,
        tie_word_embeddings=m.tied,
        attn_implementation="flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa",
    )
    model = torch.compile(transformers.LlamaForCausalLM(llama).cuda())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, m.vocab_size, (config.train.micro_batch, SEQ_LEN), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, steps)


def timed(step: Callable[[], None], steps: int) -> list[float]:
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[WARMUP:]


CANDIDATES = {"ours": ours, "transformers": transformers_loop}


def measure(name: str, micro_batch: int, steps: int) -> None:
    config = one_billion(micro_batch)
    seconds = statistics.median(CANDIDATES[name](config, steps))
    tokens = micro_batch * SEQ_LEN
    flops = (config.model.flops_per_token + config.model.attention_flops_per_token(SEQ_LEN)) * tokens
    peak = device_peak_flops(torch.device("cuda", 0))
    result = {
        "candidate": name,
        "tokens_per_s": round(tokens / seconds),
        "mfu": round(flops / seconds / peak, 4) if peak else None,
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }
    print("RESULT " + json.dumps(result))


def resume_is_bitwise() -> bool:
    small = ["train.steps=8", "train.compile=off", "log.tensorboard=false", "schedule.name=cosine", "schedule.warmup=1"]
    world = World(0, 1, torch.device("cuda", 0))
    torch.use_deterministic_algorithms(True)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_shards(Path(folder) / "data")
        shards = f'data.sources=[{{shards="{folder}/data/train-*.tar"}}]'
        for name, stops in (("whole", [8]), ("halves", [4, 8])):
            for stop in stops:
                config, _ = resolve("tiny", [*small, shards, f"run.dir={folder}/{name}", f"train.stop_at={stop}"])
                train(config, world)
        stores = [CheckpointStore(Path(folder) / name / "checkpoints") for name in ("whole", "halves")]
        files = [sorted((store.folder / "step-00000008").rglob("*.safetensors")) for store in stores]
        return [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def engines_agree(steps: int = 20) -> bool:
    """The recipe `tiny` under each engine that is installed, on one device."""
    names = []
    for name in ENGINES:
        try:
            check_installed(name)
            names.append(name)
        except ValueError as error:
            print(f"engine {name} is left out: {error}")
    with tempfile.TemporaryDirectory() as folder:
        words = ["--engines", ",".join(names), "--steps", str(steps), "--nproc", "1", "--out", f"{folder}/engines"]
        command = [sys.executable, "-m", "launch.cli", "compare", "tiny", "train.precision=fp32", *words]
        if subprocess.run(command, check=False).returncode:
            return False
        first, *others = (read_result(name, Path(folder) / "engines" / name, 0.0).losses for name in names)
    worst = max((abs(other[step] / loss - 1) for other in others for step, loss in first.items()), default=0.0)
    print(f"losses of {', '.join(names)} differ by {worst:.1e} at most")
    return worst < 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--skip-kernels", action="store_true")
    parser.add_argument("--only", choices=CANDIDATES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: skipped, torch sees no GPU here")
        return 2
    if args.only:
        measure(args.only, args.micro_batch, args.steps)
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    failures = 0
    here = [sys.executable, "-m"]
    for kernels in () if args.skip_kernels else ("gpu_attention", "gpu_experts"):
        failures += subprocess.run([*here, f"tests.bench.{kernels}"], check=False).returncode != 0
    for name in CANDIDATES:  # a process each, so that neither sees the other's memory or caches
        command = [*here, "tests.bench.gpu_check", "--only", name, "--steps", str(args.steps)]
        failures += subprocess.run([*command, "--micro-batch", str(args.micro_batch)], check=False).returncode != 0
    same = resume_is_bitwise()
    print(f"bitwise resume: {'yes' if same else 'NO'}")
    agree = engines_agree()
    return int(failures > 0 or not same or not agree)


if __name__ == "__main__":
    sys.exit(main())
