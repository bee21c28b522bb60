"""What may be saved, and what may be loaded where."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from checkpoints.collective import Ranks
from checkpoints.manifest import Manifest, TensorEntry
from checkpoints.shards import DTYPES, dtype_name

Targets = dict[str, dict[str, Tensor]]  # part -> name -> tensor


def check_tensors(model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
    """Raises ValueError for what is no tensor, cannot be stored, or comes under two names."""
    for part, tensors in (("model", model), ("optimizer", optimizer)):
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                kind = type(tensor).__name__
                raise ValueError(f"{part} entry '{name}' is a {kind}: what is no tensor belongs into state")
            if tensor.dtype not in DTYPES:
                kind = dtype_name(tensor.dtype)
                raise ValueError(f"{part} tensor '{name}' has type {kind}: safetensors cannot hold it")
            if tensor.is_meta:
                raise ValueError(f"{part} tensor '{name}' is on the meta device: materialise it first")
    owners: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in model.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        first = owners.setdefault((local.data_ptr(), tensor.shape), name) if local.numel() else name
        if first != name:
            raise ValueError(f"model tensors '{first}' and '{name}' share their memory: name one in ties")


def check_json(value: Any, where: str) -> None:
    """Raises ValueError, naming the place, for what JSON cannot hold (a tuple comes back as a list)."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}: keys must be strings")
            check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]")
    elif not isinstance(value, str | int | float | bool | None):
        raise ValueError(f"{where} is a {type(value).__name__}: only JSON values can be saved")


def check_state(state: dict[str, Any], rank_state: Any, step: int) -> None:
    """Raises ValueError for what is no JSON, and for keys that the store writes itself."""
    check_json(state, "state")
    check_json(rank_state, "rank_state")
    if "ranks" in state or state.get("step", step) != step:
        raise ValueError("state must not have the keys 'step' and 'ranks': the store writes them")


def tie_targets(ties_by_rank: list[dict[str, str]], stored: dict[str, TensorEntry]) -> dict[str, str]:
    """The ties of all ranks as one; raises ValueError where one leads to a tensor that is not saved."""
    ties = {alias: name for ties in ties_by_rank for alias, name in ties.items()}
    for alias, name in ties.items():
        if name not in stored or alias in stored:
            raise ValueError(f"tie '{alias}' -> '{name}': only the second must be among the saved model tensors")
    return ties


def misfits(manifest: Manifest, targets: Targets, ranks: Ranks) -> str:
    """Collective. How the checkpoint's tensors differ from all ranks' tensors; empty where they fit."""
    keys = [(part, name) for part in targets for name in manifest.tensors[part]]
    place = {key: index for index, key in enumerate(keys)}
    wanted = torch.zeros(len(keys), dtype=torch.bool)
    missing: list[str] = []
    unlike: list[str] = []
    for part, tensors in targets.items():
        for name, tensor in tensors.items():
            stored = manifest.ties.get(name, name) if part == "model" else name
            entry = manifest.tensors[part].get(stored)
            if entry is None:
                missing.append(f"{part} {name}")
                continue
            wanted[place[part, stored]] = True
            if tensor.is_meta:
                unlike.append(f"{part} {name} (on the meta device here: materialise it first)")
            elif not _fits(entry, tensor):
                here = f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
                unlike.append(f"{part} {name} ({entry.dtype} {entry.shape} there, {here} here)")
    needed = ranks.union(wanted)
    extra = [f"{part} {name}" for (part, name), used in zip(keys, needed.tolist(), strict=True) if not used]
    replies = ranks.gather({"missing": missing, "unlike": unlike})
    findings = (
        ("it lacks", [name for reply in replies for name in reply["missing"]]),
        ("only it has", extra),
        ("unlike are", [text for reply in replies for text in reply["unlike"]]),
    )
    return "; ".join(f"{verb} {_first_few(names)}" for verb, names in findings if names)


def _fits(entry: TensorEntry, tensor: Tensor) -> bool:
    dtype = getattr(torch, entry.dtype)
    same = dtype == tensor.dtype or (dtype.is_floating_point and tensor.is_floating_point())
    return same and entry.shape == list(tensor.shape)


def _first_few(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
