"""A model still knows where it comes from once it has been to Hugging Face and back."""

import json
import zlib

import pytest

from checkpoints.manifest import Manifest
from tests.checkpoints.hf.tiny import CASES, checkpoint_command, save_model


def test_lineage_goes_through_export_and_import(tmp_path):
    theirs = save_model(CASES["llama3"], tmp_path / "theirs")
    checkpoint_command("import", theirs, tmp_path / "run")
    checkpoint_command("merge", tmp_path / "run", tmp_path / "run", "--out", tmp_path / "merged")
    checkpoint_command("export", tmp_path / "merged", tmp_path / "ours", "--dtype", "bf16")
    checkpoint_command("import", tmp_path / "ours", tmp_path / "back")
    first, *merged, exported, imported = Manifest.read(tmp_path / "back/checkpoints/step-00000000").lineage
    assert (first.operation, first.path, first.arguments) == ("import", str(theirs), {"model_type": "llama"})
    assert first.manifest == f"{zlib.crc32((theirs / 'config.json').read_bytes()):08x}"
    assert [origin.operation for origin in merged] == ["merge", "merge"]
    source = tmp_path / "merged/checkpoints/step-00000000"
    assert (exported.operation, exported.path) == ("export", str(source))
    assert exported.arguments == {"model_type": "llama", "dtype": "bfloat16"}
    assert exported.manifest == Manifest.read(source).digest
    assert (imported.operation, imported.path) == ("import", str(tmp_path / "ours"))
    said = json.loads((tmp_path / "ours/lineage.json").read_text())
    assert [entry["operation"] for entry in said] == ["import", "merge", "merge", "export"]
    (tmp_path / "ours/lineage.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"lineage\.json is damaged: remove it"):
        checkpoint_command("import", tmp_path / "ours", tmp_path / "again")
    assert not (tmp_path / "again").exists()
