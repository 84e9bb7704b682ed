"""SASRec in plain PyTorch, the peer of the train-step benchmark.

Eager, padded to the full length, one row per user, as such models are usually written; the fast paths PyTorch offers
for free (fused attention, logits at real positions only) are used. Same shape, loss, dropout places and optimiser
as the recjax model it is timed beside.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Pre-norm causal attention and a feed-forward part of inner width `mlp_width`."""

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        mixed = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.rate if self.training else 0.0
        )
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.outer(torch.relu(self.inner(self.ffn_norm(x)))))


class SasRec(nn.Module):
    """Item and position tables, blocks, final norm."""

    def __init__(
        self, num_rows: int, length: int, width: int, heads: int, layers: int, mlp_width: int, dropout: float
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(num_rows, width, padding_idx=0)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width, dropout) for _ in range(layers))
        self.final_norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        for table in (self.table, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) * math.sqrt(self.table.embedding_dim) + self.position.weight[: ids.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)


def full_softmax(model: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
    """Mean cross-entropy over the catalogue at the real positions."""
    real = targets > 0
    logits = model(*inputs)[real] @ model.table.weight.T
    return functional.cross_entropy(logits, targets[real])


def sampled_softmax(
    model: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor, negatives: int, first: int, items: int
) -> Tensor:
    """Mean cross-entropy against negatives drawn uniformly, shared by the batch."""
    real = targets > 0
    hidden, targets, table = model(*inputs)[real], targets[real], model.table.weight
    drawn = torch.randint(first, first + items, (negatives,))
    target_logit = (hidden * table[targets]).sum(-1, keepdim=True)
    logits = (hidden @ table[drawn].T).masked_fill(drawn[None] == targets[:, None], -1e30)
    return functional.cross_entropy(torch.cat([target_logit, logits], 1), torch.zeros_like(targets))
