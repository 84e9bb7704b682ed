"""The sizes in configs/model are those of the models they are named after: parameters, and how many a token meets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from recjax.bridge.decoder import Decoder
from recjax.bridge.decoder_config import of_config, to_config
from recjax.core import config as gin_files
from recjax.core.flags import parse_argv
from recjax.nn.config import TransformerConfig

# Tokens, parameters in all, and those that a token meets, in millions, as their makers give them.
MODELS = {
    "mixtral_8x22b": (32768, 140_630, 39_161),
    "mixtral_8x7b": (32000, 46_703, 12_880),
    "mistral_7b": (32768, 7_248, 7_248),
    "llama_1b": (128256, 1_236, 1_236),
}


def encoder_of(name: str) -> TransformerConfig:
    gin_files.parse(parse_argv([f"--gin_file=configs/model/{name}.gin"]))
    return gin_files.build("transformer.TransformerConfig")


@pytest.mark.parametrize("name", MODELS)
def test_as_many_parameters_as_it_is_known_for(name: str) -> None:
    words, wanted, met = MODELS[name]
    model = Decoder(words=words, encoder=encoder_of(name))
    assert round(model.parameters() / 1e6) == wanted
    assert round((model.parameters() - model.encoder.idle_parameters) / 1e6) == met
    # Training settings aside, a folder of Hugging Face says the same.
    trained = {"remat": "none", "dtype": "float32"}
    plain = dataclasses.replace(model, encoder=dataclasses.replace(model.encoder, **trained))
    assert of_config(to_config(model, "float32"), Path("there")) == plain


def test_the_small_ones_cost_a_token_the_same() -> None:
    moe, dense = (Decoder(words=4000, encoder=encoder_of(name)) for name in ("moe_tiny", "llama_tiny"))
    experts = moe.parameters() - moe.encoder.idle_parameters
    assert experts == pytest.approx(dense.parameters(), rel=0.01)
