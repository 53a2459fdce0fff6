"""What careful scripts do without this library: DDP with a checkpoint that is replaced whole, or
with torch.distributed.checkpoint, and DeepSpeed with its own checkpoints.

Each trains the same model on the same rows, saves every 7 steps, and goes on from its newest
checkpoint when torchrun starts it anew.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

_BEGIN = """
import os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn

total, folder, timeout_s = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
torch.manual_seed(0)
torch.set_num_threads(1)
rows = [{"x": x, "label": x.sum().long() % 4} for x in torch.randn(64, 8)]
inputs = torch.stack([row["x"] for row in rows])
labels = torch.stack([row["label"] for row in rows])

def fail(*_):
    raise ArithmeticError("out of numbers")
signal.signal(signal.SIGUSR2, fail)

def last():
    path = os.environ.get("END", "")
    return int(open(path).read()) if os.path.exists(path) else -1

layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
plain = nn.Sequential(*layers, nn.Linear(8, 4))
step, source = 0, "nothing"
"""

_DDP = """
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
model = DistributedDataParallel(plain)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

def update(loss):
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
"""

_TORCH_SAVE = """
path = os.path.join(folder, "newest.pt")
if os.path.exists(path):
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    step, source = state["step"], "disk"

def save():
    if dist.get_rank() == 0:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, path + ".draft")
        os.replace(path + ".draft", path)
"""

_DCP = """
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

def state_of():
    weights, states = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": states, "step": torch.tensor(step)}

done = [name for name in os.listdir(folder) if os.path.exists(f"{folder}/{name}/.metadata")]
if done:  # which it writes last
    state = state_of()
    dcp.load(state, checkpoint_id=f"{folder}/{max(done)}")
    set_state_dict(model, optimizer, model_state_dict=state["model"],
                   optim_state_dict=state["optimizer"])
    step, source = int(state["step"]), "disk"

def save():
    dcp.save(state_of(), checkpoint_id=f"{folder}/dcp-{step:08d}")
"""

_DEEPSPEED = """
os.environ["DS_ACCELERATOR"] = "cpu"
import logging
import deepspeed, deepspeed.ops
deepspeed.ops.__compatible_ops__ = {}  # else it compiles one, in C++
deepspeed.utils.logger.setLevel(logging.ERROR)
deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=timeout_s))
model, *_ = deepspeed.initialize(
    model=plain, optimizer=torch.optim.AdamW(plain.parameters(), lr=0.01), config={
        "train_micro_batch_size_per_gpu": 8, "gradient_clipping": 1.0,
        "steps_per_print": sys.maxsize, "zero_optimization": {"stage": 1},
    },
)
_, state = model.load_checkpoint(folder)
if state is not None:
    step, source = state["step"], "disk"

def update(loss):
    model.backward(loss)
    model.step()

def save():
    model.save_checkpoint(folder, tag=f"step{step}", client_state={"step": step})
"""

_TRAIN = """
rank, size = dist.get_rank(), dist.get_world_size()
first = True
while step < total and step != last():
    order = torch.randperm(64, generator=torch.Generator().manual_seed(step // 4))
    mine = order[16 * (step % 4):][:16].chunk(size)[rank]
    loss = nn.functional.cross_entropy(model(inputs[mine]), labels[mine])
    mean = loss.detach().clone()
    update(loss)
    dist.all_reduce(mean)
    if first and rank == 0:
        print(f"from {source} after {step} as 1 x {size}", flush=True)
    first = False
    if rank == 0:
        print(f"step {step} loss {(mean / size).item().hex()}", flush=True)
    step += 1
    if step % 7 == 0:
        save()
    time.sleep(0.05)
dist.destroy_process_group()
"""

RIVALS = {
    "DDP, torch.save": _BEGIN + _DDP + _TORCH_SAVE + _TRAIN,
    "DDP, DCP": _BEGIN + _DDP + _DCP + _TRAIN,
}
if importlib.util.find_spec("deepspeed") is not None:
    RIVALS["DeepSpeed ZeRO-1"] = _BEGIN + _DEEPSPEED + _TRAIN


def script_of(folder: Path, name: str) -> str:
    """One of `RIVALS` as a file."""
    path = folder / "rival.py"
    path.write_text(RIVALS[name])
    return str(path)
