"""Text that is on every machine with Python: the sources of its standard library.

A tokenizer is trained on it in a second, so that no example downloads anything.
"""

import random
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "[PAD]", "bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]"}


def sources(package: str) -> list[Path]:
    """The files of a package of the standard library, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib")) / package
    return sorted(path for path in folder.rglob("*.py") if path.stat().st_size > 1000)


def snippets(package: str, count: int, lines: int = 6) -> list[str]:
    """So many pieces of a package's sources, of two lines to so many, the same in every process.

    No line is in two of them. ValueError: the package has fewer.
    """
    chance = random.Random(package)
    text = [line for path in sources(package) for line in path.read_text("utf-8").splitlines()]
    text = [line for line in text if line.strip()]
    starts = chance.sample(range(0, len(text) - lines, lines), count)
    return ["\n".join(text[start : start + chance.randint(2, lines)]) for start in starts]


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of so many tokens, with ``[CLS] ... [SEP]`` around a text, as BERT's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = list(SPECIAL.values())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)
