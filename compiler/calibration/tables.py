"""A table for each device, with where its numbers are from.

Few numbers are of a kind that somebody has published: they stand as they were measured. What is
left (shares of products, attention and memory in whole training steps, what collectives beside
kernels cost, and waiting for the slowest machine) is fitted to published speeds of 104 training
runs of MPT decoders (llm-foundry's benchmarking tables, Apache-2.0): 14 numbers of two kinds of
device. docs/predictions.md has the errors, also those of runs that were left out of the fit.
"""

from __future__ import annotations

from dataclasses import replace

from .attention import Attentions
from .network import Network
from .products import Products, Tile
from .table import Table

GIGA = 1e9
RUNS = "fitted to published MPT runs of 2023, 8 to 512 devices: docs/predictions.md"

_GPU_TILES = (
    Tile(256, 128, 1.0),
    Tile(128, 256, 1.0),
    Tile(128, 128, 0.9),
    Tile(128, 64, 0.75),
    Tile(64, 64, 0.6),
)
_NVIDIA = {
    "products.tiles": "sizes that cuBLAS and CUTLASS have for 16-bit operands (NVIDIA, Matrix "
    "Multiplication Background User's Guide, with the waves of tiles); shares: operands read per "
    "FLOP grow as 1/rows + 1/columns",
    "products.fill": "two steps of 32 elements in which a tile's pipeline fills, and its epilogue",
    "kernel_s": "order of an empty kernel's duration",
    "host_s": "order of one eager operator's launch without autograd on a server CPU",
    "network.start_s": "8 × H200, all-reduce of 64 KiB to 512 KiB: 39 µs whatever the size, of two "
    "rounds (ml-engineering, network/benchmarks/results/all-reduce-8xH200)",
    "network.between_bytes_per_s": "one adapter per device: 200 Gb/s on DGX A100 (1,600 Gb/s per "
    "machine, as the runs had), 400 Gb/s on DGX H100; 0.9 of it, as Calculon's a100_80g system has",
    "network.per_machine": "DGX and HGX machines",
    "network.within_latency_s": "order of NCCL's simple protocol over NVLink per hop",
    "network.between_latency_s": "order of an InfiniBand hop, two switches and two PCIe crossings",
}

A100 = Table(
    told="a100: published figures and runs",
    products=Products(units=108, tiles=_GPU_TILES, share={"": 0.746}, fill=64),
    attention=Attentions(forward=0.388, backward=0.291, half_width=7.6, half_tokens=370),
    memory=0.79,
    kernel_s=2e-6,
    host_s=6e-6,
    network=Network(
        per_machine=8,
        within_bytes_per_s=235 * GIGA,
        between_bytes_per_s=22 * GIGA,
        within_latency_s=1e-6,
        between_latency_s=5e-6,
        start_s=30e-6,
    ),
    shared=0.095,
    uneven=0.011,
    sources=_NVIDIA
    | {
        "products.units": "NVIDIA A100 data sheet: multiprocessors",
        "products.share": f"{RUNS}; alone and at its best shape a product reaches 271 of 312 "
        "TFLOP/s, 0.87 (ml-engineering, maximum achievable matmul FLOPS, torch 2.6)",
        "attention": f"{RUNS}, with the kernels of that time: 121 TFLOP/s forward, 91 backward",
        "memory": f"{RUNS}; alone a copy of 1 GiB reaches 0.89 of the peak, and Calculon's "
        "a100_80g system has 0.9 above 100 MB",
        "network.within_bytes_per_s": "0.78 of the 300 GB/s of NVLink 3 in one direction",
        "shared": f"{RUNS}; Calculon's a100_80g system has 0.15 of the processor",
        "uneven": RUNS,
    },
)

H100 = Table(
    told="h100: published figures and runs",
    products=Products(units=132, tiles=_GPU_TILES, share={"": 0.64}, fill=64),
    attention=Attentions(forward=0.225, backward=0.157, half_width=7.6, half_tokens=458),
    memory=0.80,
    kernel_s=2e-6,
    host_s=6e-6,
    network=Network(
        per_machine=8,
        within_bytes_per_s=368 * GIGA,
        between_bytes_per_s=45 * GIGA,
        within_latency_s=1e-6,
        between_latency_s=5e-6,
        start_s=30e-6,
    ),
    shared=0.13,
    uneven=0.011,
    sources=_NVIDIA
    | {
        "products.units": "NVIDIA H100 data sheet, SXM: multiprocessors",
        "products.share": f"{RUNS}; alone and at its best shape a product reaches 795 of 989 "
        "TFLOP/s, 0.80 (ml-engineering, maximum achievable matmul FLOPS, torch 2.7): less in a "
        "run, as clocks fall with power",
        "attention": f"{RUNS}, with the kernels of that time: 223 TFLOP/s forward, 155 backward; "
        "FlashAttention-2 reaches 335 forward (heads of 128, causal, 16k tokens), FlashAttention-3 "
        "616 (figures of the paper of the latter)",
        "attention.half_width": "the A100's: no run on an H100 had heads smaller than 128",
        "memory": RUNS,
        "network.within_bytes_per_s": "8 × H200, the same links, without sums in the switch: "
        "ml-engineering, network/benchmarks/results/all-reduce-8xH200",
        "shared": RUNS,
        "uneven": RUNS,
    },
)

GENERIC = Table(
    told="generic efficiency",
    products=Products(units=100, tiles=_GPU_TILES, share={"": 0.65}, fill=64),
    attention=Attentions(forward=0.3, backward=0.22, half_width=7.6, half_tokens=400),
    memory=0.8,
    kernel_s=3e-6,
    host_s=6e-6,
    network=Network(
        per_machine=8,
        within_bytes_per_s=12 * GIGA,
        between_bytes_per_s=3 * GIGA,
        within_latency_s=3e-6,
        between_latency_s=5e-6,
        start_s=30e-6,
    ),
    shared=0.11,
    uneven=0.011,
    sources=_NVIDIA
    | {
        "": "between the A100's and the H100's; links are those of PCIe Gen3 x16 and of one "
        "adapter of 200 Gb/s for a machine"
    },
)

CPU = Table(
    told="cpu: one generic core",
    products=Products(units=1, tiles=(Tile(32, 32, 1.0),), share={"": 0.9}, fill=16),
    attention=Attentions(forward=0.5, backward=0.4, half_width=16, half_tokens=64),
    memory=0.8,
    kernel_s=3e-6,
    host_s=0.0,
    network=Network(
        per_machine=1024,
        within_bytes_per_s=2 * GIGA,
        between_bytes_per_s=1 * GIGA,
        within_latency_s=20e-6,
        between_latency_s=50e-6,
        start_s=100e-6,
    ),
    shared=1.0,
    uneven=0.0,
    sources={
        "": "orders of what one core of a current server reaches; `pipecompile calibrate` measures",
        "shared": "the core that computes copies messages, too",
    },
)

TABLES = {
    "a100": A100,
    "a100-40gb": replace(A100, told="a100-40gb: published figures and runs"),
    "h100": H100,
    "h200": replace(H100, told="h200: those of the h100, whose multiprocessors and links it has"),
    "cpu": CPU,
}
"""By the names of devices."""


def table_of(name: str) -> Table:
    """The table of a device; a generic one, which says so, where there is none."""
    if name in TABLES:
        return TABLES[name]
    return replace(GENERIC, told=f"generic efficiency: there is no table for {name}")
