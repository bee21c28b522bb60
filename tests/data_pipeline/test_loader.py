"""Slicing over ranks and micro-batches, resuming, reading ahead, and the held-out pass."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loader import Loader, held_out_batches
from data_pipeline.pack import IGNORED, Samples, TokenStream
from data_pipeline.reader import TokenDataset
from tests.data_pipeline.conftest import make_shards, unique_documents

NAMES = ("tokens", "targets", "positions", "documents")


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> TokenStream:
    documents = unique_documents([37, 5, 1, 90, 14, 60, 22, 8] * 3)
    folder = make_shards(tmp_path_factory.mktemp("loader") / "d", documents, num_shards=3)
    return TokenStream(TokenDataset(folder / "train-*.tar"), seq_len=16, seed=3)


def take(loader: Loader, steps: int) -> list[tuple[dict[str, torch.Tensor], int]]:
    """Each step's micro-batches joined."""
    found = []
    for batches, cursor in (next(loader) for _ in range(steps)):
        found.append(({name: torch.cat([batch[name] for batch in batches]) for name in NAMES}, cursor))
    loader.close()
    return found


@settings(max_examples=40, deadline=None)
@given(
    world=st.sampled_from([1, 2, 3, 4]),
    micro=st.integers(1, 3),
    accumulate=st.integers(1, 3),
    prefetch=st.integers(0, 4),
    cursor=st.integers(0, 100),
)
def test_ranks_together_give_the_global_stream(stream, world, micro, accumulate, prefetch, cursor) -> None:
    batch = world * micro * accumulate
    options = {"global_batch": batch, "micro_batch": micro, "world": world, "cursor": cursor, "prefetch": prefetch}
    ranks = [take(Loader(stream, rank=rank, **options), 3) for rank in range(world)]
    for step in range(3):
        whole = stream.read(cursor + step * batch, batch)
        expected = {"tokens": whole.tokens[:, :-1]} | {name: getattr(whole, name) for name in NAMES[1:]}
        for name in NAMES:
            joined = torch.cat([rank[step][0][name] for rank in ranks])
            assert torch.equal(joined, torch.from_numpy(expected[name].copy())), name
        assert {rank[step][1] for rank in ranks} == {cursor + (step + 1) * batch}


@settings(max_examples=20, deadline=None)
@given(
    stop=st.integers(1, 6),
    prefetch=st.integers(0, 4),
    again=st.tuples(st.integers(0, 4), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2])),
)
def test_resume_under_another_layout_continues_the_stream(stream, stop, prefetch, again) -> None:
    whole = take(Loader(stream, global_batch=8, micro_batch=2, prefetch=prefetch), 8)
    _, cursor = take(Loader(stream, global_batch=8, micro_batch=2, prefetch=prefetch), stop)[-1]
    depth, world, micro = again
    options = {"global_batch": 8, "micro_batch": micro, "world": world, "cursor": cursor, "prefetch": depth}
    ranks = [take(Loader(stream, rank=rank, **options), 8 - stop) for rank in range(world)]
    for step in range(8 - stop):
        for name in NAMES:
            joined = torch.cat([rank[step][0][name] for rank in ranks])
            assert torch.equal(joined, whole[stop + step][0][name])


def test_batches_have_the_promised_shapes_and_dtypes(stream) -> None:
    with Loader(stream, global_batch=12, micro_batch=3, rank=1, world=2) as loader:
        batches, _ = next(loader)
    assert len(batches) == 2
    dtypes = dict(zip(NAMES, [torch.int32] * 4, strict=True))
    for batch in batches:
        assert {name: value.dtype for name, value in batch.items()} == dtypes
        assert all(value.shape == (3, 16) for value in batch.values())


def test_changing_a_batch_changes_no_other(stream) -> None:
    with Loader(stream, global_batch=4, micro_batch=2) as loader:
        steps = [next(loader)[0] for _ in range(3)]
    copies = [[{k: v.clone() for k, v in batch.items()} for batch in step] for step in steps]
    for value in steps[0][0].values():
        value.fill_(7)
    for number, (step, copy) in enumerate(zip(steps, copies, strict=True)):
        for micro, (batch, kept) in enumerate(zip(step, copy, strict=True)):
            if (number, micro) != (0, 0):
                assert all(torch.equal(batch[name], kept[name]) for name in NAMES)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_error_of_the_background_thread_comes_at_its_step(stream, prefetch) -> None:
    class Failing:
        seq_len = 16

        def read(self, start: int, count: int) -> Samples:
            if start >= 8:
                raise ValueError("shard went away")
            return stream.read(start, count)

    with Loader(Failing(), global_batch=4, micro_batch=4, prefetch=prefetch) as loader:
        assert next(loader)[1] == 4
        assert next(loader)[1] == 8
        for _ in range(2):
            with pytest.raises(ValueError, match="shard went away"):
                next(loader)


def test_close_ends_the_thread_and_the_iteration(stream) -> None:
    before = threading.active_count()
    loader = Loader(stream, global_batch=4, micro_batch=4, prefetch=2)
    next(loader)
    assert threading.active_count() == before + 1
    loader.close()
    assert threading.active_count() == before
    assert list(loader) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch": 10, "micro_batch": 4}, "global_batch 10: must be a multiple of micro_batch 4 x 1"),
        ({"global_batch": 8, "micro_batch": 4, "world": 3}, "x 3 data ranks = 12"),
        ({"global_batch": 8, "micro_batch": 0}, "must be a multiple"),
        ({"global_batch": 8, "micro_batch": 4, "rank": 2, "world": 2}, "data rank 2 of 2"),
        ({"global_batch": 8, "micro_batch": 4, "cursor": -1}, "cursor -1"),
    ],
)
def test_impossible_slicing(stream, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Loader(stream, **options)


@pytest.mark.parametrize("lengths", [[5, 1, 30, 12], [48], [49], [17, 16], [3]])
@pytest.mark.parametrize(("micro", "world"), [(1, 1), (2, 1), (2, 3)])
def test_held_out_pass_takes_every_target_once(tmp_path, lengths, micro, world) -> None:
    folder = make_shards(tmp_path / "d", unique_documents(lengths))
    stream = TokenStream(TokenDataset(folder / "train-*.tar"), seq_len=16, shuffle=False)
    ranks = [list(held_out_batches(stream, micro_batch=micro, rank=rank, world=world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1, "collectives would hang"
    pairs = []
    for batch in (batch for batches in ranks for batch in batches):
        assert batch["tokens"].shape == (micro, 16)
        kept = batch["targets"] != IGNORED
        pairs += list(zip(batch["tokens"][kept].tolist(), batch["targets"][kept].tolist(), strict=True))
    ends = set(np.cumsum(lengths).tolist())
    assert sorted(pairs) == [(token, token + 1) for token in range(sum(lengths) - 1) if token + 1 not in ends]


def test_held_out_pass_can_stop_early(stream) -> None:
    batches = list(held_out_batches(stream, micro_batch=2, max_samples=3))
    assert len(batches) == 2
    assert (batches[1]["targets"][1] == IGNORED).all() and (batches[1]["targets"][0] != IGNORED).any()
