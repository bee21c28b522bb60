"""A small likeness must keep what a layout can get wrong."""

import pytest

from parallel.mesh import AXES
from pretrain.config import recipe_names, resolve
from pretrain.models.family import ModelConfig
from pretrain.shrink import shrink
from pretrain.synthetic import SyntheticStream

ONE = dict.fromkeys(AXES, 1)
CLASSIFIERS = [name for name in recipe_names() if resolve(name)[0].model.family == "vit"]


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name not in CLASSIFIERS])
@pytest.mark.parametrize("processes", [2, 6, 8])
def test_structure_is_kept_and_sizes_are_not(recipe, processes):
    config = resolve(recipe)[0]
    before = config.model
    small, changes = shrink(config, {**ONE, "tp": processes}, processes)
    after = small.model
    assert after.num_parameters() < 3_000_000
    assert after.heads // after.num_kv_heads == before.heads // before.num_kv_heads
    for degree in (d for d in range(1, processes + 1) if processes % d == 0):
        for count in ("heads", "num_kv_heads", "vocab_size", "ffn"):
            assert (getattr(before, count) % degree == 0) == (getattr(after, count) % degree == 0), (count, degree)
    assert {after.layer_kind(i) for i in range(after.layers)} == {before.layer_kind(i) for i in range(before.layers)}
    same = ("tied", "norm", "qkv_bias", "gated", "pattern", "qk_norm", "norm_position", "positions", "rope")
    assert all(getattr(before, name) == getattr(after, name) for name in same)
    assert small.data.seq_len % (2 * processes) == config.data.seq_len % (2 * processes)
    sizes = {"model.hidden"} | ({"data.seq_len"} if config.data.seq_len > 100 else set())
    assert {key for key, _, _ in changes} >= sizes


@pytest.mark.parametrize("recipe", CLASSIFIERS)
@pytest.mark.parametrize("processes", [2, 6, 8])
def test_rows_of_patches_keep_what_cuts_them(recipe, processes):
    config = resolve(recipe, ["data.seq_len=208", "data.patches=208"])[0]
    before, small = config.model, shrink(config, {**ONE, "tp": processes}, processes)[0]
    after, data = small.model, small.data
    assert after.num_parameters() < 100_000 and data.patches == data.seq_len < 100
    assert data.seq_len % (2 * processes) == 208 % (2 * processes) and data.seq_len >= after.places
    for degree in (d for d in range(1, processes + 1) if processes % d == 0):
        assert (before.vision.heads % degree == 0) == (after.vision.heads % degree == 0), degree
    assert (after.pool, after.classes, after.vision.class_token) == (before.pool, before.classes, True)
    assert shrink(config, {**ONE, "pp": 3}, 3)[0].model.layers == min(6, before.layers)


def test_pipelines_keep_enough_layers_and_stages_by_hand():
    config = resolve("llama3-70b")[0]
    assert shrink(config, {**ONE, "pp": 4}, 4)[0].model.layers == 8  # schedules with two stages a process
    uneven = resolve("llama3-70b", ["parallel.pp=2", "parallel.stage_layers=[79, 1]"])[0]
    small = shrink(uneven, {**ONE, "pp": 2}, 2)[0]
    assert small.parallel.stage_layers == (2, 1)
    assert small.model.layers == 3


def test_what_is_small_already_stays():
    config = resolve(
        "tiny", ["model.layers=1", "model.hidden=8", "model.heads=1", "model.kv_heads=1", "data.seq_len=8"]
    )
    small, changes = shrink(config[0], ONE, 1)
    assert small.data.seq_len == 8
    assert small.model.layers == 1
    assert small.model.hidden == 8
    assert "model.layers" not in {key for key, _, _ in changes}


class Convolutions(ModelConfig):
    """Of a family that calls its dims otherwise."""

    vocab_size: int = 1000
    max_seq_len: int = 4096
    channels: int = 96
    depth: int = 12


def test_a_family_with_other_names_stays_as_it_is_where_it_must():
    config = resolve("tiny")[0].model_copy(update={"model": Convolutions()})
    small, _ = shrink(config, ONE, 2)
    assert small.model == Convolutions(vocab_size=128, max_seq_len=48)


def test_synthetic_documents_are_awkward_and_a_function_of_seed_and_index():
    stream = SyntheticStream(seq_len=48, vocab_size=100, seed=3)
    samples = stream.read(0, 8)
    again = stream.read(5, 1)
    assert all((a[5] == b[0]).all() for a, b in zip(samples, again, strict=True))
    assert (SyntheticStream(seq_len=48, vocab_size=100, seed=4).read(0, 1).tokens != samples.tokens[0]).any()
    assert samples.tokens.shape == (8, 49)
    assert samples.tokens.max() < 100
    starts = samples.positions == 0
    assert samples.documents[0].max() == 0  # one document over the whole row
    assert (samples.documents[1][:3] == [0, 1, 2]).all()  # single tokens
    assert (samples.documents[1][10:40] == samples.documents[1][10]).all()  # and one that crosses all cuts
    assert starts[2][[0, 6, 12, 24]].all()  # documents that end where the row is cut
    for row in range(8):
        ends = [i for i in range(47) if starts[row, i + 1]]
        assert (samples.targets[row, ends] == -100).all()
        inner = [i for i in range(47) if not starts[row, i + 1]]
        assert (samples.targets[row, inner] == samples.tokens[row, [i + 1 for i in inner]]).all()
    assert samples.targets[2, 47] == -100  # the next row's first token begins a document
    assert samples.targets[0, 47] == samples.tokens[0, 48]
