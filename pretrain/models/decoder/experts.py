"""Which tensors of a decoder are feed-forward layers, and which are the experts in their place."""

from pretrain.models.decoder.config import DecoderConfig
from pretrain.models.family import FeedForward


def feed_forward(cfg: DecoderConfig) -> tuple[FeedForward, ...]:
    """Of the sparse layers, in order."""
    found = []
    for index in range(cfg.layers):
        if cfg.sparse(index):
            dense, moe = f"layers.{index}.mlp", f"layers.{index}.moe"
            found.append(
                FeedForward(
                    dense=(f"{dense}.gate.weight", f"{dense}.up.weight", f"{dense}.down.weight"),
                    experts=(f"{moe}.experts.gate", f"{moe}.experts.up", f"{moe}.experts.down"),
                    router=f"{moe}.router.weight",
                    bias=f"{moe}.routing.bias",
                )
            )
    return tuple(found)
