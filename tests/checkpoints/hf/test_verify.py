"""An export that is not the model must not get its name, and the error must say where the two part."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.hf import convert
from checkpoints.hf.brand import Brand, Choice
from checkpoints.hf.ops import Rename, Row
from checkpoints.hf.verify import NotEqual, Trace, first_divergence, prove_tensors
from launch.commands.convert import native_tensors
from pretrain.config import load_run_config
from pretrain.models.decoder import hf
from tests.checkpoints.hf.tiny import CASES, checkpoint_command, save_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_model(CASES["llama2"], tmp_path / "hf")  # as many kv heads as heads: q and k have one shape
    checkpoint_command("import", tmp_path / "hf", tmp_path / "run")
    return tmp_path / "run"


class InterleavedRope(Rename):
    """The bug of a converter that believes the rotated pairs lie side by side, as in Meta's own files."""

    def to_hf(self, tensors: list[Tensor]) -> list[Tensor]:
        rows = tensors[0].shape[0]
        return [tensors[0].reshape(rows // 10, 5, 2, -1).transpose(1, 2).reshape(rows, -1)]

    def to_native(self, tensors: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        rows = tensors[0].shape[0]
        return [tensors[0].reshape(rows // 10, 2, 5, -1).transpose(1, 2).reshape(rows, -1)]


def with_rows(change: Callable[[Row], Row]) -> Brand:
    return replace(hf.LLAMA, tensors=tuple(change(row) for row in hf.LLAMA.tensors))


def swap_gate_and_up(row: Row) -> Row:
    names = {"mlp.gate": "mlp.up_proj", "mlp.up": "mlp.gate_proj"}
    for ours, theirs in names.items():
        if row.native[0] == f"layers.{{i}}.{ours}.weight":
            return Rename(row.native[0], f"model.layers.{{i}}.{theirs}.weight")
    return row


def interleave_q_and_k(row: Row) -> Row:
    names = ("layers.{i}.attention.q.weight", "layers.{i}.attention.k.weight")
    return InterleavedRope(row.native[0], row.hf[0]) if row.native[0] in names else row


@pytest.mark.parametrize("bug", [swap_gate_and_up, interleave_q_and_k])
def test_a_mapping_bug_is_found_and_its_block_named(bug: Any, run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Every bug here is reversible, so that comparing tensors alone would not see it."""
    monkeypatch.setitem(hf.BRANDS, "llama", with_rows(bug))
    with pytest.raises(NotEqual, match=r"logits differ by .*; block 0 is the first whose output differs"):
        checkpoint_command("export", run, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize(
    ("native", "words"),
    [
        ("layers.2.attention_norm.weight", "block 2 is the first whose output differs"),
        ("norm.weight", "all blocks agree: the final norm or the head differs"),
        ("embed.weight", "the embedding differs already"),
    ],
)
def test_the_first_block_that_differs_is_named(
    native: str, words: str, run: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """One tensor is spoilt on its way into the file, and the comparison of tensors looks away."""
    exported = convert._export_step

    def spoil(source: Any, step: Any, dtype: Any, writer: Any) -> None:
        if native not in step.native:
            return exported(source, step, dtype, writer)
        for name, tensor in zip(step.hf, step.row.to_hf(convert.read_native(source, step, dtype)), strict=True):
            writer.write(name, tensor * 1.01)

    monkeypatch.setattr(convert, "_export_step", spoil)
    monkeypatch.setattr("launch.commands.convert.prove_tensors", lambda *args: 0)
    with pytest.raises(NotEqual, match=words):
        checkpoint_command("export", run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_that_says_something_else_is_found(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Tensors alone are all right here."""
    wrong = Choice("activation", "hidden_act", (("silu", "gelu"),))
    rows = tuple(wrong if row.native == ("activation",) else row for row in hf.LLAMA.config)
    monkeypatch.setitem(hf.BRANDS, "llama", replace(hf.LLAMA, config=rows))
    with pytest.raises(NotEqual, match="block 0 is the first"):
        checkpoint_command("export", run, tmp_path / "out")


def test_a_tensor_without_a_say_in_the_logits_is_compared_too(tmp_path: Path) -> None:
    """A key bias moves all scores of a query alike where nothing rotates keys: GPT-2's could be lost unseen."""
    save_model(CASES["gpt2"], tmp_path / "hf")
    checkpoint_command("import", tmp_path / "hf", tmp_path / "run")
    checkpoint_command("export", tmp_path / "run", tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors["transformer.h.1.attn.c_attn.bias"][48:96] = 0
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    shapes, _ = native_tensors(load_run_config(tmp_path / "run").model)
    checkpoint = tmp_path / "run/checkpoints/step-00000000"
    with pytest.raises(NotEqual, match=r"'layers.1.attention.k.bias' is another one after exporting it"):
        prove_tensors(checkpoint, shapes, hf.GPT2, tmp_path / "out", None)


def test_a_row_that_writes_a_name_transformers_does_not_know(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def misspell(row: Row) -> Row:
        return Rename(row.native[0], "model.final_norm.weight") if row.native == ("norm.weight",) else row

    monkeypatch.setitem(hf.BRANDS, "llama", with_rows(misspell))
    with pytest.raises(NotEqual, match=r"transformers loads the export with missing keys: 'model.norm.weight'"):
        checkpoint_command("export", run, tmp_path / "out")


def test_without_the_logits_tensors_are_still_compared(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def forbidden(*args: object) -> None:
        raise AssertionError("the logits were computed")

    monkeypatch.setattr("launch.commands.convert.prove_logits", forbidden)
    checkpoint_command("export", run, tmp_path / "out", "--no-verify-logits")
    said = capsys.readouterr().out
    assert "39 tensors came back bit for bit" in said and "logits were not compared" in said


def test_nan_is_no_agreement() -> None:
    one = Trace(torch.ones(1, 2, 3), [torch.ones(1, 2, 4), torch.full((1, 2, 4), float("nan"))])
    assert first_divergence(one, one).startswith("block 0")
