"""Sentence encoders of the BERT kind from folders of Hugging Face and sentence-transformers, such as MiniLM.

    config.json, model.safetensors      the BERT
    1_Pooling/config.json               how its outputs become one vector (mean, or that of the first token)
    modules.json                        whether vectors are normalised
    sentence_bert_config.json           how many tokens of a text are read
    tokenizer.json                      read by the library `tokenizers`, where texts are given

All but the first line may be missing. The vector of the first segment, the only one a text has, is added to the
positions.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from recjax.bridge.tensors import CONFIG, Tensors, open_safetensors, refuse
from recjax.core import saved
from recjax.core.errors import CheckpointError
from recjax.core.module import Functional, Params
from recjax.models.sentence import Pool, SentenceEncoder, bert_stack

# What the parameters of a layer are called there, how they lie ([out, in] where turned).
_LAYER = {
    "attention/query": "attention.self.query.weight",
    "attention/query_bias": "attention.self.query.bias",
    "attention/key": "attention.self.key.weight",
    "attention/key_bias": "attention.self.key.bias",
    "attention/value": "attention.self.value.weight",
    "attention/value_bias": "attention.self.value.bias",
    "attention/out": "attention.output.dense.weight",
    "attention/out_bias": "attention.output.dense.bias",
    "attention_norm/scale": "attention.output.LayerNorm.weight",
    "attention_norm/bias": "attention.output.LayerNorm.bias",
    "ffn/inner": "intermediate.dense.weight",
    "ffn/inner_bias": "intermediate.dense.bias",
    "ffn/outer": "output.dense.weight",
    "ffn/outer_bias": "output.dense.bias",
    "ffn_norm/scale": "output.LayerNorm.weight",
    "ffn_norm/bias": "output.LayerNorm.bias",
}
_WORDS, _POSITIONS, _SEGMENTS, _NORM = (
    f"embeddings.{name}"
    for name in ("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight", "LayerNorm.")
)
_UNUSED = ("pooler.", "cls.", "embeddings.position_ids")


def read_bert(path: Path) -> tuple[Functional, Params]:
    """The encoder in a folder and its parameters, a nested dict of float32 arrays.

    Raises `CheckpointError` with every difference when it is not a BERT.
    """
    there = open_safetensors(path)
    model = _model(there)
    found = {name.removeprefix("bert."): name for name in there.shapes}
    signature = saved.signature(jax.eval_shape(model.init, jax.random.key(0)))
    params = {name: np.empty(shape, np.float32) for name, (_, shape) in signature.items()}
    wanted: dict[str, tuple[int, ...]] = {
        _WORDS: params["table"].shape,
        _POSITIONS: (there.config["max_position_embeddings"], there.config["hidden_size"]),
        _SEGMENTS: (there.config.get("type_vocab_size", 2), there.config["hidden_size"]),
        **{f"{_NORM}{name}": params["entry_norm/scale"].shape for name in ("weight", "bias")},
    }
    layers = {
        (path, i): f"encoder.layer.{i}.{name}"
        for path, name in _LAYER.items()
        for i in range(there.config["num_hidden_layers"])
    }
    for (name, i), there_name in layers.items():
        wanted[there_name] = _shape_there(name, params[f"encoder/layers/{name}"][i].shape)
    bare = Tensors(path, {name: there.shapes[full] for name, full in found.items()}, lambda n: there.read(found[n]))
    bare.check(wanted, ignored=[name for name in found if name.startswith(_UNUSED)])
    params["table"][...] = bare.read(_WORDS)
    longest = len(params["position"])
    params["position"][...] = bare.read(_POSITIONS)[:longest] + bare.read(_SEGMENTS)[:1].astype(np.float32)
    for name, there_name in (("scale", "weight"), ("bias", "bias")):
        params[f"entry_norm/{name}"][...] = bare.read(f"{_NORM}{there_name}")
    for (name, i), there_name in layers.items():
        array, here = bare.read(there_name), params[f"encoder/layers/{name}"][i]
        here[...] = (array.T if array.ndim == 2 else array).reshape(here.shape)
    return model, saved.nested(params)


def read_tokenizer(path: Path, max_length: int) -> Callable[[Sequence[str]], np.ndarray]:
    """Texts to int32 [texts, tokens], padded with 0, as `tokenizer.json` says; longer texts are cut.

    Raises `CheckpointError` when there is none, or the library `tokenizers` is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise CheckpointError(
            "reading a tokenizer of Hugging Face needs the library tokenizers", mend="pip install tokenizers"
        ) from None
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError("tokenizer.json is missing", where=str(path))
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()

    def encode(texts: Sequence[str]) -> np.ndarray:
        found = [e.ids for e in tokenizer.encode_batch(list(texts))]
        out = np.zeros((len(found), max(map(len, found), default=1)), np.int32)
        for row, ids in zip(out, found, strict=True):
            row[: len(ids)] = ids
        return out

    return encode


def _model(there: Tensors) -> Functional:
    config, path = there.config, there.where
    lines = [
        f"different: {name} = {config.get(name, value)!r}, not {value!r}"
        for name, value in (("model_type", "bert"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute"))
        if config.get(name, value) != value
    ]
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes = (*sizes, "max_position_embeddings")
    lines += [f"missing: {name} in {CONFIG}" for name in sizes if not isinstance(config.get(name), int)]
    pooling = _json(path / "1_Pooling" / CONFIG) or {"pooling_mode_mean_tokens": True}
    modes = sorted(name for name, on in pooling.items() if name.startswith("pooling_mode_") and on is True)
    pools: dict[str, Pool] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}
    if len(modes) != 1 or modes[0] not in pools:
        lines.append(f"different: vectors are pooled by {modes}, not by one of {sorted(pools)}")
    refuse(lines, path)
    read = _json(path / "sentence_bert_config.json").get("max_seq_length")
    normalize = any("Normalize" in m.get("type", "") for m in _json(path / "modules.json", []))
    encoder = bert_stack(
        num_layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        norm_epsilon=config.get("layer_norm_eps", 1e-12),
    )
    return Functional(
        functools.partial(
            SentenceEncoder,
            num_rows=there.shapes.get(_WORDS, there.shapes.get(f"bert.{_WORDS}", (config["vocab_size"],)))[0],
            encoder=encoder,
            max_length=min(config["max_position_embeddings"], read or config["max_position_embeddings"]),
            pool=pools[modes[0]],
            normalize=normalize,
        )
    )


def _shape_there(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a layer's array there, from that of the parameter."""
    if name.endswith(("bias", "scale")):
        return (int(np.prod(shape)),)
    inputs = 2 if name == "attention/out" else 1
    return int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs]))


def _json(file: Path, default: Any = None) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {} if default is None else default
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read this file: {error}", where=str(file), mend="copy it again") from error
