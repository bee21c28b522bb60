"""Rows of published runs as shapes, layouts, programs and GPUs of the planner.

What a row does not say is filled by what its training program does (one entry a program in `PROGRAMS`) or by the public
config of its model (`MODELS`); nothing depends on the row's result.
"""

import csv
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from parallel.planner.gpus import GPUS, Gpu
from parallel.planner.layout import Layout, Program, Setting, parts_of
from parallel.planner.shape import LayerShape, Matrix, ModelShape, Parameter, read_shape
from pretrain.models import FAMILIES
from pretrain.models.decoder.config import DecoderConfig

Row = dict[str, str]

# Dims that published configs state and the rows leave out.
MODELS: dict[str, dict[str, float]] = {
    "llama-?2.*7b": {"layers": 32, "hidden": 4096, "ffn": 11008, "heads": 32, "kv_heads": 32, "vocab": 32000},
    "llama-?2.*13b": {"layers": 40, "hidden": 5120, "ffn": 13824, "heads": 40, "kv_heads": 40, "vocab": 32000},
    "llama.*8b": {"layers": 32, "hidden": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8},
    "llama.*70b": {"layers": 80, "hidden": 8192, "ffn": 28672, "heads": 64, "kv_heads": 8},
    "llama.*405b": {"layers": 126, "hidden": 16384, "ffn": 53248, "heads": 128, "kv_heads": 8},
    "gpt.oss.120b": {
        "heads": 64, "kv_heads": 8, "head_dim": 64, "experts": 128, "top_k": 4, "moe_ffn": 2880, "window": 128,
    },
    "qwen3.30b": {"head_dim": 128, "experts": 128, "top_k": 8, "moe_ffn": 768},
    "qwen3.235b": {"head_dim": 128, "experts": 128, "top_k": 8, "moe_ffn": 1536},
    "deepseek.?v3": {"experts": 256, "top_k": 8, "moe_ffn": 2048, "shared": 1, "dense": 3, "mla": 1536},
    "kimi.?k2": {
        "layers": 61, "hidden": 7168, "ffn": 18432, "heads": 64, "kv_heads": 64, "vocab": 163840,
        "experts": 384, "top_k": 8, "moe_ffn": 2048, "shared": 1, "dense": 1, "mla": 1536,
    },
    "moonlight": {
        "hidden": 2048, "ffn": 11264, "heads": 16, "kv_heads": 16, "vocab": 163840,
        "experts": 64, "top_k": 6, "moe_ffn": 1408, "shared": 2, "dense": 1, "mla": 1,
    },
}  # fmt: skip

MEGATRON = Program(
    sharded="state", weight=2, gathered=2, ends=2, gradient=2, reduced=2, state=12, residual=2, wire=2, chunk=0,
    logits=8.0, attention_again=True, tp_overlap=True, native_attention=True, regather=True, keeps_narrow=True,
)  # fmt: skip
PROGRAMS = {
    # FSDP1 under Composer: fp32 parameters, bf16 gathers and reductions, Triton or FA2 attention, eager.
    "llm-foundry": Program(
        weight=4, gathered=2, ends=2, gradient=4, reduced=2, state=8, residual=2, wire=2, chunk=0, fused=False,
        compiled=False,
    ),
    # Megatron-DeepSpeed of 2021: fp16 or bf16, ZeRO-1, scores in memory, no sequence parallelism, no overlap.
    "bigscience": Program(
        sharded="state", weight=2, gathered=2, ends=2, gradient=2, reduced=2, state=16, residual=2, wire=2, flash=False,
        sequence=False, overlap=False, chunk=0, dropout=True, buckets=2e9,
    ),
    # FSDP2: fp32 parameters, bf16 gathers, fp32 reductions; "op" keeps every second product.
    "torchtitan": Program(residual=2, wire=2, ends=2, chunk=0, matmul_share=0.5, compiled=False),
    "megatron-bridge": MEGATRON,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A published run as the planner sees it. tokens_per_s: published, a GPU; memory: GiB; None where not published.
    allocated: memory counts tensors only."""

    row: Row
    setting: Setting
    tokens_per_s: float | None
    memory: float | None
    allocated: bool


def read_runs(path: Path) -> tuple[list[Run], list[tuple[Row, str]]]:
    """Runs of a table, and the rows left out with the reason."""
    runs, left = [], []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                runs.append(to_run(row))
            except LookupError as error:
                left.append((row, str(error.args[0])))
    return runs, left


def to_run(row: Row) -> Run:
    """Raises LookupError with the reason for a row that cannot be used."""
    gpu = _gpu(row)
    dims = _dims(row)
    pp, tp, cp, ep = (int(float(row[k] or 1)) for k in ("pp", "tp", "cp", "ep"))
    gpus = int(float(row["gpus"] or 0))
    if not gpus or gpus % (pp * tp * cp):
        raise LookupError("number of GPUs and degrees do not fit together")
    if "INCONSISTENT" in row["notes"]:
        raise LookupError("inconsistent in its source")
    if not row["tp"] or not row["seq_len"]:
        raise LookupError("layout or sequence length not stated")
    data = gpus // (pp * tp * cp)
    micro = int(float(row["micro_batch"] or 0))
    if not micro:
        raise LookupError("micro-batch not stated")
    shape = _shape(tuple(sorted(dims.items())))
    batch = float(row["global_batch"] or data * micro)
    if row["global_batch_unit"] == "tokens":
        batch /= shape.seq_len
    program, recompute, every = _program(row)
    chunks = re.search(r"VP=(\d+)", row["schedule"])
    layout = Layout(
        pp=pp, dp_shard=data, cp=cp, tp=tp, ep=min(ep, data * cp), micro_batch=micro,
        chunks=int(chunks[1]) if chunks else 1,
        schedule="interleaved1f1b" if chunks else "1f1b", recompute=recompute, recompute_every=every,
        keep="SHARD_GRAD_OP" in row["schedule"], cp_method="ring",
    )  # fmt: skip
    count = len(shape.layers)
    # Stages of even length; where a process has several, which of them it has changes nothing.
    stages = [range(count * rank // pp, count * (rank + 1) // pp) for rank in range(pp)]
    parts = parts_of(shape, stages, pp, layout.schedule)
    setting = Setting(shape, layout, program, gpu, round(batch), parts)
    # Megatron logs what the allocator has given out (mem-max-allocated); others what is taken from the GPU.
    allocated = "allocated" in row["notes"] or row["source"].startswith("megatron")
    return Run(row, setting, _speed(row, setting, gpus), _memory(row), allocated)


def _dims(row: Row) -> dict[str, float]:
    name = f"{row['model']}".lower().replace("_", "-").replace(" ", "-").replace(".", "-")
    known: dict[str, float] = {}
    for pattern, values in MODELS.items():
        if re.search(pattern, name):
            known = values
    dims = dict(known)
    for key in ("layers", "hidden", "ffn", "heads", "kv_heads", "vocab", "seq_len", "params_B"):
        if row[key] and not (key == "ffn" and "experts" in known and "dense" not in known):
            dims[key] = float(row[key])
    dims["gpt"] = bool(re.match("gpt-|mpt|opt|bloom|gpt3", name)) and "experts" not in known
    dims["bias"] = row["source"] == "bigscience" or name.startswith("gpt")
    if "nemotron-3" in name:
        raise LookupError("state-space layers, which the planner does not know yet")
    if "hidden" not in dims or not (row["layers"] or "layers" in dims or row["params_B"]):
        raise LookupError("dims not stated")
    if "experts" not in dims and row["ep"] and int(row["ep"]) > 1:
        raise LookupError("experts' dims not known")
    h, pp = dims["hidden"], int(row["pp"] or 1)
    if "layers" not in dims:  # a layer has 12 h^2 parameters; stages are even
        dims["layers"] = max(1, round(dims["params_B"] * 1e9 / (12 * h * h) / pp)) * pp
    if "heads" not in dims:
        dims["heads"] = 96 if h >= 12288 and h % 96 == 0 else h // 128
    dims.setdefault("kv_heads", dims["heads"])
    dims.setdefault("vocab", 128256 if "llama-3" in name or "llama3" in name else 50304)
    if "ffn" not in dims and "experts" not in dims:
        dims["ffn"] = 4 * h if dims["gpt"] else round(8 * h / 3 / 128) * 128
    if not dims.get("seq_len"):
        raise LookupError("layout or sequence length not stated")
    return dims


@cache
def _shape(items: tuple[tuple[str, float], ...]) -> ModelShape:
    dims = dict(items)
    if "experts" in dims:
        return _expert_shape(dims)
    gpt = bool(dims["gpt"])
    config = DecoderConfig(
        vocab_size=int(dims["vocab"]), hidden=int(dims["hidden"]), layers=int(dims["layers"]), ffn=int(dims["ffn"]),
        heads=int(dims["heads"]), kv_heads=int(dims["kv_heads"]), max_seq_len=int(dims["seq_len"]),
        gated=not gpt, tied=gpt, norm="layer" if gpt else "rms", positions="learned" if gpt else "rope",
        head_dim=int(dims["hidden"] // dims["heads"]), mlp_bias=bool(dims["bias"]), qkv_bias=bool(dims["bias"]),
    )  # fmt: skip
    with torch.device("meta"):
        model = FAMILIES["decoder"].build(config)
    return read_shape(model, FAMILIES["decoder"].plan(config), int(dims["seq_len"]))


def _expert_shape(dims: dict[str, float]) -> ModelShape:
    h, heads, kv = (int(dims[k]) for k in ("hidden", "heads", "kv_heads"))
    d, s = int(dims.get("head_dim", h // heads)), int(dims["seq_len"])
    a = "attention"
    if "mla" in dims:
        q = [Matrix(h, int(dims["mla"]), "sequence", a), Matrix(int(dims["mla"]), heads * 192, "column", "q_attention")]
        if dims["mla"] <= 1:
            q = [Matrix(h, heads * 192, "column", a)]
        up = Matrix(512, heads * 256, "column", "kv_attention")
        attention = [*q, Matrix(h, 576, "sequence", a), up, Matrix(heads * 128, h, "row", "out")]
        qk, v = 192, 128
    else:
        attention = [
            Matrix(h, heads * d, "column", a),
            Matrix(h, kv * d, "key_value", a),
            Matrix(h, kv * d, "key_value", a),
        ]
        attention += [Matrix(heads * d, h, "row", "out")]
        qk = v = d
    layers = []
    for index in range(int(dims["layers"])):
        seen = s / 2
        if dims.get("window") and index % 2 == 0:
            seen = min(seen, dims["window"])
        scores = 6.0 * seen * heads * (qk + v)
        if index < dims.get("dense", 0):
            mlp = _mlp(h, int(dims["ffn"]), 1, 1)
        else:
            mlp = _mlp(h, int(dims["moe_ffn"]), int(dims["experts"]), int(dims["top_k"]))
            if dims.get("shared"):
                mlp += _mlp(h, int(dims["moe_ffn"] * dims["shared"]), 1, 1, "shared")
            mlp.append(Matrix(h, int(dims["experts"]), "sequence", "router"))
        routed = any(m.copies > 1 for m in mlp)
        matrices = (*attention, *mlp)
        parameters = tuple(_parameter(f"m{i}", m) for i, m in enumerate(matrices))
        layers.append(
            LayerShape(
                (*parameters, Parameter("norms", (2 * h,))), matrices, 2, heads, kv, qk, v, scores,
                int(dims["experts"]) if routed else 0, int(dims["top_k"]) if routed else 0,
            )
        )  # fmt: skip
    vocab = int(dims["vocab"])
    first, last = Parameter("embed", (vocab, h), "vocabulary"), Parameter("head", (vocab, h), "head")
    return ModelShape(tuple(layers), (first,), (last,), h, vocab, s, heads, kv)


def _parameter(name: str, m: Matrix) -> Parameter:
    if m.copies == 1:
        return Parameter(name, (m.outputs, m.inputs), m.style)
    name += ".down" if m.style == "row" else ".up"
    return Parameter(name, (m.copies, m.outputs, m.inputs), "experts", True)


def _mlp(h: int, ffn: int, copies: int, active: int, name: str = "mlp") -> list[Matrix]:
    up = [Matrix(h, ffn, "column", name, active, copies) for _ in range(2)]
    return [*up, Matrix(ffn, h, "row", f"{name}.down", active, copies)]


def _gpu(row: Row) -> Gpu:
    text = row["gpu_type"].lower().replace("_", " ")
    if re.search("tpu|v4|v5|v6e|trillium|ironwood", text):
        raise LookupError("on TPUs, which are no GPUs")
    if "500w" in text or "lower tdp" in text:
        return GPUS["h100-500w"]
    for pattern, name in (
        ("gb300", "gb300"), ("gb200", "gb200"), ("b300", "b300"), ("b200", "b200"), ("h200", "h200"), ("h100", "h100"),
        ("a100.*40", "a100-40"), ("a100", "a100-80"), ("mi300x", "mi300x"), ("l40s", "l40s"),
    ):  # fmt: skip
        if re.search(pattern, text):
            gpu = GPUS[name]
            if "jean zay" in text:  # four 100 Gbit/s Omni-Path cards for eight GPUs (IDRIS, Jean Zay's documentation)
                gpu = replace(gpu, network=6.25e9)
            return gpu
    raise LookupError(f"GPU {row['gpu_type']} not known")


def _program(row: Row) -> tuple[Program, str, int]:
    text, schedule = row["precision"].lower(), row["schedule"].lower()
    base = PROGRAMS.get(row["source"])
    if base is None:
        base = PROGRAMS["torchtitan"] if "fsdp" in schedule else MEGATRON
    base = replace(base, compute="fp4" if "fp4" in text else "fp8" if re.search("fp8|float8", text) else "bf16")
    if "pure" in text:  # bf16 parameters, gradients and moments
        base = replace(base, weight=2, gradient=2, state=4)
    if "fp32 grad" in text:
        base = replace(base, gradient=6)
    if "compile" in schedule:
        base = replace(base, compiled=True)
    if row["source"] == "torchtitan":
        base = replace(base, fused="compile" in schedule, tp_overlap="async tp" in schedule + text)
        if "float8 all-gather" in text:
            base = replace(base, gathered=1)
    if row["source"] == "megatron-bridge" and schedule.startswith("fsdp"):
        base = replace(base, sharded="all")
    said = row["activation_ckpt"].lower()
    if "every 2nd" in said:
        return replace(base, matmul_share=1.0), "full", 2
    if row["source"] == "torchtitan" and not said:
        return base, "selective", 1  # the config's default
    return base, "full" if said == "full" else "selective" if "selective" in said else "none", 1


def _speed(row: Row, setting: Setting, gpus: int) -> float | None:
    shape = setting.shape
    if row["tokens_per_s_per_gpu"]:
        return float(row["tokens_per_s_per_gpu"])
    if row["step_time_s"]:
        return setting.global_batch * shape.seq_len / float(row["step_time_s"]) / gpus
    flops = shape.flops_per_token
    if not row["tflops_per_gpu"]:
        return float(row["mfu"]) / 100 * setting.gpu.peak_bf16 / flops if row["mfu"] else None
    if "x4" in row["notes"]:  # hardware FLOPs, Megatron's formula: 96 B s l h^2 (1 + s / 6 h + V / 16 l h)
        h, layers, s = shape.hidden, len(shape.layers), shape.seq_len
        flops = 96.0 * layers * h * h * (1 + s / (6 * h) + shape.vocab / (16 * layers * h))
    scale = 1.03 if "3% low" in row["notes"] else 1.0
    return float(row["tflops_per_gpu"]) * 1e12 * scale / flops


def _memory(row: Row) -> float | None:
    if not row["memory_GiB_per_gpu"]:
        return None
    # Megatron logs 1e9 bytes as a GB; other programs, and nvidia-smi, 2**30.
    return float(row["memory_GiB_per_gpu"]) * (1e9 / 2**30 if row["source"].startswith("megatron") else 1)
