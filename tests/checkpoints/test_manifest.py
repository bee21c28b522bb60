"""Lineage in the manifest: kept, checked, and absent where older programs wrote it."""

import json
from dataclasses import replace

import pytest

from checkpoints.collective import CheckpointError
from checkpoints.manifest import Manifest, Origin

BARE = Manifest(5, "2026-01-01T00:00:00+00:00", {"model": {}, "optimizer": {}}, {}, {})
# As written before manifests had a lineage.
OLD = """{
 "crc32": "5ffae0f9",
 "created": "2026-01-01T00:00:00+00:00",
 "files": {},
 "format_version": 1,
 "step": 5,
 "tensors": {
  "model": {},
  "optimizer": {}
 },
 "ties": {}
}
"""


def test_an_older_manifest_reads_and_is_written_as_it_was(tmp_path):
    (tmp_path / "manifest.json").write_text(OLD)
    assert Manifest.read(tmp_path) == BARE
    assert BARE.encode().decode() == OLD


def test_lineage_survives_and_is_under_the_checksum(tmp_path):
    origin = Origin("upcycle", {"method": "copy", "experts": 4}, "runs/a/checkpoints/step-00000007", 7, BARE.digest)
    manifest = replace(BARE, lineage=(origin, replace(origin, operation="prune")))
    path = tmp_path / "manifest.json"
    path.write_bytes(manifest.encode())
    assert Manifest.read(tmp_path) == manifest
    assert json.loads(path.read_bytes())["format_version"] == 2  # older programs say "upgrade", not "damaged"
    assert manifest.digest != BARE.digest
    path.write_text(path.read_text().replace('"experts": 4', '"experts": 8'))
    with pytest.raises(CheckpointError, match="checksum does not match"):
        Manifest.read(tmp_path)
