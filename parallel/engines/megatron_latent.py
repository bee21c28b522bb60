"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) on Megatron-Core's, as a layer's self attention.

Shape letters: S sequence, T the part of it that a tensor-parallel process has, B batch, H heads here, E hidden.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import MLATransformerConfig, multi_latent_attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules, MultiLatentAttention
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, cat, nn

# 0.16.1 takes the import of its own wrappers, which succeeds without Transformer Engine, for that of the library.
multi_latent_attention.HAVE_TE = HAVE_TE


def latent_spec(column: type, row: type, core: type, norm: type) -> ModuleSpec:
    """column, row: parallel linear layers. norm: on the latents."""
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=column,
            linear_q_up_proj=column,
            linear_kv_up_proj=column,
            core_attention=core,
            linear_proj=row,
            q_layernorm=norm,
            kv_layernorm=norm,
        ),
    )


class LatentAttention(MultiLatentAttention):
    """Heads cut over processes as in Megatron's MLASelfAttention, whose names it has; what rotates is left to the core.

    Latents are made of each process's part of the sequence, by matrices that all of them have, as Megatron does with
    Transformer Engine. Its other way, matrices cut by columns, would split the gradient of the key part that all heads
    share over the processes, where it has to be summed (0.16.1).
    """

    def __init__(self, config: MLATransformerConfig, submodules: MLASelfAttentionSubmodules, **options: Any):
        super().__init__(config=config, submodules=submodules, attention_type="self", **options)
        nope, rope, value = config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim
        rank = config.q_lora_rank
        if rank is None:
            self.linear_q_proj = self._heads(submodules.linear_q_proj, config.hidden_size, nope + rope)
        else:
            self.linear_q_down_proj = self._latent(rank)
            self.q_layernorm = build_module(submodules.q_layernorm, config=config, hidden_size=rank)
            self.linear_q_up_proj = self._heads(submodules.linear_q_up_proj, rank, nope + rope)
        rank = config.kv_lora_rank
        self.linear_kv_down_proj = self._latent(rank + rope)
        self.kv_layernorm = build_module(submodules.kv_layernorm, config=config, hidden_size=rank)
        self.linear_kv_up_proj = self._heads(submodules.linear_kv_up_proj, rank, nope + value)

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """[T, B, E] -> queries [S, B, H, nope + rope], keys alike, values [S, B, H, value]; none of them rotated."""
        cfg = self.config
        nope, rope, value = cfg.qk_head_dim, cfg.qk_pos_emb_head_dim, cfg.v_head_dim
        if cfg.q_lora_rank is None:
            q, _ = self.linear_q_proj(hidden_states)
        else:
            q, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden_states)))
        latent, shared = self.linear_kv_down_proj(hidden_states).split([cfg.kv_lora_rank, rope], dim=-1)
        kv, _ = self.linear_kv_up_proj(self.kv_layernorm(latent))
        if cfg.sequence_parallel:
            shared = gather_from_sequence_parallel_region(shared, group=self.pg_collection.tp)
        k, v = kv.unflatten(-1, (-1, nope + value)).split([nope, value], dim=-1)
        k = cat((k, shared[:, :, None].expand(-1, -1, k.shape[2], -1)), dim=-1)
        return q.unflatten(-1, (-1, nope + rope)), k, v, None, None

    def _latent(self, width: int) -> nn.Linear:
        """Megatron sums the gradients of what works on parts of the sequence over tensor-parallel processes."""
        linear = nn.Linear(self.config.hidden_size, width, bias=False)
        linear.weight.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        return linear

    def _heads(self, column: Callable[..., nn.Module], width: int, head: int) -> nn.Module:
        return column(
            width,
            self.config.num_attention_heads * head,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )
