"""Which source each sample of a mixture is of."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.timeline import AHEAD, Phase, Share, Timeline

WEIGHTS = st.lists(st.sampled_from([0.7, 0.3, 1.0, 1 / 3, 1e-4, 25.0, 2.5]), min_size=1, max_size=6)


def shares_of(weights, caps=()) -> list[Share]:
    caps = dict(enumerate(caps))
    return [Share(f"s{i}", ((0, weight),), caps.get(i)) for i, weight in enumerate(weights)]


def check_indices(sources: np.ndarray, indices: np.ndarray) -> None:
    """Every source's samples come once each, in order."""
    for source in np.unique(sources):
        own = indices[sources == source]
        assert (own == np.arange(len(own))).all(), source


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, start=st.integers(0, 4000), count=st.integers(1, 1500))
def test_shares_are_exact_at_every_sample(weights, start, count) -> None:
    sources, indices = Timeline.of(shares_of(weights)).where(0, start + count)
    check_indices(sources, indices)
    many, total = len(weights), sum(weights)
    for source, weight in enumerate(weights):
        had = np.cumsum(sources == source)
        due = np.arange(1, len(sources) + 1) * weight / total
        assert np.abs(had - due).max() <= 0.5 + many * weight / total / 2 + 1e-6
    again = Timeline.of(shares_of(weights))
    assert [part.tolist() for part in again.where(start, count)] == [sources[start:].tolist(), indices[start:].tolist()]
    assert list(again.taken(start).values()) == np.bincount(sources[:start], minlength=many).tolist()


@settings(max_examples=60, deadline=None)
@given(
    weights=WEIGHTS,
    caps=st.lists(st.one_of(st.none(), st.integers(1, 300)), min_size=6, max_size=6),
    cuts=st.lists(st.integers(1, 700), max_size=6),
)
def test_caps_are_kept_and_reads_may_be_cut_anywhere(weights, caps, cuts) -> None:
    shares = shares_of(weights, caps)
    total = sum(math.inf if share.cap is None else share.cap for share in shares)
    count = int(min(total, 2000))
    sources, indices = Timeline.of(shares).where(0, count)
    check_indices(sources, indices)
    for number, share in enumerate(shares):
        assert share.cap is None or (sources == number).sum() <= share.cap
    bounds = sorted({0, count, *(cut for cut in cuts if cut < count)})
    again = Timeline.of(shares)
    parts = [again.where(a, b - a) for a, b in pairwise(bounds)]
    assert np.concatenate([part[0] for part in parts]).tolist() == sources.tolist()
    assert np.concatenate([part[1] for part in parts]).tolist() == indices.tolist()
    if total <= 2000:
        with pytest.raises(ValueError, match=f"no sample after the first {count:,}"):
            again.where(count, 1)


@settings(max_examples=40, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 400), st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=4, max_size=4)),
        max_size=5,
    ),
    late=st.integers(0, 100),
)
def test_edits_repeat_and_lose_nothing(edits, late) -> None:
    """Sources come, go and come back; each is read on where it was. The state that a checkpoint keeps is enough."""
    timeline, cursor = Timeline.of(shares_of([1.0, 2.0])), 0
    for ahead, weights in edits:
        cursor += ahead
        if not any(weights):
            continue
        shares = [Share(f"s{i}", ((0, weight),)) for i, weight in enumerate(weights) if weight]
        before = timeline.where(0, cursor) if cursor else ()
        timeline = Timeline.from_state(timeline.edited(cursor, shares).state())
        for part, again in zip(before, timeline.where(0, cursor) if cursor else (), strict=True):
            assert part.tolist() == again.tolist(), "what was, stays"
        own = {timeline.names[number] for number in timeline.where(cursor, 200)[0].tolist()}
        assert own <= {share.name for share in shares}
    check_indices(*timeline.where(0, cursor + 300 + late))


def test_weights_change_with_the_tokens_seen() -> None:
    shares = [Share("easy", ((0, 1.0), (100, 0.0))), Share("hard", ((0, 0.0), (50, 1.0)))]
    sources = Timeline.of(shares).where(0, 200)[0]
    assert not sources[:50].any() and sources[50:100].sum() == 25 and sources[100:].all()


def test_ten_million_samples_in_are_found_at_once() -> None:
    timeline = Timeline.of(shares_of([0.5, 0.3, 0.2]))
    sources, indices = timeline.where(10_000_000_000, 8)
    assert len(sources) == 8
    assert np.allclose([timeline.taken(10_000_000_000)[f"s{i}"] for i in range(3)], [5e9, 3e9, 2e9], atol=2, rtol=0)
    assert indices.max() < 5e9 + 10


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([], "no source; name at least one"),
        ([Share("a"), Share("a")], "two sources are called 'a'"),
        ([Share("a", ((5, 1.0),))], r"begins at 0 tokens and goes up, this has \[5\]"),
        ([Share("a", ((0, 1.0), (0, 2.0)))], r"begins at 0 tokens and goes up, this has \[0, 0\]"),
        ([Share("a", ((0, -1.0),))], "each must be 0 or more"),
        ([Share("a", cap=0)], "a cap of 0 samples"),
    ],
)
def test_impossible_mixtures(shares, message) -> None:
    with pytest.raises(ValueError, match=message):
        Timeline.of(shares)


def test_other_data_under_the_same_name_is_refused() -> None:
    timeline = Timeline.of([Share("wiki", data="abc")])
    assert timeline.edited(10, [Share("wiki", data="abc")]) is timeline
    with pytest.raises(ValueError, match="source 'wiki' holds other data"):
        timeline.edited(10, [Share("wiki", data="abd")])
    with pytest.raises(ValueError, match="record of the data mixture is damaged"):
        Timeline.from_state([{"start": 0}])
    assert Timeline([Phase(0, (Share("a"),))]).taken(0) == {"a": 0}


def test_another_thread_may_ask_in_the_middle(monkeypatch) -> None:
    """The loader's thread and the ledger's share a timeline."""
    shares = shares_of([1.0, 1.0, 1.0], caps=[5, 9])
    later = Timeline.of(shares).where(AHEAD + 5, 20)
    shared, make, asked = Timeline.of(shares), Timeline._segment, []

    def interrupted(self, *arguments):
        if not asked:
            asked.append(True)
            self.where(0, 20)
        return make(self, *arguments)

    monkeypatch.setattr(Timeline, "_segment", interrupted)
    shared.where(0, 20)
    assert all(np.array_equal(one, other) for one, other in zip(shared.where(AHEAD + 5, 20), later, strict=True))
