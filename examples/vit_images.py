"""Train a ViT on images that the script draws: circles, squares, triangles and crosses in noise.

python examples/vit_images.py
torchrun --nproc-per-node 2 examples/vit_images.py
python examples/vit_images.py --compare --train 128 --epochs 1
"""

from functools import partial

import pipecompile
import torch
from common.compare import compare
from common.options import parser, settle
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification

SHAPES = ("circle", "square", "triangle", "cross")
SIDE, PATCH = 32, 8  # pixels


def draw(shape: str, chance: torch.Generator) -> torch.Tensor:
    """An image of (3, SIDE, SIDE): a shape of some colour, size and place, in noise."""
    size, at_x, at_y = torch.rand(3, generator=chance).tolist()
    radius = 9 + 4 * size
    grid = torch.arange(SIDE).float()
    x = (grid - radius - at_x * (SIDE - 2 * radius)).view(1, SIDE) / radius  # -1 to 1 within it
    y = (grid - radius - at_y * (SIDE - 2 * radius)).view(SIDE, 1) / radius
    inside = {
        "circle": x.square() + y.square() < 1,
        "square": (x.abs() < 0.8) & (y.abs() < 0.8),
        "triangle": (y < 0.8) & (y > 2 * x.abs() - 1),
        "cross": (torch.minimum(x.abs(), y.abs()) < 0.3) & (torch.maximum(x.abs(), y.abs()) < 1),
    }[shape]
    colour = torch.rand(3, 1, 1, generator=chance) + 0.5
    return inside * colour + 0.1 * torch.randn(3, SIDE, SIDE, generator=chance)


class Drawings(torch.utils.data.Dataset):
    """So many images; each is drawn when it is asked for, and always the same."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        chance = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        label = index % len(SHAPES)
        return {"pixel_values": draw(SHAPES[label], chance), "labels": torch.tensor(label)}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--epochs", type=int, default=10)
    arguments.add_argument("--train", type=int, default=1024)
    arguments.add_argument("--validation", type=int, default=256)
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--lr", type=float, default=1e-3)
    arguments.add_argument("--layers", type=int, default=2)
    arguments.add_argument("--width", type=int, default=64)
    args = arguments.parse_args()
    settle(args.seed)

    batches = pipecompile.data.batches(Drawings(args.train, seed=1), args.batch, shuffle=True)
    dropout = 0.0 if args.compare else 0.1
    model = ViTForImageClassification(
        ViTConfig(
            image_size=SIDE,
            patch_size=PATCH,
            hidden_size=args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            intermediate_size=4 * args.width,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=len(SHAPES),
        )
    )
    steps = args.epochs * len(batches)
    training = {
        "dp": args.dp,
        "microbatches": 4,
        "optimizer": partial(AdamW, lr=args.lr, weight_decay=0.05),
        "lr_scheduler": partial(OneCycleLR, max_lr=args.lr, total_steps=steps + 1),
        "max_grad_norm": 1.0,
    }
    pipe = pipecompile.compile(model, args.stages, **training)
    loader = pipe.loader(batches)
    held_out = pipe.loader(Drawings(args.validation, seed=2), 64)
    top_1 = {"top-1": lambda out, batch: out.logits.argmax(-1) == batch["labels"]}
    losses, seen = [], []
    for epoch in range(1, args.epochs + 1):
        for batch in tqdm(loader, desc=f"epoch {epoch}", disable=not pipe.is_main):
            losses.append(pipe.step(batch))
            seen.append(batch)
        found = pipe.evaluate(held_out, metrics=top_1)
        if pipe.is_main:
            print(f"epoch {epoch}: validation loss {found['loss']:.4f}", end=", ")
            print(f"top-1 accuracy {found['top-1']:.3f}")
    classes = pipe.predict(held_out, lambda out, batch: out.logits.argmax(-1), gather="main")
    if pipe.is_main:
        for number, shape in enumerate(SHAPES):
            found = (classes[number :: len(SHAPES)] == number).float().mean()
            print(f"  {shape:8} {found:.3f}")
    if args.compare:
        compare(pipe, model, seen, losses, **training)


if __name__ == "__main__":
    main()
