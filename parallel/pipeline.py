"""Pipeline parallelism: stages of the model on different processes, micro-batches passing through them.

The schedules are those of `torch.distributed.pipelining`. Sources: GPipe, Huang et al. 2019 (arXiv:1811.06965); 1F1B
and interleaved, Narayanan et al. 2021 (arXiv:2104.04473); zero bubble, Qi et al. 2024 (arXiv:2401.10241); breadth
first, Lamy-Poirier 2023 (arXiv:2211.05953); DualPipe, DeepSeek-AI 2024 (arXiv:2412.19437).
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import count as count_up
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from parallel.fsdp import widen_gradients
from parallel.gradients import local
from parallel.pipeline_cut import owner_of, schedule_class, stages_of

Batch = dict[str, Any]
Sums = dict[str, Tensor]


class Pipeline:
    """The stages of this process, and how micro-batches run through all of them.

    modules: stage index -> module, called as `module(batch, x)`, x the output of the stage before, None in the first
    stage; gives hidden states, and the sums of the loss in the last stage. num_stages: of all processes together.
    group: the processes of one pipeline, in order. hidden_shape: micro-batch -> shape of what goes from stage to
    stage, of `dtype`. sums: names of the sums. context: made anew around each forward (autocast). split_backward:
    let zero-bubble schedules defer the weights' part of backward; not for compiled or recomputing modules, whose
    backward is one piece and would run twice.

    With FSDP the module is the root of its own sharding: parameters stay gathered through the step, and gradients are
    reduced once, at its end.
    """

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        *,
        schedule: str,
        num_stages: int,
        group: dist.ProcessGroup,
        device: torch.device,
        hidden_shape: Callable[[Batch], tuple[int, ...]],
        dtype: torch.dtype,
        sums: tuple[str, ...],
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        split_backward: bool = True,
    ):
        self.rank, self.size = group.rank(), group.size()
        assert list(modules) == stages_of(schedule, self.rank, self.size, num_stages)
        self._modules, self._schedule_name, self._num_stages = dict(modules), schedule, num_stages
        self._group, self._device = group, device
        self._hidden_shape, self._dtype, self._sums = hidden_shape, dtype, sums
        self._context, self._split_backward = context, split_backward
        self._stages: list[_MicrobatchStage] = []
        self._schedule: Any = None
        self._made_for: Any = None

    def forward_backward(self, microbatches: list[Batch], count: Tensor) -> Sums:
        """Adds the gradients of the micro-batches' loss / count to the parameters' `.grad`; returns the sums of all
        micro-batches on the process that has the last stage, zeros elsewhere. All micro-batches have one shape.
        """
        made_for = (len(microbatches), self._hidden_shape(microbatches[0]))
        if made_for != self._made_for:
            self._make_schedule(*made_for)
            self._made_for = made_for
        totals = self._zeros()
        for stage in self._stages:
            stage.run = _Run(microbatches, count, totals)
        # torch cuts what it is given into micro-batches: it gets their indices, and the stages look them up.
        index = torch.arange(len(microbatches))
        args = (index,) if self._stages[0].is_first else ()
        try:
            self._schedule.step(*args, index=index, target=index, return_outputs=False)
        except RuntimeError as error:
            if isinstance(error.__cause__, ValueError):
                raise error.__cause__ from None  # a user's mistake, which torch has wrapped
            raise
        finally:
            for stage in self._stages:
                stage.run = None
        return totals

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[Batch]) -> Sums:
        """Sums as `forward_backward` returns them, without gradients; any number of micro-batches, of any shapes. Empty
        where there are none.

        All processes move in slots: each micro-batch goes one stage further a slot, and what crosses processes
        is exchanged between slots in one batch, which no order of sends and receives can block.
        """
        totals, waiting = self._zeros(), iter(microbatches)
        under_way: list[_Traveller] = []
        exhausted = False
        for slot in count_up():
            # `size` micro-batches enter one after the other, then their turns with later stages on this process come.
            if not exhausted and slot % self._num_stages < self.size:
                batch = next(waiting, None)
                exhausted = batch is None
                if batch is not None:
                    under_way.append(_Traveller(batch))
                    # A loss that is one sum a document has their number on every process.
                    totals = {name: total + batch.get("sums", 0.0) for name, total in totals.items()}
            if exhausted and not under_way:
                return totals if slot else {}
            for traveller in under_way:
                if traveller.stage in self._modules:
                    with self._context():
                        output = self._modules[traveller.stage](traveller.batch, traveller.x)
                    if traveller.stage == self._num_stages - 1:
                        _add(totals, output)
                    traveller.x = output
            under_way = self._move(under_way)
        raise AssertionError("unreachable")

    def exchange(self, tensor: Tensor, peer: int) -> Tensor:
        """The tensor of the same shape that process `peer` of the pipeline gives in the same call."""
        mine = tensor.contiguous()
        theirs = torch.empty_like(mine)
        for work in dist.batch_isend_irecv([self._op(dist.isend, mine, peer), self._op(dist.irecv, theirs, peer)]):
            work.wait()
        return theirs

    def sum_tied(self, first: Tensor | None, last: Tensor | None) -> None:
        """Gradients of a parameter that the first and the last stage have a copy of each become their sum, bitwise
        equal on both. Pass those that this process has; collective over the processes of both stages.
        """
        for mine, stage in ((first, self._num_stages - 1), (last, 0)):
            if mine is None:
                continue
            assert mine.grad is not None
            if first is not None and last is not None:
                assert first.grad is not None and last.grad is not None
                total = local(first.grad) + local(last.grad)
                local(first.grad).copy_(total)
                local(last.grad).copy_(total)
                return
            gradient = local(mine.grad)
            gradient += self.exchange(gradient, owner_of(self._schedule_name, stage, self.size))

    def _zeros(self) -> Sums:
        wide = torch.promote_types(torch.float32, self._dtype)
        return {name: torch.zeros((), dtype=wide, device=self._device) for name in self._sums}

    def _make_schedule(self, microbatches: int, shape: tuple[int, ...]) -> None:
        cls = schedule_class(self._schedule_name)
        hidden = torch.empty(shape, dtype=self._dtype, device="meta", requires_grad=True)
        index = torch.empty(1, dtype=torch.int64, device="meta")
        loss = torch.empty((), dtype=torch.promote_types(torch.float32, self._dtype), device="meta", requires_grad=True)
        self._stages = [
            _MicrobatchStage(
                module,
                stage,
                self._num_stages,
                self._device,
                input_args=(hidden if stage else index,),
                output_args=(loss if stage == self._num_stages - 1 else hidden,),
                group=self._group,
                dw_builder=None if self._split_backward else _nothing_deferred,
            )
            for stage, module in self._modules.items()
        ]
        for torch_stage in self._stages:
            torch_stage.context, torch_stage.hidden = self._context, hidden
        single = issubclass(cls, PipelineScheduleSingle)
        self._schedule = cls(
            self._stages[0] if single else self._stages, microbatches, loss_fn=_as_is, scale_grads=False
        )

    def _move(self, under_way: list["_Traveller"]) -> list["_Traveller"]:
        """One stage further, all at once; returns those that have one left to go."""
        staying = [traveller for traveller in under_way if traveller.stage + 1 < self._num_stages]
        ops = []
        for traveller in staying:
            source, target = (
                owner_of(self._schedule_name, stage, self.size) for stage in (traveller.stage, traveller.stage + 1)
            )
            traveller.stage += 1
            if source != target and self.rank == source:
                assert traveller.x is not None
                ops.append(self._op(dist.isend, traveller.x.contiguous(), target))
            elif source != target and self.rank == target:
                shape = self._hidden_shape(traveller.batch)
                traveller.x = torch.empty(shape, dtype=self._dtype, device=self._device)
                ops.append(self._op(dist.irecv, traveller.x, source))
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()
        return staying

    def _op(self, kind: Callable[..., Any], tensor: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, dist.get_global_rank(self._group, peer), self._group)


class _Run:
    """One step's micro-batches, what their loss is divided by, and what the last stage has summed up so far."""

    def __init__(self, microbatches: list[Batch], count: Tensor, totals: Sums):
        self.microbatches, self.count, self.totals = microbatches, count, totals


class _Traveller:
    """A micro-batch in evaluation: the stage that it is at, and what it brought there."""

    def __init__(self, batch: Batch):
        self.batch, self.stage = batch, 0
        self.x: Any = None


class _MicrobatchStage(PipelineStage):
    """torch's stage, but the module gets the micro-batch of the index that torch passes on, and what is received from
    other stages lives as long as it is needed: torch's own keeps buffers of every micro-batch for the whole run.
    """

    run: _Run | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    hidden: Tensor  # on meta: as what is received

    def forward_maybe_with_nosync(self, *args: Tensor, index: Tensor) -> Tensor:
        assert self.run is not None
        with self.context():
            output = self.submod(self.run.microbatches[int(index)], None if self.is_first else args[0])
        if not self.is_last:
            return output
        _add(self.run.totals, output)
        return output["loss"] / self.run.count

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _release(self.args_recv_info[fwd_chunk_id])  # until backward the graph holds it
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        _release(self.grad_recv_info[bwd_chunk_id])

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        widen_gradients(self.submod)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._allocate(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._allocate(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_forward_infra(*args, **kwargs)
        for infos in self.args_recv_info.values():
            _release(infos)
        return result

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_backward_infra(*args, **kwargs)
        for infos in self.grad_recv_info.values():
            _release(infos)
        return result

    def _allocate(self, infos: Iterable[Any]) -> None:
        for info in infos:
            buffer = getattr(info, "buffer", None)
            if buffer is not None and not buffer.numel():
                fresh = torch.empty_like(self.hidden, device=self.device, requires_grad=False)
                info.buffer = fresh.requires_grad_(buffer.requires_grad)


def _release(infos: Iterable[Any]) -> None:
    """Leave an empty tensor where a buffer was: torch asks some for their `grad`."""
    for info in infos:
        buffer = getattr(info, "buffer", None)
        if buffer is not None:
            info.buffer = buffer.new_empty(0).requires_grad_(buffer.requires_grad)


def _add(totals: Sums, sums: Sums) -> None:
    for name, value in sums.items():
        totals[name] += value.detach()


def _as_is(loss: Tensor, _target: Tensor) -> Tensor:
    return loss


def _nothing_deferred() -> Callable[[], None]:
    """What torch calls for the weights' part of a backward that it has then run whole."""
    return lambda: None
