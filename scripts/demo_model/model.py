"""A Whisper network in plain PyTorch, small and fast to train on a CPU.

The names of its weights under ``whisper.`` are those of Hugging Face's ``WhisperForConditionalGeneration`` under
``model.``, so that export.py needs no table. ``spelling`` is an extra head that spells the words letter by letter
(CTC); it is what makes the encoder learn quickly, and it is left out of the export.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

LETTERS = 28  # a to z, the gap between words, the CTC blank
BLANK = 27
MEL_BANDS = 80
ENCODER_POSITIONS = 1500
DECODER_POSITIONS = 448


@dataclass(frozen=True)
class Shape:
    """The size of a network; the defaults are the shipped model."""

    vocabulary: int
    width: int = 128
    heads: int = 2
    inner: int = 384
    encoder_layers: int = 3
    decoder_layers: int = 2


def sinusoids(length: int, width: int) -> Tensor:
    """Whisper's fixed encoder positions."""
    step = math.log(10000) / (width // 2 - 1)
    frequencies = torch.exp(-step * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], 1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, states: Tensor, other: Tensor | None = None, causal: bool = False) -> Tensor:
        source = states if other is None else other
        batch, length, width = states.shape

        def split(projected: Tensor) -> Tensor:
            return projected.view(batch, -1, self.heads, width // self.heads).transpose(1, 2)

        query, key, value = split(self.q_proj(states)), split(self.k_proj(source)), split(self.v_proj(source))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
        joined: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return joined


class EncoderLayer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape.width, shape.heads)
        self.self_attn_layer_norm = nn.LayerNorm(shape.width)
        self.fc1 = nn.Linear(shape.width, shape.inner)
        self.fc2 = nn.Linear(shape.inner, shape.width)
        self.final_layer_norm = nn.LayerNorm(shape.width)

    def feed_forward(self, states: Tensor) -> Tensor:
        inner = functional.gelu(self.fc1(self.final_layer_norm(states)))
        added: Tensor = self.fc2(inner)
        return states + added

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.self_attn(self.self_attn_layer_norm(states))
        return self.feed_forward(states)

    def make_neutral(self) -> None:
        """Let the layer change nothing at first: for growing a trained network by a layer."""
        for layer in (self.self_attn.out_proj, self.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


class DecoderLayer(EncoderLayer):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.encoder_attn = Attention(shape.width, shape.heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(shape.width)

    def forward(self, states: Tensor, heard: Tensor) -> Tensor:  # type: ignore[override]
        states = states + self.self_attn(self.self_attn_layer_norm(states), causal=True)
        states = states + self.encoder_attn(self.encoder_attn_layer_norm(states), heard)
        return self.feed_forward(states)


class Encoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(MEL_BANDS, shape.width, 3, padding=1)
        self.conv2 = nn.Conv1d(shape.width, shape.width, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(ENCODER_POSITIONS, shape.width)
        self.embed_positions.weight.data = sinusoids(ENCODER_POSITIONS, shape.width)
        self.embed_positions.weight.requires_grad = False
        self.layers = nn.ModuleList(EncoderLayer(shape) for _ in range(shape.encoder_layers))
        self.layer_norm = nn.LayerNorm(shape.width)

    def forward(self, mel: Tensor, offset: int = 0) -> Tensor:
        """``mel`` is batch x 80 x frames; ``offset`` places a short window later in the 30 s."""
        states = functional.gelu(self.conv2(functional.gelu(self.conv1(mel)))).transpose(1, 2)
        states = states + self.embed_positions.weight[offset : offset + states.shape[1]]
        for layer in self.layers:
            states = layer(states)
        normal: Tensor = self.layer_norm(states)
        return normal


class Decoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.embed_positions = nn.Embedding(DECODER_POSITIONS, shape.width)
        nn.init.normal_(self.embed_tokens.weight, 0, 0.05)
        nn.init.normal_(self.embed_positions.weight, 0, 0.02)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.decoder_layers))
        self.layer_norm = nn.LayerNorm(shape.width)

    def forward(self, tokens: Tensor, heard: Tensor) -> Tensor:
        states = self.embed_tokens(tokens) + self.embed_positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            states = layer(states, heard)
        return functional.linear(self.layer_norm(states), self.embed_tokens.weight)


class Whisper(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.encoder = Encoder(shape)
        self.decoder = Decoder(shape)


class Network(nn.Module):
    """The network as it is trained: Whisper and the spelling head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.whisper = Whisper(shape)
        self.spelling = nn.Linear(shape.width, LETTERS)

    def forward(self, mel: Tensor, tokens: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """The logits of the next tokens, and those of the letters at each encoder position."""
        heard = self.whisper.encoder(mel, offset)
        return self.whisper.decoder(tokens, heard), self.spelling(heard)

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Take over trained Whisper weights; layers that they do not have start out neutral."""
        own = self.whisper.state_dict()
        unknown = set(weights) - set(own)
        if unknown:
            raise ValueError(f"cannot start from these weights: this network has no {sorted(unknown)[:3]}")
        missing = self.whisper.load_state_dict(weights, strict=False).missing_keys
        for name, module in self.whisper.named_modules():
            if isinstance(module, EncoderLayer) and any(key.startswith(f"{name}.") for key in missing):
                module.make_neutral()
