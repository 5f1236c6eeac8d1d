"""One MAE training step beside PyTorch's, in one sitting on one CPU.

Both sides: ViT-Tiny (12 layers x 192, 3 heads) on 32 x 32 pixels in colour with patches of 4, a quarter of which is
seen, a decoder of 4 layers x 128 with 4 heads, a class token, fixed positions, pixels normalised by patch, batch 128,
AdamW at 1.5e-3 with betas 0.9 and 0.95, weight decay 0.05, float32. Both draw their masks in the step and cut no
crops. The peer is written here from the paper (arXiv 2111.06377), with PyTorch's own attention, eager; its decoder
paints all patches, as the published one does, of which the loss takes the hidden ones.

    pip install -e ".[peers]" && python tests/benchmarks/mae_step.py
    python tests/benchmarks/mae_step.py --size=base --dtype=bfloat16 --torch-device=cuda --torch-dtype=bfloat16 \\
        --torch-compile            # on a GPU: ViT-B/16 at 224 pixels, a decoder of 8 x 512

The two sides take turns; medians of ``--steps`` steps a turn, spread over ``--turns`` turns. Use an otherwise idle
machine. ``--torch-python`` names another interpreter for the peer if torch is not installed in this one.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
from peers import Size, compare, time_sslx, time_torch, torch_block

HIDDEN = 0.75


@dataclasses.dataclass(frozen=True)
class Autoencoding(Size):
    """With the picture's side, its patches and the decoder."""

    side: int = 32
    patch: int = 4
    decoder_layers: int = 4
    decoder_width: int = 128
    decoder_heads: int = 4


SIZES = {
    "tiny": Autoencoding(128, 12, 192, 3),
    "base": Autoencoding(128, 12, 768, 12, side=224, patch=16, decoder_layers=8, decoder_width=512, decoder_heads=16),
}


def measure_sslx(arguments: argparse.Namespace) -> dict[str, float]:
    """The real train step of masked autoencoding."""
    from sslx.augment.policy import NONE
    from sslx.models.vit import VitConfig
    from sslx.pretext.mae import Mae, MaeConfig

    size = arguments.size
    model = VitConfig(
        **size.transformer(arguments),
        image_size=size.side,
        patch_size=size.patch,
        positions="sincos",
        init="xavier",
    )
    pretext = MaeConfig(
        mask_ratio=HIDDEN,
        decoder_layers=size.decoder_layers,
        decoder_width=size.decoder_width,
        decoder_heads=size.decoder_heads,
        augment=NONE,
    )
    shape = (size.rows, size.side, size.side, 3)
    batch = {"image": np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)}
    optimizer = {"learning_rate": 1.5e-3, "beta2": 0.95, "weight_decay": 0.05, "clip_norm": None}
    return time_sslx(Mae(pretext, model, cropped=False), batch, arguments, **optimizer)


def measure_torch(arguments: argparse.Namespace) -> dict[str, float]:
    """The same model in PyTorch."""
    import torch
    from torch import nn

    size = arguments.size
    wide, thin = size.width, size.decoder_width

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            patches, values = (size.side // size.patch) ** 2, 3 * size.patch**2
            self.embed, self.narrow = nn.Linear(values, wide), nn.Linear(wide, thin)
            self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, wide))
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, thin))
            # Fixed: their values do not change the time of a step.
            self.register_buffer("places", torch.randn(1, patches, wide))
            self.register_buffer("decoder_places", torch.randn(1, 1 + patches, thin))
            self.encoder = nn.ModuleList(torch_block(wide, size.heads) for _ in range(size.layers))
            self.decoder = nn.ModuleList(torch_block(thin, size.decoder_heads) for _ in range(size.decoder_layers))
            self.norm, self.decoder_norm = nn.LayerNorm(wide, eps=1e-6), nn.LayerNorm(thin, eps=1e-6)
            self.paint = nn.Linear(thin, values)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            rows, side = len(images), size.side // size.patch
            x = (
                images.view(rows, side, size.patch, side, size.patch, 3)
                .permute(0, 1, 3, 2, 4, 5)
                .reshape(rows, side**2, -1)
            )
            mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)
            targets = (x - mean) / (variance + 1e-6).sqrt()
            order = torch.rand(rows, side**2).argsort(1)
            kept = round((1 - HIDDEN) * side**2)
            chosen = order[:, :kept, None].expand(-1, -1, wide)
            x = torch.gather(self.embed(x) + self.places, 1, chosen)
            x = torch.cat([self.class_token.expand(rows, -1, -1), x], 1)
            for block in self.encoder:
                x = block(x)
            x = self.narrow(self.norm(x))
            masked = self.mask_token.expand(rows, side**2 - kept, -1)
            back = order.argsort(1)[..., None].expand(-1, -1, thin)
            patches = torch.gather(torch.cat([x[:, 1:], masked], 1), 1, back)
            x = torch.cat([x[:, :1], patches], 1) + self.decoder_places
            for block in self.decoder:
                x = block(x)
            errors = ((self.paint(self.decoder_norm(x))[:, 1:] - targets) ** 2).mean(-1)
            return torch.gather(errors, 1, order[:, kept:]).mean()

    return time_torch(
        Autoencoder,
        lambda: torch.rand(size.rows, size.side, size.side, 3),
        lambda model, images: model(images),
        arguments,
        clip=None,
        lr=1.5e-3,
        betas=(0.9, 0.95),
        weight_decay=0.05,
    )


if __name__ == "__main__":
    compare(__doc__, __file__, sslx=measure_sslx, torch=measure_torch, sizes=SIZES)
