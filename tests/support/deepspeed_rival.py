"""One training step by DeepSpeed's PipelineModule with ZeRO-1, where DeepSpeed is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import rivals

INSTALLED = importlib.util.find_spec("deepspeed") is not None
BUCKET = 10_000_000  # elements: above the gradients of a stage, far below the default of 2 GB


class _Words(nn.Module):
    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.wte, self.wpe = whole.transformer.wte, whole.transformer.wpe

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))


class _Layer(nn.Module):
    """A block, the last norm or the head."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        return x[0] if isinstance(x, tuple) else x


def pipeline(
    partition_method: str, optimizer: Callable[[Any], torch.optim.Optimizer]
) -> Callable[[], torch.Tensor]:
    """The model rewritten as layers, under DeepSpeed's 1F1B, without recomputation.

    Args:
        partition_method: "parameters" is DeepSpeed's default and gives both stages 4 blocks;
            "uniform" gives the first one 5 and the second the head and the other 3.
    """
    with contextlib.redirect_stdout(sys.stderr):
        deepspeed = _imported()
        from deepspeed.pipe import LayerSpec, PipelineModule

        whole: Any = rivals.model()
        body = whole.transformer
        layers = [*body.h, body.ln_f, whole.lm_head]
        module = PipelineModule(
            [LayerSpec(_Words, whole), *(LayerSpec(_Layer, layer) for layer in layers)],
            num_stages=2,
            loss_fn=rivals.next_word_loss,
            partition_method=partition_method,
        )
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer(module.parameters()), config=_config()
        )
    rows = rivals.batch(seed=1 + engine.grid.get_data_parallel_id())
    pieces = [rows[name].chunk(rivals.MICROBATCHES) for name in ("input_ids", "labels")]
    pairs = list(zip(*pieces, strict=True))
    return lambda: engine.train_batch(iter(pairs))


def _imported() -> Any:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    # Else it compiles, in C++, an all-reduce that only its inference uses.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo")
    return deepspeed


def _config() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": rivals.ROWS // rivals.MICROBATCHES,
        "gradient_accumulation_steps": rivals.MICROBATCHES,
        "steps_per_print": sys.maxsize,
        "gradient_clipping": 0.0,  # DeepSpeed clips to 1 unless told
        "zero_allow_untested_optimizer": True,  # SGD
        "zero_optimization": {
            "stage": 1,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            # Neither the norm nor the copy into one buffer is needed: it is faster without.
            "compute_grad_norm": False,
            "contiguous_gradients": False,
        },
    }
