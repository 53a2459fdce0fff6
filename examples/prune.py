"""Prune a small Llama while a pipeline trains it: masks that hold, then whole heads taken out.

python examples/prune.py                                  # one process plays two ranks
torchrun --nproc-per-node 2 examples/prune.py             # two processes, the same numbers
"""

import argparse
from functools import partial

import pipecompile
import torch
from common.compare import train_plain
from common.compression import (
    MICROBATCHES,
    compared,
    evaluate_plainly,
    llama,
    read_text,
    sample,
)
from torch import nn
from torch.nn.utils import prune
from torch.optim import AdamW

Model = nn.Module


def pruned_linears(model: Model) -> dict[str, nn.Linear]:
    """What is pruned: all matrices of the layers, not the embedding and the head."""
    found = model.named_modules()
    return {n: m for n, m in found if isinstance(m, nn.Linear) and ".layers." in n}


def with_masks(model: Model) -> Model:
    """`weight` becomes `weight_orig * weight_mask`, by torch's own hooks: nothing is pruned yet."""
    for linear in pruned_linears(model).values():
        prune.identity(linear, "weight")
    return model


def prune_to(model: Model, sparsity: float) -> None:
    """Mask the smallest weights of each matrix until so many of it are masked."""
    for linear in pruned_linears(model).values():
        masked = int((linear.weight_mask == 0).sum())
        wanted = round(sparsity * linear.weight_mask.numel())
        # `weight` is what the last forward has read: the scores are to be those of now
        scores = linear.weight_orig.detach()
        prune.l1_unstructured(linear, "weight", max(0, wanted - masked), importance_scores=scores)


def masks_of(model: Model) -> dict[str, torch.Tensor]:
    return {n: mask for n, mask in model.named_buffers() if n.endswith("weight_mask")}


def sparsity_of(model: Model) -> float:
    """The share of what was to be pruned that is masked."""
    masks = masks_of(model).values()
    return sum(int((mask == 0).sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def without_masks(model: Model) -> Model:
    """The product stays, as an ordinary `weight`."""
    for linear in pruned_linears(model).values():
        prune.remove(linear, "weight")
    return model


def without_heads(model: Model, heads: int, left: int) -> Model:
    """A model with fewer heads: of each layer those whose output matrix is largest."""
    smaller, state = llama(heads=left), model.state_dict()
    for name in [n for n in state if n.endswith("o_proj.weight")]:
        out = state[name]  # (width, heads × size)
        norms = out.view(out.shape[0], heads, -1).square().sum((0, 2))
        kept = norms.topk(left).indices.sort().values
        rows = torch.arange(out.shape[1]).view(heads, -1)[kept].flatten()
        state[name] = out[:, rows]
        for which in ("q_proj", "k_proj", "v_proj"):
            inner = name.replace("o_proj", which)
            state[inner] = state[inner][rows]
    smaller.load_state_dict(state)
    return smaller


def main() -> None:
    parser = argparse.ArgumentParser(description="Prune a small Llama while it trains.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="steps between two prunings")
    parser.add_argument("--sparsity", type=float, default=0.8, help="at the end")
    parser.add_argument("--heads", type=int, default=3, help="of 4 that are left at the end")
    args = parser.parse_args()
    torch.set_num_threads(1)  # equal numbers need equal threads

    def target(step: int) -> float:
        """Fast at first, slowly towards the end (Zhu and Gupta, 2017)."""
        done = min(1.0, step / max(1, args.steps * 3 // 4))
        return args.sparsity * (1 - (1 - done) ** 3)

    torch.manual_seed(0)
    model = with_masks(llama())
    adamw = partial(AdamW, lr=2e-3, weight_decay=0.01)
    options = {"n_stages": 2, "microbatches": MICROBATCHES}
    pipe = pipecompile.compile(model, optimizer=adamw, **options)
    say = print if pipe.is_main else lambda *_: None
    text, held_out = read_text()
    batches = list(sample(text, args.steps))
    judged = next(sample(held_out, 1))

    def mine(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: rows.chunk(pipe.data_shards)[pipe.data_shard] for n, rows in batch.items()}

    twin = with_masks(llama())  # where torch's pruning looks at the weights
    for step, batch in enumerate(batches):
        if step and step % args.every == 0:
            pipe.load_into(twin)
            prune_to(twin, target(step))
            pipe.load_state_dict(masks_of(twin), strict=False)  # the masks alone
            say(f"step {step:3d}  sparsity {sparsity_of(pipe.load_into(twin)):.3f}")
        loss = pipe.step(mine(batch))
    pipe.load_into(twin)
    say(f"step {len(batches)}  loss {loss:.6f}  sparsity {sparsity_of(twin):.3f}")

    # the same on one device
    def before(step: int) -> None:
        if step and step % args.every == 0:
            prune_to(model, target(step))

    plainly = {"optimizer": adamw, "microbatches": MICROBATCHES}
    losses = train_plain(model, [[batch] for batch in batches], **plainly, before=before)
    say(f"last loss on one device {losses[-1]:.6f}")
    say(compared("weights and masks", pipe.state_dict(), model.state_dict()))

    # without masks it is an ordinary Llama
    plain = llama()
    plain.load_state_dict(without_masks(twin).state_dict(), strict=True)
    found, expected = pipe.evaluate(mine(judged)), evaluate_plainly(plain, judged)
    say(f"held-out text: loss {found:.6f}; exported without masks {expected:.6f}")
    zeros = sum(int((param == 0).sum()) for param in plain.parameters())
    say(f"exported: {zeros:,} zeros, equal loss: {torch.equal(found, expected)}")

    # whole heads are taken out by building a smaller model, which a pipeline of its own trains
    smaller = without_heads(plain, 4, args.heads)
    sizes = [sum(p.numel() for p in each.parameters()) for each in (plain, smaller)]
    tuned = pipecompile.compile(smaller, optimizer=adamw, **options)
    few = batches[: max(2, len(batches) // 4)]
    losses = [tuned.step(mine(batch)) for batch in few]
    say(f"{args.heads} of 4 heads: {sizes[0]:,} to {sizes[1]:,} parameters")
    say(f"fewer heads: loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(few)} steps")
    train_plain(smaller, [[batch] for batch in few], **plainly)
    say(compared("fewer heads", tuned.state_dict(), smaller.state_dict()))


if __name__ == "__main__":
    main()
