"""What an exported model was derived from, beside its weights, so that an import of it still knows."""

import json
from dataclasses import asdict
from pathlib import Path

from checkpoints.manifest import Origin

LINEAGE = "lineage.json"


def write_lineage(folder: Path, lineage: tuple[Origin, ...]) -> None:
    (folder / LINEAGE).write_text(json.dumps([asdict(origin) for origin in lineage], indent=2) + "\n")


def read_lineage(folder: Path) -> tuple[Origin, ...]:
    """Oldest first; nothing for a folder of other making. Raises ValueError for a damaged file."""
    path = folder / LINEAGE
    if not path.is_file():
        return ()
    try:
        return tuple(Origin(**entry) for entry in json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged: remove it to import without what it says") from None
