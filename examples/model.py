"""A small language model, in PyTorch alone: a decoder whose hidden states the loss takes, and a head."""

import torch
from torch import Tensor, nn


class Decoder(nn.Module):
    """(B, L) tokens to (B, L, H) hidden states."""

    def __init__(self, vocab_size: int, hidden_size: int = 64, num_layers: int = 2, max_length: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, hidden_size)
        self.positions = nn.Embedding(max_length, hidden_size)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden_size, 4, 4 * hidden_size, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        hidden = self.tokens(ids) + self.positions(torch.arange(length, device=ids.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=ids.device)
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return self.norm(hidden)


class LanguageModel(nn.Module):
    """Decoder and head. ``forward`` gives logits of the last position, to sample from; the loss takes hidden states."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.decoder = Decoder(vocab_size)
        self.head = nn.Linear(self.decoder.norm.normalized_shape[0], vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.decoder(ids)[:, -1])
