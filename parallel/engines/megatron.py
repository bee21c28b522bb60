"""The Megatron-Core engine: its GPTModel, parallel state, schedules, DistributedDataParallel and distributed optimizer.

Model facts, initial weights, data, loss and the meaning of a step are those of the native engine; so are the names and
shapes of what is saved. Sequence parallelism is always on with tensor parallelism. Nothing of Megatron's averages: the
loss is divided by the global count of targets before backward, and gradients are summed.
"""

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from torch import Tensor, nn

from parallel.context import apply_context, split_sequence
from parallel.engine import Batch, EngineSpec, Sums
from parallel.engines.megatron_checks import check_layout, chunks_of
from parallel.engines.megatron_facts import MegatronFacts
from parallel.engines.megatron_host import on_host
from parallel.engines.megatron_model import Chunk, make_config
from parallel.engines.megatron_optimizer import SharedOptimizer, WholeOptimizer
from parallel.engines.megatron_weights import Places, entries_of, initialise_weights
from parallel.expert import Routers, share_routing
from parallel.materialise import named_tensors
from parallel.mesh import Mesh, resolve_degrees
from parallel.parallelize import modules_on_meta
from parallel.remat import apply_remat
from parallel.world import World

# What Megatron 0.16 does on purpose, or cannot know of newer torch; said anew on every rank.
NOISE = (
    "full scope is deprecated",
    ".*is deprecated. Please use `torch.distributed",
    "The .grad attribute of a Tensor that is not a leaf",
)


class MegatronEngine:
    """See `parallel.engine.Engine`. One at a time in a process: Megatron keeps its groups in global variables."""

    def __init__(self, spec: EngineSpec, world: World):
        for noise in NOISE:
            warnings.filterwarnings("ignore", noise)
        self.spec, self.device = spec, world.device
        self.facts: MegatronFacts = spec.options["facts"]
        self.degrees = degrees = resolve_degrees(spec.parallel, world.size)
        check_layout(spec, self.facts, degrees)
        cp, tp = degrees["cp"], degrees["tp"]
        self.data_world = degrees["dp_replicate"] * degrees["dp_shard"]
        self.copies = world.size // self.data_world  # processes that read the same data
        self.data_rank = world.rank // (cp * tp) % self.data_world
        self._split = partial(split_sequence, dim=1, rank=world.rank // tp % cp, cp=cp, method=spec.parallel.cp_method)
        self._cut = spec.sequence if cp > 1 else ()
        self.mesh = Mesh(degrees, world.device.type) if world.size > 1 else None
        self._own_group = not dist.is_initialized()
        if self._own_group:
            dist.init_process_group(
                "gloo" if self.device.type == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1
            )
        with on_host():
            self._start_groups()
            self._build()

    def forward_backward(self, microbatches: list[Batch], count: Tensor) -> Sums:
        totals: Sums = {}
        batches = [self._to_device(batch) for batch in microbatches]
        self._routers.begin(1 / count)
        with on_host(), self._autocast():
            for model in self._models:
                model.zero_grad_buffer()
            iterators = [iter(batches) for _ in self._models]
            get_forward_backward_func()(
                forward_step_func=partial(self._forward_step, totals, count),
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self._models if len(iterators) > 1 else self._models[0],
                num_microbatches=len(batches),
                seq_length=self.spec.seq_len,
                micro_batch_size=self.spec.micro_batch,
            )
            finalize_model_grads(self._models, None)
        sums = {name: value / count for name, value in self._reduce(totals, microbatches[0]).items()}
        return sums | self._routers.collect(count)

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[Batch]) -> Sums:
        totals: Sums = {}
        like: Batch | None = None
        for batch in microbatches:
            like = self._to_device(batch)
            with on_host(), self._autocast():
                self._run_stages(like, totals)
        if like is None:
            raise ValueError("no micro-batch was given: the data has fewer samples than one micro-batch needs")
        return self._reduce(totals, like)

    def gradients(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for entry in self.optimizer.entries:
            found |= self._wrapped(entry, self.optimizer.whole_gradient)
        return found

    def clip_grad_norm(self) -> Tensor:
        return self.optimizer.clip(self.spec.clip_grad_norm)

    def step(self, lr: float) -> None:
        with on_host():
            self.optimizer.step(lr)
        self._routers.settle()

    def sum_over_data(self, values: Tensor) -> Tensor:
        values = values.to(self.device, non_blocking=True)
        dist.all_reduce(values)
        return -(-values // self.copies)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        model: dict[str, Tensor] = {}
        optimizer: dict[str, Tensor] = {}
        for entry in self._entries:
            model |= self._wrapped(entry, Tensor.detach)
        for entry in self.optimizer.entries:
            optimizer |= self.optimizer.state_of(entry)
        return {"model": model, "optimizer": optimizer | self._routers.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        steps = {float(value) for name, value in state["optimizer"].items() if name.startswith("step.")}
        if len(steps) > 1:
            raise ValueError(
                "the checkpoint's parameters have not all taken the same number of optimizer steps, but Megatron's "
                'optimizer counts one number for many; take engine = "torch"'
            )
        for entry in self._entries:
            named = {self._tied.get(name, name): name for name in entry.ours}
            parts = {own: self._places.part(state["model"][name]) for name, own in named.items()}
            entry.fill(lambda tensor: tensor, parts)
        with on_host():
            for entry in self.optimizer.entries:
                self.optimizer.load(entry, state["optimizer"])

    @property
    def ties(self) -> dict[str, str]:
        return dict(self._tied)

    def close(self) -> None:
        parallel_state.destroy_model_parallel()
        for group in self._groups:  # Megatron forgets them, and each keeps threads
            dist.destroy_process_group(group)
        del self._models, self.optimizer, self._groups
        gc.collect()  # what Megatron makes points at itself
        if self._own_group:
            dist.destroy_process_group()

    def _start_groups(self) -> None:
        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
        degrees, chunks = self.degrees, chunks_of(self.spec, self.degrees)
        known = set(dist.distributed_c10d._world.pg_map)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=degrees["tp"],
            pipeline_model_parallel_size=degrees["pp"],
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            context_parallel_size=degrees["cp"],
            expert_model_parallel_size=degrees["ep"],
            expert_tensor_parallel_size=degrees["tp"],
            create_gloo_process_groups=False,
        )
        self._groups = [group for group in dist.distributed_c10d._world.pg_map if group not in known]
        # No dropout, so no random state of its own: the tracker that tracks none.
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)

    def _build(self) -> None:
        spec, degrees = self.spec, self.degrees
        with torch.device("meta"):
            native: Any = spec.build()
        shapes = {name: tensor.shape for name, tensor in named_tensors(native)[0].items()}
        self._tied = dict(spec.plan.tied)
        shapes |= {copy: shapes[original] for copy, original in self._tied.items() if original in shapes}
        chunks = self._make_chunks()
        self._places = Places(self.mesh, degrees["ep"])
        self._entries = [
            entry for chunk in chunks for entry in entries_of(chunk, chunk.numbers, self.facts, shapes, degrees["tp"])
        ]
        initialise_weights(self._entries, self._places, native.init_parameter, spec.seed, self._tied)
        sharded = degrees["dp_shard"] * degrees["cp"] > 1 and spec.precision != "fp64"
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=sharded, overlap_grad_reduce=False)
        self._models = [
            DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
        last = [entry for entry in self._entries if degrees["pp"] > 1 and set(entry.ours) & set(self._tied)]
        kind = SharedOptimizer if sharded else WholeOptimizer
        self.optimizer = kind(spec, self._models, self._entries, last, self._places)
        held = _Held(chunks, self.facts)
        self._routers = Routers(modules_on_meta(spec, spec.plan.routing), [held], spec.plan.experts, self.device)  # type: ignore[list-item]
        if self.mesh is not None and any(True for _ in held.named_modules()):
            share_routing(held, spec.plan, self.mesh)  # type: ignore[arg-type]

    def _make_chunks(self) -> list[Chunk]:
        spec, degrees, facts = self.spec, self.degrees, self.facts
        pp, number = degrees["pp"], chunks_of(self.spec, self.degrees)
        config = make_config(facts, degrees, number, spec.precision)
        rank = parallel_state.get_pipeline_model_parallel_rank()
        layers = config.num_layers // (pp * number)
        mesh = None if self.mesh is None else self.mesh["tp"]
        chunks = []
        for index in range(number):
            stage = index * pp + rank
            held = range(stage * layers, (stage + 1) * layers)
            first, last = stage == 0, stage == pp * number - 1
            chunk = Chunk(
                facts, config, held, first=first, last=last, chunk=index if number > 1 else None, mesh=mesh
            ).to(self.device, config.params_dtype)  # norms and routers are ours: fp32 as built
            for layer, block in zip(held, chunk.decoder.layers, strict=True):
                if self.mesh is not None:
                    apply_context(
                        block.self_attention.core_attention.inner.core, self.mesh["cp"], spec.parallel.cp_method
                    )
                if layer % spec.recompute_every == 0:
                    apply_remat(block, spec.recompute)
            chunks.append(chunk)
        return chunks

    def _forward_step(
        self, totals: Sums, count: Tensor, iterator: Iterator[Batch], model: Any
    ) -> tuple[Tensor, Callable[[Tensor], Any] | None]:
        """What Megatron's schedules call for each micro-batch and chunk."""
        batch = next(iterator)
        chunk = model.module
        hidden = self.spec.forward(chunk, batch, None)

        def loss(hidden: Tensor) -> tuple[Tensor, Tensor, Sums]:
            sums = self.spec.loss(chunk, hidden, batch)
            _add(totals, sums)
            return sums["loss"] / count, torch.zeros((), dtype=torch.int), {}

        return hidden, loss if chunk.post_process else None

    def _run_stages(self, batch: Batch, totals: Sums) -> None:
        """A micro-batch through all stages, forward alone."""
        pp, rank = self.degrees["pp"], parallel_state.get_pipeline_model_parallel_rank()
        rows, length = batch[self.spec.sequence[0]].shape
        shape = (length // self.degrees["tp"], rows, self.spec.plan.hidden)
        for stage in range(pp * len(self._models)):
            if stage % pp != rank:
                continue
            model = self._models[stage // pp]
            if stage:
                received = torch.empty(shape, dtype=model.module.config.params_dtype, device=self.device)
                dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
                model.module.set_input_tensor(received)
            hidden = self.spec.forward(model.module, batch, None)
            if model.module.post_process:
                _add(totals, self.spec.loss(model.module, hidden, batch))
            else:
                dist.send(hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())

    def _wrapped(self, entry: Any, values: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        parts = entry.split(values)
        return {self._tied.get(name, name): self._places.wrap(entry, name, part) for name, part in parts.items()}

    def _autocast(self) -> AbstractContextManager[Any]:
        """Around backward too: Megatron's own products in it are not recorded by autograd."""
        if self.spec.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def _to_device(self, batch: Batch) -> Batch:
        mine = {name: self._split(value) if name in self._cut else value for name, value in batch.items()}
        return {name: value.to(self.device, non_blocking=True) for name, value in mine.items()}

    def _reduce(self, sums: Sums, like: Batch) -> Sums:
        """Over all processes, each token once; the last stages have them."""
        zeros = torch.zeros_like(like["sums"]) if "sums" in like else torch.zeros((), device=self.device)
        if self.spec.precision == "fp64" and "sums" not in like:
            zeros = zeros.double()
        stacked = torch.stack([sums.get(name, zeros).to(zeros) for name in self.spec.sums])
        if parallel_state.get_tensor_model_parallel_rank():
            stacked = torch.zeros_like(stacked)
        dist.all_reduce(stacked)
        return dict(zip(self.spec.sums, stacked.unbind(), strict=True))


class _Held:
    """The routing modules here by the names that they have in our model, as a module tells of its own."""

    def __init__(self, chunks: list[Chunk], facts: MegatronFacts):
        self._found = {
            f"{facts.layers}.{number}.{facts.routing}": block.mlp.router.inner.routing
            for chunk in chunks
            for number, block in zip(chunk.numbers, chunk.decoder.layers, strict=True)
            if facts.sparse[number]
        }

    def named_modules(self) -> Iterable[tuple[str, nn.Module]]:
        return self._found.items()


def _add(totals: Sums, sums: Sums) -> None:
    for name, value in sums.items():
        totals[name] = totals[name] + value.detach() if name in totals else value.detach()
