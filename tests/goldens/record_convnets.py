"""Records what ResNet and ConvNeXt compute by PyTorch's functions, for ``tests/models/test_convnets.py``.

    cd tests && python -m goldens.record_convnets        (with torch; written with torch 2.13)

The networks are written out from their papers under the names of torchvision and of ConvNeXt's authors, at small
widths. ``convnets_tiny.npz`` holds outputs alone: the weights come from `drawn_weights`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from goldens.drawn_weights import drawn, drawn_images

ROWS = 8
RESNETS = {  # blocks, bottleneck, stem, picture
    "resnet18": ((2, 2, 2, 2), False, "cifar", 16),
    "resnet50": ((3, 4, 6, 3), True, "imagenet", 32),
}
WIDTH = 4
CONVNEXT = dict(depths=(1, 2, 1), widths=(8, 16, 24), stem=2)


def weight(name: str, *shape: int) -> torch.Tensor:
    return torch.tensor(drawn(name, shape))


class Resnet:
    """Its forward pass; in training the running averages move and are kept."""

    def __init__(self, blocks: tuple[int, ...], bottleneck: bool, stem: str, training: bool):
        self.blocks, self.bottleneck, self.stem, self.training = blocks, bottleneck, stem, training
        self.averages: dict[str, np.ndarray] = {}

    def conv(self, name: str, x: torch.Tensor, out: int, kernel: int, stride: int = 1) -> torch.Tensor:
        kernels = weight(f"{name}.weight", out, x.shape[1], kernel, kernel)
        return F.conv2d(x, kernels, stride=stride, padding=kernel // 2)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        scale, bias, mean, var = (
            weight(f"{name}.{part}", x.shape[1]) for part in ("weight", "bias", "running_mean", "running_var")
        )
        y = F.batch_norm(x, mean, var, scale, bias, training=self.training, momentum=0.1, eps=1e-5)
        self.averages |= {f"{name}.running_mean": mean.numpy(), f"{name}.running_var": var.numpy()}
        # How many numbers the variance is over: PyTorch's running one is over one less.
        self.averages[f"{name}.count"] = np.array(x.shape[0] * x.shape[2] * x.shape[3])
        return y

    def block(self, name: str, x: torch.Tensor, inner: int, stride: int) -> torch.Tensor:
        steps = [(inner, 3, stride), (inner, 3, 1)]
        if self.bottleneck:
            steps = [(inner, 1, 1), (inner, 3, stride), (4 * inner, 1, 1)]
        y = x
        for number, (out, kernel, by) in enumerate(steps, 1):
            y = self.norm(f"{name}.bn{number}", self.conv(f"{name}.conv{number}", y, out, kernel, by))
            y = F.relu(y) if number < len(steps) else y
        if x.shape != y.shape:
            x = self.norm(f"{name}.downsample.1", self.conv(f"{name}.downsample.0", x, y.shape[1], 1, stride))
        return F.relu(x + y)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = F.relu(self.norm("bn1", self.conv("conv1", x, WIDTH, kernel, stride)))
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, 2, 1)
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                stride = 2 if stage and not block else 1
                x = self.block(f"layer{stage + 1}.{block}", x, WIDTH * 2**stage, stride)
        return x.mean((2, 3))


def convnext(x: torch.Tensor) -> torch.Tensor:
    def norm(name: str, x: torch.Tensor) -> torch.Tensor:  # over channels, which are last
        return F.layer_norm(
            x, x.shape[-1:], weight(f"{name}.weight", x.shape[-1]), weight(f"{name}.bias", x.shape[-1]), 1e-6
        )

    def everywhere(name: str, x: torch.Tensor) -> torch.Tensor:
        return norm(name, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def conv(name: str, x: torch.Tensor, out: int, kernel: int) -> torch.Tensor:
        return F.conv2d(
            x, weight(f"{name}.weight", out, x.shape[1], kernel, kernel), weight(f"{name}.bias", out), kernel
        )

    def linear(name: str, x: torch.Tensor, out: int) -> torch.Tensor:
        return F.linear(x, weight(f"{name}.weight", out, x.shape[-1]), weight(f"{name}.bias", out))

    for stage, (depth, width) in enumerate(zip(CONVNEXT["depths"], CONVNEXT["widths"], strict=True)):
        name = f"downsample_layers.{stage}"
        if stage:
            x = conv(f"{name}.1", everywhere(f"{name}.0", x), width, 2)
        else:
            x = everywhere(f"{name}.1", conv(f"{name}.0", x, width, CONVNEXT["stem"]))
        for block in range(depth):
            name = f"stages.{stage}.{block}"
            kernels = weight(f"{name}.dwconv.weight", width, 1, 7, 7)
            y = F.conv2d(x, kernels, weight(f"{name}.dwconv.bias", width), padding=3, groups=width)
            y = norm(f"{name}.norm", y.permute(0, 2, 3, 1))
            y = linear(f"{name}.pwconv2", F.gelu(linear(f"{name}.pwconv1", y, 4 * width)), width)
            x = x + (weight(f"{name}.gamma", width) * y).permute(0, 3, 1, 2)
    return norm("norm", x.mean((2, 3)))


def main() -> None:
    arrays = {}

    def pictures(size: int) -> torch.Tensor:
        return torch.tensor(drawn_images(ROWS, size, 3) * 2 - 1).permute(0, 3, 1, 2)

    for name, (blocks, bottleneck, stem, size) in RESNETS.items():
        for training in (False, True):
            network = Resnet(blocks, bottleneck, stem, training)
            arrays[f"{name}/{'trained' if training else 'evaluated'}"] = network(pictures(size)).numpy()
        arrays |= {f"{name}/{part}": array for part, array in network.averages.items()}
    arrays["convnext/evaluated"] = convnext(pictures(16)).numpy()
    np.savez_compressed(Path(__file__).with_name("convnets_tiny.npz"), **arrays)


if __name__ == "__main__":
    main()
