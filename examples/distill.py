"""Distil a GPT-2 into a smaller one: a frozen teacher and its student in one pipeline.

The teacher is trained first, on Python's own sources, and then frozen. Distilling it is one module
that holds both models; the student learns from the teacher's probabilities (soft targets) and from
the text. The stages of the teacher have no backward, no gradients and no optimizer states, and the
planner knows: the table says what each stage is given.

    python examples/distill.py
    torchrun --nproc-per-node 2 examples/distill.py
    python examples/distill.py --compare --steps 4
"""

from functools import partial
from itertools import chain, islice, repeat

import pipecompile
import torch
from common.compare import compare
from common.options import parser, settle
from common.text import sources
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.optim import AdamW
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

SEQ = 64  # bytes in a row


class Distilled(nn.Module):
    """A teacher that is not trained, and a student that is.

    Args:
        temperature: by which logits are divided before they are compared.
        alpha: the share of the soft targets in the loss.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, temperature=2.0, alpha=0.5):
        super().__init__()
        self.teacher = teacher.requires_grad_(False)
        self.student = student
        self.temperature, self.alpha = temperature, alpha

    def train(self, mode: bool = True):
        super().train(mode)
        self.teacher.eval()  # no dropout
        return self

    def forward(self, input_ids, labels):
        with torch.no_grad():
            aims = self.teacher(input_ids).logits  # (rows, SEQ, vocabulary)
        output = self.student(input_ids, labels=labels)
        soft = kl_div(
            log_softmax(output.logits / self.temperature, -1).flatten(0, 1),
            log_softmax(aims / self.temperature, -1).flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        )
        loss = self.alpha * self.temperature**2 * soft + (1 - self.alpha) * output.loss
        agree = output.logits.argmax(-1) == aims.argmax(-1)  # with the teacher
        return {"loss": loss, "logits": output.logits, "agree": agree}


def hard_loss(output, batch):
    """Of each byte but the first ones: what the student alone is measured by."""
    logits, labels = output["logits"][:, :-1], batch["labels"][:, 1:]
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")


def gpt2(layers: int, width: int) -> GPT2LMHeadModel:
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    shape = {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": SEQ}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=256, **shape, **rates, bos_token_id=None, eos_token_id=None)
    )


def rows_of(package: str) -> list[dict[str, torch.Tensor]]:
    """Its sources as rows of bytes; the model shifts the labels itself."""
    data = torch.tensor(list(b"".join(path.read_bytes() for path in sources(package))))
    rows = data[: len(data) // SEQ * SEQ].view(-1, SEQ)
    return [{"input_ids": row, "labels": row} for row in rows]


def print_stages(plan: pipecompile.Plan, pair: Distilled) -> None:
    """What each stage holds of both models, and what the plan says that it costs."""
    print("          parameters         µs per microbatch     gradients, optimizer")
    print("stage    frozen   trained     forward  backward     KiB       KiB")
    for stage in plan.stages:
        params = [pair.get_parameter(name) for name in stage.params]
        frozen = sum(p.numel() for p in params if not p.requires_grad)
        trained = sum(p.numel() for p in params if p.requires_grad)
        memory = stage.memory
        print(
            f"{stage.stage:5} {frozen:9,} {trained:9,} {stage.forward_s * 1e6:11.1f}"
            f" {stage.backward_s * 1e6:9.1f} {memory.grads / 1024:9.1f} {memory.states / 1024:9.1f}"
        )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=100, help="of distilling")
    arguments.add_argument("--teacher-steps", type=int, default=100)
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--temperature", type=float, default=2.0)
    arguments.add_argument("--alpha", type=float, default=0.5)
    args = arguments.parse_args()
    settle(args.seed)

    text, held_out = rows_of("asyncio"), rows_of("logging")[:128]
    optimizer = partial(AdamW, lr=2e-3, weight_decay=0.1)
    training = {"dp": args.dp, "microbatches": 4, "optimizer": optimizer, "max_grad_norm": 1.0}

    def train(pipe, steps, what):
        """The loss of each step, and the batches that gave them."""
        losses, seen = [], []
        passes = repeat(pipe.loader(text, args.batch, shuffle=True, drop_last=True))
        batches = islice(chain.from_iterable(passes), steps)
        for batch in tqdm(batches, what, steps, disable=not pipe.is_main):
            losses.append(pipe.step(batch))
            seen.append(batch)
        return losses, seen

    teacher = gpt2(layers=4, width=128)
    teaching = pipecompile.compile(teacher, args.stages, **training)
    train(teaching, args.teacher_steps, "teacher")
    loss = teaching.evaluate(teaching.loader(held_out, 32))
    teaching.load_into(teacher)

    pair = Distilled(teacher, gpt2(layers=2, width=64), args.temperature, args.alpha)
    pipe = pipecompile.compile(pair, args.stages, **training)
    losses, seen = train(pipe, args.steps, "student")
    found = pipe.evaluate(
        pipe.loader(held_out, 32),
        metrics={"hard": hard_loss, "agree": lambda out, batch: out["agree"]},
    )
    if pipe.is_main:
        print_stages(pipe.plan, pair)
        print(f"held-out text: teacher {loss:.4f}, student {found['hard']:.4f}", end="; ")
        print(f"they choose the same byte in {found['agree']:.1%}")
    if args.compare:
        compare(pipe, pair, seen, losses, **training)


if __name__ == "__main__":
    main()
