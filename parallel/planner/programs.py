"""The training programs of this project's engines, as the planner counts them.

What Megatron-Core 0.16 and DeepSpeed 0.19 hold and send was read off their engines here, on two processes, and is
asserted in `tests/parallel/planner/test_engines.py`.
"""

from dataclasses import replace

from parallel.planner.layout import Program, Sharded

BUCKET = 500_000_000  # elements at most that DeepSpeed reduces at once
LIVE = 500_000_000  # elements: parameters needed again within 10^9, there and back, stay gathered (ZeRO-3)
CAST = 6.0  # bytes: an fp32 value read, a 16-bit one written


def torch_program(*, bf16: bool, compiled: bool, chunk: int, muon: bool) -> Program:
    """FSDP2 around the native modules. chunk: tokens whose logits the loss makes at once."""
    program = Program(chunk=chunk, fused=compiled, compiled=compiled, matrix_state=4 if muon else 0)
    return program if bf16 else _in_fp32(program)


def megatron_program(*, bf16: bool, chunk: int) -> Program:
    """Megatron's modules, never compiled, and gradient buffers in fp32, both whole on every data rank; moments are cut
    over them, without a copy of the weights beside. Its own linear layers keep fp32 weights for backward: a 16-bit copy
    lives as long as one product. Those of Transformer Engine, taken where it is installed, are not counted.
    """
    program = Program(
        sharded="state", gathered=4, wire=2, chunk=chunk, overlap=False, fused=False, compiled=False, regather=True,
        casts=CAST,
    )  # fmt: skip
    return program if bf16 else replace(_in_fp32(program), casts=0)


def deepspeed_program(
    *, bf16: bool, compiled: bool, chunk: int, zero: int, persistent: int, parameters: int
) -> Program:
    """ZeRO around the native modules under autocast. From stage 1 on, its own part of the weights once more beside the
    parameters, though these are in fp32 too; stages 1 and 2 all-reduce gradients. parameters: of the model.
    """
    sharded: tuple[Sharded, ...] = ("none", "state", "gradients", "all")
    program = Program(
        sharded=sharded[zero],
        gathered=4,
        state=12 if zero else 8,
        chunk=chunk,
        overlap=zero == 3,
        fused=compiled,
        compiled=compiled,
        copies=2,
        casts=CAST,
        buckets=4.0 * min(BUCKET, parameters) if zero else 0.0,
        scatter=zero == 3,
        flat=zero == 3,
        persistent=persistent if zero == 3 else 0,
        live=LIVE if zero == 3 else 0,
    )
    return program if bf16 else replace(_in_fp32(program), copies=0, casts=0)


def _in_fp32(program: Program) -> Program:
    return replace(program, compute="fp32", gathered=4, wire=4, saved=4)
