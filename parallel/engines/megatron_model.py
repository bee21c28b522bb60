"""GPTModel from a family's facts: layer specs with our own norms, attention core and router, hidden states out."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE, TEColumnParallelLinear, TERowParallelLinear
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from parallel.engines.megatron_facts import MegatronFacts
from parallel.engines.megatron_latent import latent_spec

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}  # of parameters


def make_config(facts: MegatronFacts, degrees: dict[str, int], chunks: int, precision: str) -> TransformerConfig:
    """Megatron's config: no dropout, no fusion that only CUDA has, losses and gradients as sums."""
    tp, pp = degrees["tp"], degrees["pp"]
    kind = TransformerConfig if facts.latent_norm is None else MLATransformerConfig
    return kind(
        **facts.arguments,
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=degrees["cp"],
        expert_model_parallel_size=degrees["ep"],
        expert_tensor_parallel_size=tp if any(facts.sparse) else None,
        params_dtype=DTYPES[precision],
        pipeline_dtype=DTYPES[precision],
        autocast_dtype=DTYPES[precision],
        calculate_per_token_loss=True,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        batch_p2p_comm=False,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_shared_expert_overlap=False,
        moe_grouped_gemm=False,
        moe_layer_freq=[int(sparse) for sparse in facts.sparse],
    )


def linear_layers(precision: torch.dtype) -> tuple[type, type]:
    """Column- and row-parallel linear layers of a model with parameters of this dtype: Megatron's of Transformer Engine
    where that is installed and can compute it on this process's GPU, else its local ones; of both, the parameters have
    the same names and shapes.

    With Transformer Engine itself this has not been run on a GPU: tested is Megatron's layer over a stand-in.
    """
    if HAVE_TE and torch.cuda.is_available() and precision != torch.float64:
        return TEColumnParallelLinear, TERowParallelLinear
    return ColumnParallelLinear, RowParallelLinear


def layer_specs(facts: MegatronFacts, layers: range, linears: tuple[type, type]) -> TransformerBlockSubmodules:
    """Of the layers of one chunk, numbered from 0 over the whole model. linears: as `linear_layers` gives them."""
    column, row = linears
    norm = _norm_class(facts.norm)
    attention = _attention(facts, column, row)
    products = MLPSubmodules(linear_fc1=column, linear_fc2=row)
    dense = ModuleSpec(module=MLP, submodules=products)
    sparse = ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            router=_router_class(facts),
            experts=ModuleSpec(module=SequentialMLP, submodules=products),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=products),
        ),
    )

    def layer(index: int) -> ModuleSpec:
        return ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm,
                self_attention=attention,
                self_attn_bda=_add,
                pre_mlp_layernorm=norm,
                mlp=sparse if facts.sparse[index] else dense,
                mlp_bda=_add,
            ),
        )

    return TransformerBlockSubmodules(layer_specs=[layer(index) for index in layers], layer_norm=norm)


def _attention(facts: MegatronFacts, column: type, row: type) -> ModuleSpec:
    core = _core_class(facts)
    if facts.latent_norm is not None:
        return latent_spec(column, row, core, _norm_class(facts.latent_norm))
    norm = _norm_class(facts.norm) if facts.qk_norm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column, core_attention=core, linear_proj=row, q_layernorm=norm, k_layernorm=norm
        ),
    )


class Head:
    """The output layer as the loss uses it: a weight, distributed where tensor parallelism cuts it."""

    def __init__(self, weight: Tensor, mesh: DeviceMesh | None):
        cut = mesh is not None and mesh.size() > 1
        self.weight = DTensor.from_local(weight, mesh, [Shard(0)], run_check=False) if cut else weight


class Chunk(GPTModel):
    """A pipeline stage, or one of several of a process. `chunk(tokens, mask, positions)` -> hidden states: of the last
    [B, S, E] after the final norm, of others [S, B, E] as Megatron passes them on; S over tensor-parallel processes.
    """

    def __init__(
        self,
        facts: MegatronFacts,
        config: TransformerConfig,
        layers: range,
        *,
        first: bool,
        last: bool,
        chunk: int | None,
        mesh: DeviceMesh | None,
    ):
        super().__init__(
            config=config,
            transformer_layer_spec=layer_specs(facts, layers, linear_layers(config.params_dtype)),
            vocab_size=facts.vocab_size,
            max_sequence_length=facts.max_seq_len,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=facts.tied,
            position_embedding_type="learned_absolute" if facts.learned_positions else "none",
            vp_stage=chunk,
        )
        self.cfg, self.facts, self.numbers, self._mesh = facts.cfg, facts, layers, mesh
        if first and facts.embedding_scale != 1.0:
            self.embedding.word_embeddings.register_forward_hook(lambda *args: args[2] * facts.embedding_scale)

    @property
    def head(self) -> Head:
        weight = self.shared_embedding_or_output_weight() if self.facts.tied else self.output_layer.weight
        return Head(weight, self._mesh)

    def forward(self, tokens: Tensor, mask: Any, positions: Tensor) -> Tensor:
        positions = positions.expand(tokens.shape)
        context = self.facts.context(mask, positions)
        hidden: Tensor = super().forward(tokens, positions, context)
        return hidden.transpose(0, 1) if self.post_process else hidden

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def _add(training: bool, fused: bool) -> Callable[..., Tensor]:
    """The residual stream, which keeps its dtype: Megatron's own goes down to that of what is added."""

    def add(branch: tuple[Tensor, Tensor | None], residual: Tensor, _: float) -> Tensor:
        out, bias = branch
        return residual + (out if bias is None else out + bias)

    return add


def _computed(_: nn.Module, __: Any, out: Tensor) -> Tensor:
    """A norm's output in what products are computed in, before it is gathered over tensor-parallel processes."""
    device = out.device.type
    return out.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else out


def _norm_class(build: Callable[[int], nn.Module]) -> type:
    def make(_: type, config: TransformerConfig, hidden_size: int, eps: float = 0.0, **__: Any) -> nn.Module:
        norm = build(hidden_size)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        norm.register_forward_hook(_computed)
        return norm

    return type("Norm", (), {"__new__": make})


def _core_class(facts: MegatronFacts) -> type:
    class Core(nn.Module):
        """Megatron's [S, B, H, D] to our core's [B, S, H, D] and back."""

        def __init__(self, layer_number: int, **_: Any):
            super().__init__()
            self.inner = facts.core(layer_number - 1)

        def forward(self, query: Tensor, key: Tensor, value: Tensor, context: Any, **_: Any) -> Tensor:
            out = self.inner(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), context)
            return out.transpose(0, 1).flatten(2)

    return Core


def _router_class(facts: MegatronFacts) -> type:
    def make(_: type, config: TransformerConfig, **__: Any) -> nn.Module:
        assert facts.router is not None
        router = _Router(facts.router(config.hidden_size))
        for parameter in router.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return router

    return type("Router", (), {"__new__": make})


class _Router(nn.Module):
    """Our router where Megatron's dispatcher expects its own: [S, B, E] -> probabilities, choice [S * B, experts]."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron logs by it; ours are known by name."""

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        probs, chosen = self.inner(hidden.transpose(0, 1))
        return probs.transpose(0, 1).flatten(0, 1), chosen.transpose(0, 1).flatten(0, 1)
