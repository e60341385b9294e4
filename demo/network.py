"""The demo's network in PyTorch: a decoder of Mistral's form, with Mistral's parameter names.

Knows the shapes, the forward pass over whole sequences and the names that Hugging Face gives the
tensors.  Has no key-value cache: it is trained and scored here, and generation is other
programs' work.  Knows nothing of text.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 128  # input features that share one scale in the 4-bit form this model is a yardstick for


@dataclass(frozen=True)
class Shape:
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    max_positions: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def config(self, bos: int, eos: int, pad: int) -> dict[str, object]:
        """The contents of ``config.json``."""
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,  # transformers 4
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},  # 5
            "sliding_window": None,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
            "use_cache": True,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
        }


class NoisyLinear(nn.Linear):
    """A linear map that can be trained to bear the rounding of its weights.

    In training each weight moves by up to ``noise`` times half a step of 4-bit rounding, drawn
    anew in each pass.  With ``noise`` zero, and always in evaluation, it is a plain linear map.
    """

    noise: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.register_buffer("noise", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.training:
            grouped = weight.detach().reshape(len(weight), -1, GROUP)
            step = grouped.abs().amax(-1, keepdim=True) / 8
            shift = (torch.rand_like(grouped) - 0.5) * step * self.noise
            weight = weight + shift.flatten(1)
        return F.linear(x, weight)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        out: Tensor = self.weight * scaled.to(x.dtype)
        return out


def rotary(shape: Shape, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each ``[length, head_dim]``: the halves of a head turn together."""
    half = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32)
    frequencies = shape.rope_theta ** (-half / shape.head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = NoisyLinear(shape.hidden_size, shape.heads * shape.head_dim)
        self.k_proj = NoisyLinear(shape.hidden_size, shape.kv_heads * shape.head_dim)
        self.v_proj = NoisyLinear(shape.hidden_size, shape.kv_heads * shape.head_dim)
        self.o_proj = NoisyLinear(shape.heads * shape.head_dim, shape.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(*y.shape[:2], -1, self.shape.head_dim).transpose(1, 2)

        q = _rotate(heads(self.q_proj(x)), cos, sin)
        k = _rotate(heads(self.k_proj(x)), cos, sin)
        v = heads(self.v_proj(x))
        shared = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class GatedMLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = NoisyLinear(shape.hidden_size, shape.intermediate_size)
        self.up_proj = NoisyLinear(shape.hidden_size, shape.intermediate_size)
        self.down_proj = NoisyLinear(shape.intermediate_size, shape.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = GatedMLP(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    """Everything under the prefix ``model.``"""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embed_tokens(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        cos, sin = (t.to(x.dtype) for t in rotary(self.shape, tokens.shape[1], x.device))
        for layer in self.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out


class Decoder(nn.Module):
    """Token ids ``[rows, length]`` to logits ``[rows, length, vocab_size]``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.model = Body(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.model(tokens))
        return logits

    def linears(self) -> list[NoisyLinear]:
        """The linear maps of the attention and of the MLP: the ones that quantisation touches."""
        return [module for module in self.modules() if isinstance(module, NoisyLinear)]
