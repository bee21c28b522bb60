"""What the processes of a run must have alike, found out before they wait for each other."""

import hashlib
import json

import torch

from checkpoints.collective import Ranks
from pretrain.config import RunConfig, flat_config


def check_agreement(config: RunConfig, ranks: Ranks) -> None:
    """Collective. Raises ValueError on every rank when their configs or torch versions differ: each would go its own
    way until one waits for the others in vain. Only a hash travels while all is well.
    """
    own = {"torch": torch.__version__, **flat_config(config)}
    digest = hashlib.blake2b(json.dumps(own, sort_keys=True).encode(), digest_size=16).hexdigest()
    digests = ranks.gather(digest)
    if len(set(digests)) == 1:
        return
    other = next(rank for rank, theirs in enumerate(digests) if theirs != digests[0])
    first, second = (entries for rank, entries in enumerate(ranks.gather(own)) if rank in (0, other))
    keys = sorted(key for key in {**first, **second} if first.get(key) != second.get(key))
    shown = ", ".join(f"{key} = {first.get(key)!r} and {second.get(key)!r}" for key in keys[:3])
    error = ValueError(
        f"rank 0 and rank {other} of {ranks.size} run different settings: {shown}; start all with the same recipe, "
        "overrides and installation"
    )
    error.on_all_ranks = True  # type: ignore[attr-defined]
    raise error
