"""T5 1.1 from and to files: which model a folder holds, its parameters, and the way back.

Read: Hugging Face (`config.json` and safetensors) and T5X. Written: Hugging Face, with a head of its own and the flag
that says so. A folder that is not exactly a T5 1.1 is refused with everything that differs; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recjax.bridge import t5x
from recjax.bridge.t5 import Piece, Sizes, World, pieces
from recjax.bridge.tensors import CONFIG, Tensors, open_safetensors, refuse, write_safetensors
from recjax.core import saved
from recjax.core.errors import CheckpointError
from recjax.core.saved import Signature
from recjax.nn.relative import T5_BUCKETS, T5_FURTHEST

# What every T5 1.1 says in its config.json; a field that is left out has this value.
_SAYS: dict[str, Any] = {
    "relative_attention_num_buckets": T5_BUCKETS,
    "relative_attention_max_distance": T5_FURTHEST,
    "layer_norm_epsilon": 1e-6,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
_EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # some files repeat the shared table
# A file of 5 GB at most, as Hugging Face writes them.
SHARD_BYTES = 5_000_000_000


def read_t5(path: Path) -> tuple[Sizes, dict[str, Any]]:
    """The sizes of the T5 1.1 in a folder, and its parameters as a nested dict of float32 arrays.

    Rows of the tables are the ids of its own vocabulary. One foreign array is in memory at a time. Raises
    `CheckpointError` with every difference when the folder holds another model, or none.
    """
    world: World
    if (path / CONFIG).is_file():
        world, there = "hf", open_safetensors(path)
        sizes = _of_config(there)
    elif (path / t5x.FILE).is_file():
        world, there = "t5x", t5x.open_t5x(path)
        sizes = _of_shapes(there)
    else:
        raise CheckpointError(
            "there is no checkpoint of T5 here",
            where=str(path),
            expected=f"{CONFIG} and model.safetensors (Hugging Face), or a file {t5x.FILE} (T5X)",
        )
    parts = pieces(sizes, world)
    there.check({part.name: part.shape for part in parts}, ignored=_EMBEDDINGS)
    params = {name: np.empty(shape, np.float32) for name, (_, shape) in sizes.signature().items()}
    for part in parts:
        params[part.path][... if part.layer is None else part.layer] = part.read(there.read(part.name))
    return sizes, saved.nested(params)


def write_t5(
    out: Path,
    signature: Signature,
    read: Callable[[str], np.ndarray],
    *,
    dtype: Any = np.float32,
    shard_bytes: int = SHARD_BYTES,
) -> Sizes:
    """A folder for Hugging Face from the parameters of an `EncoderDecoder`, and its sizes.

    `signature` says which parameters there are, `read` gives the array of a path; one parameter is held at a time,
    and one file. Raises `CheckpointError` when it is not T5 1.1, or when `out` exists.
    """
    sizes = _of_signature(signature, out)
    held: dict[str, np.ndarray] = {}

    def array(part: Piece) -> np.ndarray:
        if part.path not in held:
            held.clear()
            held[part.path] = read(part.path)
        whole = held[part.path]
        return part.write(whole if part.layer is None else whole[part.layer])

    tensors = {part.name: (part.shape, lambda part=part: array(part)) for part in pieces(sizes, "hf")}
    config = _config(sizes, str(np.dtype(dtype)))
    write_safetensors(out, config, tensors, dtype=np.dtype(dtype), shard_bytes=shard_bytes)
    return sizes


def _of_config(there: Tensors) -> Sizes:
    config = there.config
    lines = [
        f"different: {name} = {config[name]!r}, not {value!r}"
        for name, value in _SAYS.items()
        if config.get(name, value) != value
    ]
    if config.get("model_type") not in ("t5", "mt5"):
        lines.append(f"different: model_type = {config.get('model_type')!r}, not 't5'")
    if config.get("feed_forward_proj", "relu") != "gated-gelu":
        lines.append(f"different: feed_forward_proj = {config.get('feed_forward_proj', 'relu')!r}, not 'gated-gelu'")
    if config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False):
        lines.append("different: outputs are scaled, as those of T5 1.0 are (tie_word_embeddings is not false)")
    names = ("vocab_size", "d_model", "num_heads", "d_kv", "d_ff", "num_layers")
    lines += [f"missing: {name} in {CONFIG}" for name in names if not isinstance(config.get(name), int)]
    refuse(lines, there.where)
    return Sizes(
        rows=there.shapes.get("shared.weight", (config["vocab_size"],))[0],  # files may have padded rows
        width=config["d_model"],
        num_heads=config["num_heads"],
        head_dim=config["d_kv"],
        mlp_width=config["d_ff"],
        encoder_layers=config["num_layers"],
        decoder_layers=config.get("num_decoder_layers") or config["num_layers"],
        is_tied="lm_head.weight" not in there.shapes,
    )


def _of_shapes(there: Tensors) -> Sizes:
    shapes = there.shapes

    def layers(stack: str) -> int:
        return len({n.split("/")[1] for n in shapes if n.startswith(f"{stack}/layers_")})

    ends = ("token_embedder/embedding", "encoder/relpos_bias/rel_embedding")
    first = ("encoder/layers_0/attention/query/kernel", "encoder/layers_0/mlp/wi_0/kernel")
    refuse([f"missing: {name}" for name in (*ends, *first) if len(shapes.get(name, ())) != 2], there.where)
    (rows, width), (heads, _) = shapes[ends[0]], shapes[ends[1]]
    return Sizes(
        rows=rows,
        width=width,
        num_heads=heads,
        head_dim=shapes[first[0]][1] // heads,
        mlp_width=shapes[first[1]][1],
        encoder_layers=layers("encoder"),
        decoder_layers=layers("decoder"),
        is_tied="decoder/logits_dense/kernel" not in shapes,
    )


def _of_signature(signature: Signature, where: Path) -> Sizes:
    shapes: Mapping[str, tuple[int, ...]] = {path: shape for path, (_, shape) in signature.items()}
    try:
        (rows, width), (layers, _, heads, head_dim) = shapes["table"], shapes["encoder/layers/attention/query"]
        sizes = Sizes(
            rows=rows,
            width=width,
            num_heads=heads,
            head_dim=head_dim,
            mlp_width=shapes["encoder/layers/ffn/inner"][2],
            encoder_layers=layers,
            decoder_layers=shapes["decoder/layers/attention/query"][0],
        )
    except (KeyError, ValueError, IndexError):
        lines = ["there are no encoder and decoder of T5 1.1 among the parameters"]
    else:
        lines = saved.differences({p: ("float32", shape) for p, shape in shapes.items()}, sizes.signature())
        if not lines:
            return sizes
    raise CheckpointError(
        "this model has no place in Hugging Face's T5:\n    " + "\n    ".join(lines),
        where=str(where),
        expected="a seq2seq.EncoderDecoder of two seq2seq.t5_stack",
    )


def _config(sizes: Sizes, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": sizes.rows,
        "d_model": sizes.width,
        "d_kv": sizes.head_dim,
        "d_ff": sizes.mlp_width,
        "num_layers": sizes.encoder_layers,
        "num_decoder_layers": sizes.decoder_layers,
        "num_heads": sizes.num_heads,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "torch_dtype": dtype,
        **_SAYS,
    }
