"""Whole models between our checkpoints and Hugging Face folders, one row of the table at a time.

export:  checkpoint  ->  .tmp-<out>/ (weights, config, tokenizer)  ->  proof  ->  rename to <out>/
import:  folder      ->  .tmp-step-00000000/ (weights, state, manifest)   ->  rename to step-00000000/
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.derived import new_checkpoint, new_folder
from checkpoints.hf.brand import Brand, Config
from checkpoints.hf.folder import CONFIG, Kept, read_config, write_config
from checkpoints.hf.lineage import read_lineage, write_lineage
from checkpoints.hf.ops import Shapes, Step, bind, first_few, match, wrong_experts
from checkpoints.hf.pictures import PictureSteps
from checkpoints.hf.processor import write_processor
from checkpoints.hf.tokenizer import copy_tokenizer, settle_tokenizer
from checkpoints.manifest import Origin, Progress, checksum
from checkpoints.shards import dtype_name
from checkpoints.surgery.target import origin
from checkpoints.tensors import (
    INDEX,
    SINGLE,
    TensorFiles,
    TensorInfo,
    TensorWriter,
    open_checkpoint,
    open_hf,
    parse_size,
    split_files,
)

Prove = Callable[[Path], None]  # raises ValueError where the exported folder is not the native model


def export(
    checkpoint: Path,
    config: Config,
    shapes: Shapes,
    brand: Brand,
    out: Path,
    *,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    shard_size: str = "5GB",
    kept: Kept | None = None,
    pictures: PictureSteps | None = None,
    prove: Prove | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint's model as the Hugging Face folder `out`, which must not exist or be empty.

    config: the native model's. shapes: of its tensors, tied ones once. tokenizer: folder whose tokenizer files come
    along. dtype: of floating-point weights; None keeps them as saved. shard_size: largest file, such as "5GB".
    kept: what the model's import had kept. pictures: what became of them in training, for a model that sees. prove:
    called with the folder before it gets its name; an error of it, or any other, leaves nothing behind. progress:
    called with the number of bytes just converted.

    Memory stays below two of the largest tensors. Raises ValueError or FileNotFoundError, one line.
    """
    max_bytes = parse_size(shard_size)
    source = open_checkpoint(checkpoint)
    check_shapes(source, shapes, "use the config that it was trained with")
    steps = bind(brand.tensors, shapes)
    infos = {
        name: TensorInfo(shape, target_dtype(step, source.infos[step.native[0]].dtype, dtype))
        for step in steps
        for name, shape in zip(step.hf, step.hf_shapes, strict=True)
    }
    common = Counter[torch.dtype]()
    for info in infos.values():
        common[info.dtype] += info.num_bytes
    with new_folder(out) as temp:
        processor = write_config(temp, brand, config, common.most_common(1)[0][0], kept, tokenizer)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, temp)
            settle_tokenizer(temp, config["vocab_size"])
        if processor is not None:
            assert pictures is not None, "a model that sees is exported with what became of pictures"
            write_processor(temp, processor, pictures)
        arguments = {"model_type": brand.model_type, "dtype": dtype and dtype_name(dtype)}
        write_lineage(temp, origin("export", arguments, checkpoint))
        with TensorWriter(temp, *_hf_layout(temp, infos, max_bytes)) as writer:
            for step in steps:
                _export_step(source, step, dtype, writer)
                if progress is not None:
                    progress(sum(source.infos[name].num_bytes for name in step.native))
        if prove is not None:
            prove(temp)


@dataclass(frozen=True)
class HfModel:
    """A Hugging Face folder that has been looked at: nothing but headers and config has been read."""

    folder: Path
    brand: Brand
    config: Config  # of the native model
    kept: Kept
    tensors: TensorFiles


def look_at(folder: Path, brands: dict[str, Brand]) -> HfModel:
    """The brand and native config of a Hugging Face folder. Raises FileNotFoundError or ValueError, one line."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give that of a Hugging Face model")
    brand, config, kept = read_config(folder, brands)
    tensors = open_hf(folder)
    head, embedding = _tied_names(brand)
    if config.get("tied") and head in tensors and embedding in tensors and not _same(tensors, head, embedding):
        config = {**config, "tied": False}  # transformers believes the file, not the config
    return HfModel(folder, brand, config, kept, tensors)


def import_(
    model: HfModel, shapes: Shapes, ties: dict[str, str], checkpoints: Path, *, progress: Progress | None = None
) -> Path:
    """Write a Hugging Face model as the checkpoint of step 0 in the folder `checkpoints`, without optimizer state.

    shapes: of the native model's tensors, tied ones once; ties: other name -> the name it is stored under. Types stay
    as in the files. Returns the checkpoint's folder. Raises ValueError: a tensor that is missing, one too many, or of
    another shape.
    """
    rows = model.brand.rows(model.tensors)
    bare = (model.brand.prefix + name for name in model.tensors)
    if wrong := wrong_experts(rows, shapes, [*model.tensors, *bare]):
        raise ValueError(f"{model.folder} has {wrong[0]} experts in a layer, but its config asks for {wrong[1]}")
    steps = bind(rows, shapes)
    names = match_names(model, steps, ties)
    infos = {
        name: TensorInfo(shape, model.tensors.infos[names[step.hf[0]]].dtype)
        for step in steps
        for name, shape in zip(step.native, step.native_shapes, strict=True)
    }
    how = {"model_type": model.brand.model_type}
    imported = Origin("import", how, str(model.folder), 0, checksum(model.folder / CONFIG))
    lineage = (*read_lineage(model.folder), imported)
    with new_checkpoint(checkpoints, infos, ties, lineage=lineage) as writer:
        for step in steps:
            _import_step(model.tensors, step, names, writer)
            if progress is not None:
                progress(sum(model.tensors.infos[names[name]].num_bytes for name in step.hf))
    return checkpoints / "step-00000000"


def match_names(model: HfModel, steps: list[Step], ties: dict[str, str]) -> dict[str, str]:
    """Name that `save_pretrained` writes -> name in the files, for every tensor that the steps ask for."""
    brand, tensors = model.brand, model.tensors
    bare = not any(name.startswith(brand.prefix) for name in tensors)
    wanted = {name: shape for step in steps for name, shape in zip(step.hf, step.hf_shapes, strict=True)}
    names = {name: name.removeprefix(brand.prefix) if bare else name for name in wanted}
    if missing := [name for name in wanted if names[name] not in tensors]:
        raise ValueError(f"{model.folder} lacks the tensor {first_few(missing)}: download it again")
    full = {(brand.prefix + name if bare else name): name for name in tensors if name not in names.values()}
    head, _ = _tied_names(brand)
    ignored = tuple(template.replace("{layers}", str(model.config["layers"])) for template in brand.ignored)
    needless = ignored + ((head,) if ties else ())
    extra = [
        name
        for named, name in full.items()
        if not any(match(t, n) is not None for t in needless for n in (named, name))
    ]
    if extra:
        raise ValueError(f"{model.folder} has the tensor {first_few(extra)}, which its config does not ask for")
    for name, shape in wanted.items():
        if (found := tensors.infos[names[name]].shape) != shape:
            raise ValueError(
                f"{model.folder}: tensor '{name}' has shape {list(found)}, but its config asks for {list(shape)}"
            )
    return names


def check_shapes(files: TensorFiles, shapes: Shapes, cure: str) -> None:
    """Raises ValueError unless `files` hold exactly these tensors."""
    if missing := [name for name in shapes if name not in files]:
        raise ValueError(f"{files.where} lacks the tensor {first_few(missing)}: {cure}")
    if extra := [name for name in files if name not in shapes]:
        raise ValueError(f"{files.where} has the tensor {first_few(extra)}, which the model lacks: {cure}")
    for name, shape in shapes.items():
        if (found := files.infos[name].shape) != shape:
            raise ValueError(
                f"{files.where}: tensor '{name}' has shape {list(found)}, but the model's is {list(shape)}: {cure}"
            )


def target_dtype(step: Step, dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and dtype.is_floating_point and not step.keep_dtype else dtype


def read_native(source: TensorFiles, step: Step, dtype: torch.dtype | None) -> list[Tensor]:
    """The native tensors of a step, in the type that they are exported in."""
    tensors = (source.read(name) for name in step.native)
    return [tensor.to(target_dtype(step, tensor.dtype, dtype)) for tensor in tensors]


# Functions of their own, so that a step's tensors are gone before the next one's come.
def _export_step(source: TensorFiles, step: Step, dtype: torch.dtype | None, writer: TensorWriter) -> None:
    for name, tensor in zip(step.hf, step.row.to_hf(read_native(source, step, dtype)), strict=True):
        writer.write(name, tensor)


def _import_step(source: TensorFiles, step: Step, names: dict[str, str], writer: TensorWriter) -> None:
    tensors = [source.read(names[name]) for name in step.hf]
    for name, tensor in zip(step.native, step.row.to_native(tensors, list(step.native_shapes)), strict=True):
        writer.write(name, tensor)


def _tied_names(brand: Brand) -> tuple[str, str]:
    """What the brand calls the head's and the embedding's weights; "" where it has none."""
    names = {row.native: row.hf[0] for row in brand.tensors}
    return names.get(("head.weight",), ""), names.get(("embed.weight",), "")


def _same(tensors: TensorFiles, one: str, other: str) -> bool:
    return tensors.infos[one] == tensors.infos[other] and torch.equal(tensors.read(one), tensors.read(other))


def _hf_layout(
    folder: Path, infos: dict[str, TensorInfo], max_bytes: int
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, dict[str, str]]]:
    """Files and their header texts; writes the index where there are several."""
    parts = split_files(infos, max_bytes)
    if len(parts) == 1:
        return {SINGLE: parts[0]}, {SINGLE: {"format": "pt"}}
    files = {f"model-{index:05d}-of-{len(parts):05d}.safetensors": part for index, part in enumerate(parts, 1)}
    index = {
        "metadata": {
            "total_parameters": sum(info.num_bytes // info.dtype.itemsize for info in infos.values()),
            "total_size": sum(info.num_bytes for info in infos.values()),
        },
        "weight_map": {name: file for file, part in files.items() for name in part},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return files, {file: {"format": "pt"} for file in files}
