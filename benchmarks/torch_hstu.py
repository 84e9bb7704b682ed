"""HSTU in plain PyTorch, the peer of the train-step benchmark.

Eager, padded to the full length, one row per user, biases by distance and by time included: the way the public
research code computes it, but for buckets of time, which are made once for all blocks. Same shape, dropout places and
number of heads as the recjax model it is timed beside.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

BUCKETS = 128


class HstuBlock(nn.Module):
    """x + W_out(norm(A v) * u), where u, v, q, k = silu(norm(x) W) and A = silu(q k + biases) / length."""

    def __init__(self, width: int, heads: int, length: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.length = heads, length
        self.norm, self.out_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.uvqk, self.out = nn.Linear(width, 4 * width, bias=False), nn.Linear(width, width)
        self.position = nn.Parameter(torch.empty(length).normal_(std=0.02))
        self.time = nn.Parameter(torch.empty(BUCKETS).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, apart: Tensor, buckets: Tensor, causal: Tensor) -> Tensor:
        u, v, q, k = functional.silu(self.uvqk(self.norm(x))).chunk(4, -1)
        v, q, k = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (v, q, k))
        bias = self.position[apart] + self.time.index_select(0, buckets.view(-1)).view(buckets.shape)
        weights = functional.silu(q @ k.transpose(-1, -2) + bias[:, None]) / self.length * causal
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        return x + self.out(self.dropout(self.out_norm(mixed) * u))


class Hstu(nn.Module):
    """Item and position tables, blocks, final norm."""

    def __init__(self, num_rows: int, length: int, width: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.table = nn.Embedding(num_rows, width, padding_idx=0)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(HstuBlock(width, heads, length, dropout) for _ in range(layers))
        self.final_norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        for table in (self.table, self.position):
            nn.init.normal_(table.weight, std=0.02)
        place = torch.arange(length)
        self.register_buffer("apart", (place[:, None] - place[None]).clamp(min=0))
        self.register_buffer("causal", (place[:, None] >= place[None]).float())

    def forward(self, ids: Tensor, times: Tensor) -> Tensor:
        x = self.table(ids) * math.sqrt(self.table.embedding_dim) + self.position.weight[: ids.shape[1]]
        x = self.dropout(x)
        seconds = (times[:, :, None] - times[:, None, :]).abs().clamp(min=1)
        buckets = (seconds.log() / 0.301).long().clamp(max=BUCKETS - 1)
        for block in self.blocks:
            x = block(x, self.apart, buckets, self.causal)
        return self.final_norm(x)
