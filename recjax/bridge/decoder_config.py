"""The `config.json` of a language model and the `TransformerConfig` that is the same model, both ways.

What a file says that our block does not do is listed and refused, never left out: a sliding window, scores that are
capped, biases in other places, a rope whose speed follows the length of the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recjax.bridge.decoder import Decoder
from recjax.bridge.tensors import CONFIG, refuse
from recjax.core.errors import CheckpointError
from recjax.nn.moe import MoeConfig
from recjax.nn.rotary import RopeScaling
from recjax.nn.transformer import TransformerConfig

# What their class is called, the base of its rope and the epsilon of its norms where the file does not say.
_CLASSES = {
    "llama": ("LlamaForCausalLM", 10000.0, 1e-6),
    "mistral": ("MistralForCausalLM", 10000.0, 1e-6),
    "mixtral": ("MixtralForCausalLM", 1000000.0, 1e-5),
    "qwen2": ("Qwen2ForCausalLM", 10000.0, 1e-6),
    "qwen3": ("Qwen3ForCausalLM", 10000.0, 1e-6),
}
FAMILIES = tuple(_CLASSES)
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What a field must be if it is there.
_SAYS: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
# Our names of what the scalings of a rope have, and theirs. Llama's ramp is given in turns over the trained length.
_RAMPS = {"yarn": ("beta_fast", "beta_slow"), "llama3": ("high_freq_factor", "low_freq_factor")}
# What a block of theirs is, whatever its sizes.
_BLOCK: dict[str, Any] = {"position": "rotary", "norm": "rms", "ffn": "swiglu", "bias": False}


def of_config(config: Mapping[str, Any], where: Path) -> Decoder:
    """The model that a `config.json` describes.

    Raises `CheckpointError` with everything in it that ours cannot be.
    """
    family = config.get("model_type")
    lines = [f"missing: {name} in {CONFIG}" for name in _SIZES if not isinstance(config.get(name), int)]
    lines += [
        f"different: {name} = {config[name]!r}, not {value!r}"
        for name, value in _SAYS.items()
        if config.get(name, value) not in (value, None)
    ]
    if family not in _CLASSES:
        lines.append(f"different: model_type = {family!r}, not one of {FAMILIES}")
    longest, window = config.get("max_position_embeddings", 4096), config.get("sliding_window")
    if window and "use_sliding_window" not in config and window < longest:
        lines.append(f"different: sliding_window = {window}, below max_position_embeddings = {longest}, not null")
    theta, scaling = _of_rope(config, longest, lines)
    refuse(lines, where)
    _, usual_theta, usual_epsilon = _CLASSES[str(family)]
    moe = None
    if family == "mixtral":
        moe = MoeConfig(num_experts=config.get("num_local_experts", 8), top_k=config.get("num_experts_per_tok", 2))
    encoder = TransformerConfig(
        **_BLOCK,
        num_layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        norm_epsilon=config.get("rms_norm_eps", usual_epsilon),
        rope_theta=theta or usual_theta,
        rope_scaling=scaling,
        max_length=longest,
        moe=moe,
        qkv_bias=True if family == "qwen2" else None,
        qk_norm=family == "qwen3",
        tied_head=bool(config.get("tie_word_embeddings", False)),
    )
    return Decoder(words=config["vocab_size"], encoder=encoder)


def to_config(decoder: Decoder, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model; raises `CheckpointError` with everything that theirs cannot be."""
    c = decoder.encoder
    same = {name: getattr(c, name) for name in _BLOCK} | {"place": c.place, "attention": c.attention}
    same |= {"residual": c.residual, "relative": c.relative, "score_scale": c.score_scale, "causal": c.causal}
    same |= {"logit_scale": c.logit_scale, "final_norm": c.final_norm, "cross": c.cross}
    plain = {**_BLOCK, "place": "pre", "attention": "softmax", "residual": "plain", "relative": "none"}
    plain |= {"score_scale": None, "causal": True, "logit_scale": 1.0, "final_norm": True, "cross": False}
    lines = [
        f"TransformerConfig.{name} = {same[name]!r}, not {plain[name]!r}" for name in plain if same[name] != plain[name]
    ]
    special = [name for name, on in (("moe", c.moe), ("qkv_bias", c.has_qkv_bias), ("qk_norm", c.qk_norm)) if on]
    if len(special) > 1:
        lines.append(f"TransformerConfig has {' and '.join(special)}, of which a family has one")
    if lines:
        raise CheckpointError(
            "this model has no place among Hugging Face's decoders:\n    " + "\n    ".join(lines),
            expected=f"the block of one of {FAMILIES}",
        )
    family = {"moe": "mixtral", "qkv_bias": "qwen2", "qk_norm": "qwen3"}[special[0]] if special else "llama"
    config: dict[str, Any] = {
        "architectures": [_CLASSES[family][0]],
        "model_type": family,
        "vocab_size": decoder.words,
        "hidden_size": c.width,
        "intermediate_size": c.inner_width,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_epsilon,
        "max_position_embeddings": c.max_length,
        "tie_word_embeddings": c.tied_head,
        "torch_dtype": dtype,
        **_to_rope(c),
    }
    if c.moe is not None:
        config |= {"num_local_experts": c.moe.num_experts, "num_experts_per_tok": c.moe.top_k, "sliding_window": None}
    return config


def as_gin(encoder: TransformerConfig) -> str:
    """The model as a file to include in a recipe."""
    lines, imports = [], ["from recjax.nn import transformer"]
    for field in dataclasses.fields(encoder):
        value = getattr(encoder, field.name)
        if value == field.default:
            continue
        if dataclasses.is_dataclass(value):
            module, kind = type(value).__module__.rsplit(".", 1)[1], type(value).__name__
            imports.append(f"from recjax.nn import {module}")
            lines += [
                f"{module}.{kind}.{inner.name} = {getattr(value, inner.name)!r}"
                for inner in dataclasses.fields(value)
                if getattr(value, inner.name) != inner.default
            ]
            value = f"@{module}.{kind}()"
        else:
            value = repr(value)
        lines.append(f"transformer.TransformerConfig.{field.name} = {value}")
    return "\n".join(["from __gin__ import dynamic_registration", *imports, "", *lines]) + "\n"


def _of_rope(config: Mapping[str, Any], longest: int, lines: list[str]) -> tuple[float | None, RopeScaling | None]:
    """The base of the rope, None where it is not said, and its scaling; adds to `lines` what is not ours.

    Older files have `rope_theta` and `rope_scaling`, newer ones `rope_parameters` with both in one.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "yarn", "llama3"):
        lines.append(f"different: a rope of type {kind!r}, not 'default', 'linear', 'yarn' or 'llama3'")
        return theta, None
    if not isinstance(rope.get("factor"), int | float):
        lines.append(f"missing: the factor of a rope of type {kind!r}")
        return theta, None
    trained = rope.get("original_max_position_embeddings") or longest
    scaling = RopeScaling(kind=kind, factor=float(rope["factor"]), trained_length=trained)
    ends = zip(("fast", "slow"), _RAMPS.get(kind, ()), reversed(scaling.turns), strict=False)
    own = {end: rope[name] for end, name, usual in ends if rope.get(name) not in (None, usual)}
    scaling = dataclasses.replace(scaling, **own)
    if (
        rope.get("attention_factor") not in (None, scaling.growth)
        or rope.get("mscale")
        or not rope.get("truncate", True)
    ):
        lines.append("different: a rope with attention_factor, mscale or truncate of its own")
    return theta, scaling


def _to_rope(c: TransformerConfig) -> dict[str, Any]:
    """Both ways to write a rope; they say the same."""
    scaling, theta = c.rope_scaling, c.rope_theta
    if scaling is None or scaling.kind == "ntk":  # ntk is another theta
        theta = theta if scaling is None else scaling.slower(theta, c.head_width)
        return {"rope_theta": theta, "rope_parameters": {"rope_theta": theta, "rope_type": "default"}}
    rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        slow, fast = scaling.turns
        rope |= {"original_max_position_embeddings": scaling.trained_length}
        rope |= dict(zip(_RAMPS[scaling.kind], (fast, slow), strict=True))
    return {"rope_theta": theta, "rope_scaling": rope, "rope_parameters": {"rope_theta": theta, **rope}}
