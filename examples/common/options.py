"""Options that all examples have."""

import argparse

import torch
from transformers.utils import logging


def parser(description: str | None) -> argparse.ArgumentParser:
    """With ``--stages``, ``--dp``, ``--seed`` and ``--compare``; the script adds its own."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--stages", type=int, default=2, help="parts of the model (2)")
    made.add_argument("--dp", type=int, default=1, help="replicas of the pipeline (1)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument(
        "--compare",
        action="store_true",
        help="train the plain model on one device too, without dropout, and compare",
    )
    return made


def settle(seed: int) -> None:
    """Every process builds the same weights; equal numbers need equal threads: one for each."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
