"""Dimensions and choices of a causal decoder."""

from typing import Literal

from pydantic import Field, model_validator

from pretrain.models.family import ModelConfig
from pretrain.models.layers.mla import MLA
from pretrain.models.layers.mlp import Activation
from pretrain.models.layers.moe import MoE
from pretrain.models.layers.norm import NormKind
from pretrain.models.layers.rope import Rope

LayerKind = Literal["full", "sliding", "nope"]


class DecoderConfig(ModelConfig):
    """Llama-shaped by default; the other fields express the relatives."""

    family: Literal["decoder"] = Field("decoder", description="Model family")
    vocab_size: int = Field(0, ge=0, description="Tokens in the vocabulary; 0 takes the size of the data's tokenizer")
    hidden: int = Field(384, gt=0, description="Width of the residual stream")
    layers: int = Field(6, gt=0, description="Number of blocks")
    ffn: int = Field(1024, gt=0, description="Width inside the feed-forward layer")
    heads: int = Field(6, gt=0, description="Number of query heads")
    kv_heads: int = Field(0, ge=0, description="Number of key/value heads; 0 means as many as query heads")
    head_dim: int = Field(0, ge=0, description="Width of one head; 0 means hidden / heads")
    max_seq_len: int = Field(2048, gt=0, description="Longest sequence, in tokens")

    activation: Activation = Field("silu", description="Nonlinearity of the feed-forward layer")
    gated: bool = Field(True, description="Gate the feed-forward layer (SwiGLU, GeGLU)")
    mlp_bias: bool = Field(False, description="Biases in the feed-forward layer")
    qkv_bias: bool = Field(False, description="Biases on the query, key and value projections")
    out_bias: bool = Field(False, description="Bias on the attention output projection")

    mla: MLA | None = Field(None, description="Multi-head latent attention; unset: a projection each for q, k and v")
    moe: MoE | None = Field(None, description="Mixture of experts in place of the feed-forward layer; unset: dense")

    norm: NormKind = Field("rms", description="rms: w*x/rms; rms_unit: (1+w)*x/rms; layer: LayerNorm with bias")
    norm_eps: float = Field(1e-5, gt=0, description="Added to the variance")
    norm_position: Literal["pre", "post", "both"] = Field(
        "pre", description="Norm before each sublayer, on its output, or both"
    )
    qk_norm: Literal["none", "head", "full"] = Field(
        "none", description="Norm on queries and keys: none, per head, or over the whole projection"
    )

    positions: Literal["rope", "learned"] = Field("rope", description="Rotary or learned absolute positions")
    rope: Rope = Field(Rope(), description="Rotary embedding of full-attention layers")
    rotary_fraction: float = Field(1.0, gt=0, le=1, description="Part of a head's dims that rotate, the first ones")
    rope_local: Rope | None = Field(None, description="Rotary embedding of sliding layers; unset: as `rope`")
    pattern: tuple[LayerKind, ...] = Field(
        ("full",), min_length=1, description="Kinds of the layers, repeated to the depth: full, sliding, nope"
    )
    window: int = Field(0, ge=0, description="Keys a query of a sliding layer sees, itself included")
    attention_scale: float = Field(0.0, ge=0, description="Factor on scores; 0 means 1/sqrt(head_dim)")
    attention_softcap: float = Field(0.0, ge=0, description="Scores become c*tanh(s/c); 0 switches it off")

    tied: bool = Field(False, description="The head shares the embedding's weight")
    embedding_scale: float = Field(1.0, gt=0, description="Factor on the embedding's output")
    logit_softcap: float = Field(0.0, ge=0, description="Logits become c*tanh(l/c); 0 switches it off")
    init_std: float = Field(0.02, gt=0, description="Standard deviation of initial weights")

    @model_validator(mode="after")
    def _consistent(self) -> "DecoderConfig":
        self._check_latent_attention()
        if not self.mla and not self.head_dim and self.hidden % self.heads:
            raise ValueError(
                f"model.hidden = {self.hidden} is not divisible by model.heads = {self.heads}; set model.head_dim or "
                "change one of them"
            )
        if self.heads % self.num_kv_heads:
            raise ValueError(
                f"model.heads = {self.heads} is not divisible by model.kv_heads = {self.kv_heads}; each key/value "
                "head must serve the same number of query heads"
            )
        if (self.rotary_dim % 2 or not self.rotary_dim) and self.positions == "rope":
            raise ValueError(
                f"model.head_dim = {self.dim_per_head} with model.rotary_fraction = {self.rotary_fraction}: "
                f"{self.rotary_dim} dims would rotate; rotary positions rotate pairs"
            )
        if self.positions == "rope" and self.rope.scaling == "none" and self.rope.factor != 1:
            raise ValueError(f"model.rope.factor = {self.rope.factor}, but model.rope.scaling is none; name a scaling")
        if self.moe is not None and not self.gated:
            raise ValueError("model.gated = false: experts are gated; leave model.gated true where model.moe is set")
        if self.moe is not None and not any(self.sparse(i) for i in range(self.layers)):
            raise ValueError(
                f"model.moe: none of the {self.layers} layers is sparse with first_dense = {self.moe.first_dense} and "
                f"every = {self.moe.every}; lower them"
            )
        kinds = {self.layer_kind(i) for i in range(self.layers)}
        if "sliding" in kinds and not self.window:
            raise ValueError("model.pattern has sliding layers, but model.window is 0; set how many keys a query sees")
        if "sliding" not in kinds and (self.window or self.rope_local):
            key = "window" if self.window else "rope_local"
            raise ValueError(f'model.{key} is set, but no layer is sliding; add "sliding" to model.pattern')
        return self

    def _check_latent_attention(self) -> None:
        if self.mla is None:
            if self.rope.mscale_all_dim:
                raise ValueError(
                    f"model.rope.mscale_all_dim = {self.rope.mscale_all_dim} scales the scores of latent attention; "
                    "set model.mla, or model.rope.attention_factor in its place"
                )
            return
        if self.kv_heads not in (0, self.heads):
            raise ValueError(
                f"model.kv_heads = {self.kv_heads}, but model.mla gives each of the {self.heads} heads keys of its "
                f"own; set it to 0 or {self.heads}"
            )
        for key in ("head_dim", "qkv_bias", "qk_norm", "positions", "rotary_fraction", "rope_local"):
            value, default = getattr(self, key), type(self).model_fields[key].default
            if value != default:
                raise ValueError(
                    f"model.{key} = {value!r} has no meaning with model.mla; leave it at {default!r} or unset model.mla"
                )

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def dim_per_head(self) -> int:
        """Width of one head's query and key."""
        return self.mla.qk_dim if self.mla else self.head_dim or self.hidden // self.heads

    @property
    def value_dim(self) -> int:
        """Width of one head's value."""
        return self.mla.v_dim if self.mla else self.dim_per_head

    @property
    def rotary_dim(self) -> int:
        """How many dims of a head are rotated."""
        return self.mla.rope_dim if self.mla else int(self.dim_per_head * self.rotary_fraction)

    def layer_kind(self, index: int) -> LayerKind:
        return self.pattern[index % len(self.pattern)]

    def check_length(self, seq_len: int) -> None:
        super().check_length(seq_len)
        if self.moe is not None:
            self.moe.check_length(seq_len)

    def sparse(self, index: int) -> bool:
        """Whether this layer has experts."""
        return self.moe is not None and self.moe.sparse(index)

    def num_parameters(self, active: bool = False) -> int:
        """All parameters, the tied head once. active: of its experts those alone that a token uses."""
        embeddings = self.vocab_size * self.hidden * (1 if self.tied else 2)
        if self.positions == "learned":
            embeddings += self.max_seq_len * self.hidden
        layers = sum(self.layer_parameters(i, active) for i in range(self.layers))
        return embeddings + layers + self._norm_parameters(self.hidden)

    def _norm_parameters(self, dim: int) -> int:
        return dim * (2 if self.norm == "layer" else 1)

    def _attention_parameters(self) -> int:
        out_bias = self.hidden * self.out_bias
        if self.mla is not None:
            return self.mla.num_parameters(self.hidden, self.heads, self._norm_parameters(1)) + out_bias
        q_width, kv_width = self.heads * self.dim_per_head, self.num_kv_heads * self.dim_per_head
        attention = self.hidden * (2 * q_width + 2 * kv_width) + (q_width + 2 * kv_width) * self.qkv_bias + out_bias
        if self.qk_norm == "head":
            attention += 2 * self._norm_parameters(self.dim_per_head)
        elif self.qk_norm == "full":
            attention += self._norm_parameters(q_width) + self._norm_parameters(kv_width)
        return attention

    def layer_parameters(self, index: int, active: bool = False) -> int:
        """Of one block; as `num_parameters`."""
        inner = 2 if self.gated else 1
        mlp = self.hidden * self.ffn * (inner + 1) + (inner * self.ffn + self.hidden) * self.mlp_bias
        if self.moe is not None and self.sparse(index):
            experts = self.moe.top_k if active else self.moe.experts
            mlp = 3 * self.hidden * (experts * self.moe.ffn + self.moe.shared_ffn)
            mlp += self.hidden * (self.moe.experts + self.moe.shared_gate)
        num_norms = 4 if self.norm_position == "both" else 2
        return self._attention_parameters() + mlp + num_norms * self._norm_parameters(self.hidden)

    @property
    def flops_per_token(self) -> float:
        layers = sum(self.layer_parameters(i, active=True) for i in range(self.layers))
        return 6.0 * (layers + self.vocab_size * self.hidden)

    def attention_flops_per_token(self, seq_len: int) -> float:
        """Causal: on average a query sees half the sequence, or its window; forward 2 matmuls, backward 4."""
        width = self.heads * (self.dim_per_head + self.value_dim) / 2
        total = 0.0
        for index in range(self.layers):
            window = min(self.window, seq_len) if self.layer_kind(index) == "sliding" else seq_len
            seen = window - window * (window - 1) / (2 * seq_len)  # mean number of keys a query sees
            total += 12.0 * width * seen
        return total
