"""What the folders of shards tell of all their shards, also when they are elsewhere."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from data_pipeline.places import Shard
from data_pipeline.shards import DATASET_FILE, DatasetInfo
from data_pipeline.tokenizer import BESIDE, JSON


def load_infos(shards: Sequence[Shard]) -> dict[Path, DatasetInfo | None]:
    """The ``dataset.json`` of each folder, None where there is none. Those of folders elsewhere are fetched, and the
    tokenizers that they name.

    Raises:
        ValueError: a dataset.json is none, or names a tokenizer elsewhere than in its folder.
    """
    firsts = {shard.path.parent: shard for shard in shards}
    return {folder: _load_info(shard) for folder, shard in firsts.items()}


def _load_info(shard: Shard) -> DatasetInfo | None:
    info = DatasetInfo.load(shard.folder_file(DATASET_FILE).parent)
    if info is not None and shard.url:
        where = PurePosixPath(info.tokenizer)
        if where.is_absolute() or ".." in where.parts:
            raise ValueError(
                f"{shard.name}: its dataset.json names the tokenizer {info.tokenizer!r}, outside its folder"
            )
        for name in (JSON, *BESIDE):
            shard.folder_file(f"{info.tokenizer}/{name}")
    return info
