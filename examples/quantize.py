"""Fine-tune a small Llama that knows it will be quantized, then quantize it to int8 or int4.

python examples/quantize.py                                # one process plays two ranks
torchrun --nproc-per-node 2 examples/quantize.py           # two processes, the same numbers
"""

import argparse
import copy
import io
from functools import partial
from time import perf_counter

import pipecompile
import torch
from common.compare import train_plain
from common.compression import (
    MICROBATCHES,
    Batch,
    compared,
    evaluate_plainly,
    llama,
    quiet,
    read_text,
    sample,
)
from torch import nn
from torch.optim import AdamW

with quiet():
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

GROUP = 32  # weights of a row that share a scale in int4


def configs(
    bits: int,
) -> tuple[IntxFakeQuantizeConfig, Int8WeightOnlyConfig | IntxWeightOnlyConfig]:
    """How weights are rounded while training, and how they are stored in the end."""
    if bits == 8:
        rounding = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
        return rounding, Int8WeightOnlyConfig()
    int4: torch.dtype = getattr(torch, "int4")  # noqa: B009 -- torch's stubs do not have it
    rounding = IntxFakeQuantizeConfig(int4, group_size=GROUP, is_symmetric=True)
    return rounding, IntxWeightOnlyConfig(int4, granularity=PerGroup(GROUP))


def of_layers(module: nn.Module, name: str) -> bool:
    """The matrices of the layers; embedding and head stay as they are."""
    return isinstance(module, nn.Linear) and ".layers." in f".{name}"


def prepared(model: nn.Module, bits: int) -> nn.Module:
    """Every matrix product reads weights that are rounded as they will be (torchao)."""
    quantize_(model, QATConfig(weight_config=configs(bits)[0], step="prepare"), of_layers)
    return model


def quantized(model: nn.Module, bits: int) -> nn.Module:
    """Ordinary layers again, their weights stored in so many bits."""
    made = copy.deepcopy(model)
    for step in (QATConfig(step="convert"), configs(bits)[1]):
        quantize_(made, step, of_layers)
    return made


def stored(model: nn.Module, bits: int) -> dict[str, torch.Tensor]:
    """What a file needs: numbers and scales; of int4, which torchao keeps in bytes on CPUs, two
    numbers in a byte."""
    state: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if not hasattr(value, "qdata"):
            state[name] = value
            continue
        numbers = value.qdata
        state[f"{name}.scale"] = value.scale
        state[f"{name}.qdata"] = (
            numbers if bits == 8 else (numbers[:, ::2] & 15) | (numbers[:, 1::2] << 4)
        )
    return state


def megabytes(state: dict[str, torch.Tensor]) -> float:
    """As `torch.save` writes it."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.tell() / 1e6


@torch.no_grad()
def milliseconds(model: nn.Module, batch: Batch, runs: int = 5) -> float:
    """Of a forward on this CPU, the fastest of some."""
    seconds = []
    for _ in range(runs + 1):
        begun = perf_counter()
        model(input_ids=batch["input_ids"])
        seconds.append(perf_counter() - begun)
    return 1e3 * min(seconds[1:])


def rows_per_s(pipe: pipecompile.Pipeline, batch: Batch, runs: int = 5) -> float:
    """Of `predict`, the fastest of some."""
    seconds = []
    for _ in range(runs + 1):
        begun = perf_counter()
        pipe.predict(batch, lambda output, _: output.logits.argmax(-1))
        seconds.append(perf_counter() - begun)
    return len(batch["input_ids"]) / min(seconds[1:])


@torch.no_grad()
def right(model: nn.Module, batch: Batch) -> float:
    """The share of next bytes that are foretold."""
    found = model(input_ids=batch["input_ids"]).logits[:, :-1].argmax(-1)
    return float((found == batch["labels"][:, 1:]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune and quantize a small Llama.")
    parser.add_argument("--before", type=int, default=60, help="steps in fp32")
    parser.add_argument("--steps", type=int, default=20, help="steps that know of the rounding")
    parser.add_argument("--bits", type=int, nargs="+", choices=(8, 4), default=(8, 4))
    args = parser.parse_args()
    torch.set_num_threads(1)  # equal numbers need equal threads

    text, held_out = read_text()
    judged = next(sample(held_out, 1))
    batches = list(sample(text, args.before + args.steps))
    adamw, careful = partial(AdamW, lr=2e-3), partial(AdamW, lr=5e-4)
    options = {"n_stages": 2, "microbatches": MICROBATCHES}

    torch.manual_seed(0)
    pipe = pipecompile.compile(llama(), optimizer=adamw, **options)
    say = print if pipe.is_main else lambda *_: None
    for batch in batches[: args.before]:
        pipe.step(batch)
    base = pipe.load_into(llama()).eval()
    row = "{:<26} {:>8.4f} {:>8.1%} {:>8.2f} {:>9.1f}".format
    say(f"{'':<26} {'loss':>8} {'right':>8} {'MB':>8} {'ms':>9}")

    def show(what: str, model: nn.Module, bits: int = 32) -> None:
        loss, size = evaluate_plainly(model, judged), megabytes(stored(model, bits))
        model.eval()
        say(row(what, loss, right(model, judged), size, milliseconds(model, judged)))

    show("fp32", base)
    tail, lines = batches[args.before :], []
    for bits in args.bits:
        show(f"int{bits}, rounded afterwards", quantized(base, bits), bits)
        model = prepared(copy.deepcopy(base), bits).train()
        tuner = pipecompile.compile(model, optimizer=careful, **options)
        for batch in tail:
            tuner.step(batch)
        train_plain(
            model, [[batch] for batch in tail], optimizer=careful, microbatches=MICROBATCHES
        )
        lines.append(compared(f"int{bits} fine-tuning", tuner.state_dict(), model.state_dict()))

        # the pipeline alone, for inference: it computes with what int weights would stand for
        server = pipecompile.compile(prepared(llama(), bits), training=False, **options)
        server.compile_for(judged)
        server.load_state_dict(tuner.state_dict())
        logits = server.predict(judged, lambda output, _: output.logits)
        tuned = tuner.load_into(prepared(llama(), bits))
        small = quantized(tuned, bits).eval()
        show(f"int{bits}, fine-tuned before", small, bits)
        with torch.no_grad():
            pieces = judged["input_ids"].chunk(MICROBATCHES)
            mine = torch.cat([tuned.eval()(input_ids=piece).logits for piece in pieces])
            rounded = small(input_ids=judged["input_ids"]).logits
        same = "the bits of one device" if torch.equal(logits, mine) else "DIFFERS from one device"
        off = (logits - rounded).abs().max() / logits.abs().max()
        lines.append(f"int{bits} inference: {same}; stored weights are off by {off:.1e} at most")
        rates = [rows_per_s(each, judged) for each in (server, tuner)]
        lines.append(f"int{bits} predict: {rates[0]:.0f} rows/s, {rates[1]:.0f} of what trains")
    for line in lines:
        say(line)


if __name__ == "__main__":
    main()
