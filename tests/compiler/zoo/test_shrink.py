"""Tiny configurations: of the same architecture, nothing large, no chance."""

from __future__ import annotations

import pytest
import transformers as hf
from pipecompile.compiler.zoo.families import Architecture, architectures
from pipecompile.compiler.zoo.shrink import LAYERS, VOCABULARY, shrunk
from pipecompile.compiler.zoo.subjects import subject_of
from pipecompile.errors import OptionError


def test_sizes_become_small_and_what_follows_from_them_with_them() -> None:
    config = shrunk(hf.LlamaConfig())
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 4, 128)
    assert config.head_dim == config.hidden_size // config.num_attention_heads


def test_no_probability_is_left() -> None:
    config = shrunk(hf.GPT2Config())
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0, 0, 0)
    assert hf.GPT2Config().resid_pdrop > 0


def test_every_kind_of_layer_is_kept() -> None:
    config = hf.Qwen3NextConfig()
    few = shrunk(config)
    assert set(few.layer_types) == set(config.layer_types)
    assert len(few.layer_types) == few.num_hidden_layers == LAYERS


def test_grouped_heads_stay_grouped_and_others_do_not_become_so() -> None:
    grouped, alike = shrunk(hf.MistralConfig()), shrunk(hf.LlamaConfig())
    assert grouped.num_key_value_heads < grouped.num_attention_heads
    assert alike.num_key_value_heads == alike.num_attention_heads


def test_special_tokens_are_in_the_vocabulary() -> None:
    config = shrunk(hf.Gemma3Config())
    tokens = [config.image_token_id, config.boi_token_index, config.eoi_token_index]
    assert len(set(tokens)) == len(tokens)
    assert max(tokens) < VOCABULARY


def test_inner_configurations_are_shrunk_and_take_their_special_fields() -> None:
    config = shrunk(hf.CLIPConfig(), {"vision_config.hidden_size": 48, "projection_dim": 16})
    assert (config.text_config.hidden_size, config.vision_config.hidden_size) == (32, 48)
    assert config.projection_dim == 16


def test_a_small_value_stays() -> None:
    assert shrunk(hf.BloomConfig(n_layer=2)).n_layer == 2


@pytest.mark.parametrize("name", ["causal-lm/gpt2", "seq2seq-lm/t5", "image-classification/vit"])
def test_models_are_tiny_and_have_a_loss(name: str) -> None:
    subject = subject_of(Architecture(*name.split("/")))
    assert sum(p.numel() for p in subject.model.parameters()) < 200_000
    assert subject.model(**subject.batch()).loss.isfinite()


def test_only_names_a_model_type_in_every_family_or_in_one() -> None:
    families = [each.family for each in architectures([], ["bert"])]
    assert families == ["causal-lm", "masked-lm", "sequence-classification"]
    assert architectures([], ["masked-lm/bert"]) == [Architecture("masked-lm", "bert")]
    with pytest.raises(OptionError, match="--only bort: there is no such"):
        architectures([], ["bort"])
