"""Layouts that Megatron-Core cannot have, found before its groups are made."""

from typing import Any

from parallel.context import check_context
from parallel.engine import EngineSpec
from parallel.engines.megatron_facts import MegatronFacts
from parallel.expert import check_experts
from parallel.tensor import check_tensor

OTHER = 'or take engine = "torch", which can'


def chunks_of(spec: EngineSpec, degrees: dict[str, int]) -> int:
    """Pipeline stages of a process."""
    interleaved = degrees["pp"] > 1 and spec.parallel.schedule == "interleaved1f1b"
    return (spec.parallel.stages_per_rank or 2) if interleaved else 1


def check_layout(spec: EngineSpec, facts: MegatronFacts, degrees: dict[str, int]) -> None:
    """Raises ValueError that names the key, what is legal, and who can."""
    cp, tp = degrees["cp"], degrees["tp"]
    check_tensor(spec.plan, tp, spec.seq_len // cp)
    check_experts(spec.plan, degrees["ep"])
    check_context(spec.seq_len, cp, spec.parallel.cp_method, spec.plan.heads, tp)
    _check_tensor_parts(facts, tp)
    _check_pipeline(spec, facts, degrees)
    if degrees["dp_replicate"] > 1 and degrees["dp_shard"] * cp > 1:
        raise ValueError(
            f'engine = "megatron" cannot do parallel.dp_replicate = {degrees["dp_replicate"]} with dp_shard = '
            f"{degrees['dp_shard']} and cp = {cp}: its optimizer is cut over all data ranks or over none; set "
            f"dp_replicate to 1, {OTHER}"
        )
    if any(facts.sparse) and tp > 1 and not spec.parallel.expert_tp:
        raise ValueError(
            f'engine = "megatron" cannot do parallel.expert_tp = false with tp = {tp}: its groups of experts would be '
            f"others than those that checkpoints know; set it to true, {OTHER}"
        )


def _check_tensor_parts(facts: MegatronFacts, tp: int) -> None:
    sizes: dict[str, Any] = {
        "kv_heads": facts.kv_heads,
        "vocab_size": facts.vocab_size,
        "ffn": 0 if all(facts.sparse) else facts.arguments["ffn_hidden_size"],
        "moe.ffn": facts.arguments.get("moe_ffn_hidden_size", 0),
        "moe.shared_ffn": facts.arguments.get("moe_shared_expert_intermediate_size") or 0,
    }
    for key, size in sizes.items():
        if size % tp:
            raise ValueError(
                f'engine = "megatron" cannot cut model.{key} = {size} over parallel.tp = {tp}: it must be a multiple; '
                f"change one of them, {OTHER}"
            )


def _check_pipeline(spec: EngineSpec, facts: MegatronFacts, degrees: dict[str, int]) -> None:
    pp, chunks, layers = degrees["pp"], chunks_of(spec, degrees), len(facts.sparse)
    if pp == 1:
        return
    if chunks == 1 and (spec.parallel.stages_per_rank > 1 or spec.parallel.schedule == "interleaved1f1b"):
        raise ValueError(
            f"parallel.stages_per_rank = {spec.parallel.stages_per_rank} with parallel.schedule = "
            f'"{spec.parallel.schedule}": 1f1b has one stage a process, interleaved1f1b two or more'
        )
    if layers % (pp * chunks):
        raise ValueError(
            f'engine = "megatron" cuts the layers evenly, and model.layers = {layers} is not a multiple of the '
            f"{pp * chunks} stages of parallel.pp = {pp}; change one of them, {OTHER}"
        )
    data = degrees["dp_replicate"] * degrees["dp_shard"]
    number = spec.global_batch // (spec.micro_batch * data)
    if spec.global_batch % (spec.micro_batch * data) or (chunks > 1 and number % pp):
        multiple = spec.micro_batch * data * (pp if chunks > 1 else 1)
        raise ValueError(
            f"train.global_batch = {spec.global_batch} is not a multiple of {multiple}, which micro-batches of "
            f'{spec.micro_batch} on {data} data ranks and parallel.schedule = "{spec.parallel.schedule}" need'
        )
