"""Models of `torch.nn` alone: convolutional networks and transformers, as others write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

WIDTH, HEADS, LAYERS, LABELS, VOCABULARY = 32, 4, 4, 3, 96

Batch = dict[str, torch.Tensor]


class _Classifier(nn.Module):
    """Images -> the loss of their labels."""

    def __init__(self, body: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, LABELS)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.body(images))  # (rows, labels)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class _Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return x + y


def _convolution(
    inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1
) -> nn.Module:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


def resnet() -> nn.Module:
    """Batch norm, whose buffers a forward updates."""

    def block() -> nn.Module:
        return nn.Sequential(
            _Residual(
                _convolution(WIDTH, WIDTH),
                nn.BatchNorm2d(WIDTH),
                nn.ReLU(inplace=True),
                _convolution(WIDTH, WIDTH),
                nn.BatchNorm2d(WIDTH),
            ),
            nn.ReLU(inplace=True),
        )

    stem = (_convolution(3, WIDTH, stride=2), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True))
    blocks = [block() for _ in range(LAYERS)]
    return _Classifier(nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(LAYERS):
        layers += [nn.Conv2d(WIDTH if i else 3, WIDTH, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return _Classifier(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()))


class _SqueezeExcite(nn.Module):
    """Channels times what their means say."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, width // 4, 1),
            nn.SiLU(),
            nn.Conv2d(width // 4, width, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate: torch.Tensor = self.gate(x)
        return x * gate


def efficientnet() -> nn.Module:
    """Inverted residuals: depthwise convolutions, squeeze and excite."""
    inner = 2 * WIDTH

    def block() -> nn.Module:
        return _Residual(
            _convolution(WIDTH, inner, 1),
            nn.BatchNorm2d(inner),
            nn.SiLU(),
            _convolution(inner, inner, groups=inner),
            nn.BatchNorm2d(inner),
            nn.SiLU(),
            _SqueezeExcite(inner),
            _convolution(inner, WIDTH, 1),
            nn.BatchNorm2d(WIDTH),
        )

    stem = (_convolution(3, WIDTH, stride=2), nn.BatchNorm2d(WIDTH), nn.SiLU())
    blocks = [block() for _ in range(LAYERS)]
    return _Classifier(nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()))


class _ChannelsLast(nn.Module):
    """What works on (rows, height, width, channels), for the others' (rows, channels, ...)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    """Large kernels, layer norm over channels."""

    def block() -> nn.Module:
        mlp = (nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU())
        return _Residual(
            _convolution(WIDTH, WIDTH, 7, groups=WIDTH),
            _ChannelsLast(*mlp, nn.Linear(2 * WIDTH, WIDTH)),
        )

    blocks = [block() for _ in range(LAYERS)]
    stem = (nn.Conv2d(3, WIDTH, 4, 4), _ChannelsLast(nn.LayerNorm(WIDTH)))
    return _Classifier(nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def mlp_mixer() -> nn.Module:
    tokens = 16

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.rest = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.tokens = nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens))
            self.channels = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.tokens(self.norm(x).mT).mT
            y: torch.Tensor = self.channels(self.rest(x))
            return x + y

    return _Classifier(_Patches(nn.Sequential(*(Mixer() for _ in range(LAYERS))), tokens))


class _Patches(nn.Module):
    """Images -> patches with learnt positions -> layers -> their mean."""

    def __init__(self, layers: nn.Module, tokens: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, tokens, WIDTH) * 0.02)
        self.layers = layers
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).mT + self.positions  # (rows, tokens, width)
        y: torch.Tensor = self.norm(self.layers(x))
        return y.mean(1)


def _layer(norm_first: bool) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        WIDTH, HEADS, 64, dropout=0.0, batch_first=True, norm_first=norm_first
    )


def vit() -> nn.Module:
    layers = nn.TransformerEncoder(_layer(True), LAYERS, enable_nested_tensor=False)
    return _Classifier(_Patches(layers))


class _Language(nn.Module):
    """A decoder of `nn.TransformerEncoder` with a causal mask; the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.TransformerEncoder(_layer(False), LAYERS)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        x = self.layers(self.embedding(input_ids), mask=mask, is_causal=True)
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


class _Translation(nn.Module):
    """`nn.Transformer`, encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(VOCABULARY, WIDTH)
        self.target = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Transformer(WIDTH, HEADS, 2, 2, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = nn.Transformer.generate_square_subsequent_mask(labels.shape[1] - 1)
        x = self.body(self.source(input_ids), self.target(labels[:, :-1]), tgt_mask=mask)
        return {"loss": F.cross_entropy(self.head(x).flatten(0, 1), labels[:, 1:].flatten())}


def images(rows: int) -> Batch:
    return {"images": torch.randn(rows, 3, 16, 16), "labels": torch.randint(0, LABELS, (rows,))}


def tokens(rows: int, length: int = 12) -> Batch:
    ids = torch.randint(VOCABULARY, (2, rows, length))
    return {"input_ids": ids[0], "labels": ids[1]}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "resnet": (resnet, images),
    "vgg": (vgg, images),
    "efficientnet": (efficientnet, images),
    "convnext": (convnext, images),
    "mlp-mixer": (mlp_mixer, images),
    "vit": (vit, images),
    "transformer-decoder": (_Language, tokens),
    "transformer": (_Translation, tokens),
}
"""Name -> what makes the model, and what makes a batch of so many rows."""
