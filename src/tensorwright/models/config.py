"""What decoders differ in, as one frozen dataclass. It knows no file formats and no weight names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RopeKind = Literal["default", "linear", "llama3", "yarn"]
Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base, the scaling kind and that kind's own numbers as Hugging Face names them.

    `scaling` holds factor, low_freq_factor, high_freq_factor, original_max_position_embeddings,
    beta_fast, beta_slow, attention_factor, mscale, mscale_all_dim, where the kind has them.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    rotary_size: int = 0  # 0: the whole head
    scaling: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """One decoder. Sizes are of the whole model, before any sharding."""

    architecture: str  # the Hugging Face class, e.g. "MistralForCausalLM"
    dtype: Literal["float32", "float16", "bfloat16"]
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    max_position_embeddings: int  # a hint: some uploads hold absurd values
    norm_epsilon: float = 1e-5
    activation: Activation = "silu"
    rope: Rope = field(default_factory=Rope)
    qkv_bias: bool = False
    dense_bias: bool = False  # on the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int = 0  # 0: none
    windowed_layers: tuple[int, ...] | None = None  # None: every layer, when sliding_window > 0
    tied_embeddings: bool = False

    def window(self, layer: int) -> int:
        """Attention window of a layer in tokens, 0 for the whole context."""
        if self.windowed_layers is not None and layer not in self.windowed_layers:
            return 0
        return self.sliding_window
