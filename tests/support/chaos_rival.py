"""What a careful script does without this library: DDP, and a checkpoint that is replaced whole."""

from __future__ import annotations

from pathlib import Path

PLAIN = """
import os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

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

dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
rank, size = dist.get_rank(), dist.get_world_size()
layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
model = DistributedDataParallel(nn.Sequential(*layers, nn.Linear(8, 4)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
path, step, source = os.path.join(folder, "newest.pt"), 0, "nothing"
if os.path.exists(path):
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    step, source = state["step"], "disk"
first = True
while step < total and step != last():
    order = torch.randperm(64, generator=torch.Generator().manual_seed(step // 4))
    mine = order[16 * (step % 4):][:16].chunk(size)[rank]
    loss = nn.functional.cross_entropy(model(inputs[mine]), labels[mine])
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    if first and rank == 0:
        print(f"from {source} after {step} as 1 x {size}", flush=True)
    first = False
    if rank == 0:
        print(f"step {step} loss {(mean / size).item().hex()}", flush=True)
    step += 1
    if step % 7 == 0 and rank == 0:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, path + ".draft")
        os.replace(path + ".draft", path)
    time.sleep(0.05)
dist.destroy_process_group()
"""


def script_of(folder: Path) -> str:
    """As a file."""
    path = folder / "plain.py"
    path.write_text(PLAIN)
    return str(path)
