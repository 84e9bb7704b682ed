"""How much arithmetic a model is, how much of it a device could do, and how much memory was needed.

Training FLOPs per token of a causal transformer with n layers of width d, N parameters in its blocks, rows of
length L and a softmax over V catalogue rows, forward and backward, one multiply-add being two FLOPs:

    C_backbone = 6 N + 12 n L d          C_total = C_backbone + 6 d V

6 N: two for the forward pass and four for the backward pass, for each weight. 12 n L d: scores and their mix with
the values are 2 L d multiply-adds a token and layer, times two, times three. A causal mask needs half of that, as
position i looks at i + 1 of the L; following Chowdhery et al. 2022, appendix B, and most published MFU numbers the
whole is counted unless `is_causal_halved`. 6 d V: the tied or separate output table; looking up the input table
costs nothing. Recomputation (remat) never counts. For small models the last term is most of it, so both are reported.
"""

from __future__ import annotations

import dataclasses
import resource
import sys

import jax

# Peak of dense bfloat16 matrix products, FLOP/s per jax device, by `device_kind`: the first key that it contains.
#   TPU: cloud.google.com/tpu/docs, pages "TPU v4", "v5e", "v5p", "v6e", "TPU7x". A TPU7x chip (2307e12) shows as
#   two jax devices. jax calls v5p "TPU v5", v5e "TPU v5 lite" and v6e "TPU v6 lite".
#   NVIDIA: data sheets of A100 (2021), H100 (2023), H200 (2024), HGX B200 (2025), without sparsity.
PEAK_BF16 = {
    "TPU v4 lite": None,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 2307e12 / 2,
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """Training FLOPs per token, by what they are spent on."""

    weights: float
    attention: float
    softmax: float

    @property
    def backbone(self) -> float:
        """C_backbone: without the softmax over the catalogue."""
        return self.weights + self.attention

    @property
    def total(self) -> float:
        """C_total."""
        return self.backbone + self.softmax


def per_token(
    *,
    parameters: int,
    layers: int,
    length: int,
    width: int,
    rows: int,
    row_width: int | None = None,
    is_causal_halved: bool = False,
) -> TokenFlops:
    """The formula at the top: `parameters` N of the blocks, `layers` n, `length` L, `width` d, `rows` V.

    `width` is that of the heads together and `row_width` that of a catalogue row, where it is another. For a softmax
    over drawn negatives, `rows` is how many are scored.
    """
    attention = 12 * layers * length * width
    return TokenFlops(
        weights=6 * parameters,
        attention=attention * (length + 1) / (2 * length) if is_causal_halved else attention,
        softmax=6 * (width if row_width is None else row_width) * rows,
    )


def peak(device_kind: str | None = None) -> float | None:
    """Peak bfloat16 FLOP/s of one jax device (the first, by default); None for a CPU or an unknown kind."""
    kind = jax.devices()[0].device_kind if device_kind is None else device_kind
    return next((value for key, value in PEAK_BF16.items() if key.lower() in kind.lower()), None)


def mfu(flops_per_second: float, *, devices: int | None = None, device_kind: str | None = None) -> float | None:
    """Model FLOPs utilisation: achieved FLOP/s of all `devices` over their peak; None where no peak is known."""
    best = peak(device_kind)
    return None if best is None else flops_per_second / (best * (devices or jax.device_count()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Most bytes in use at once so far, on the fullest local device or, where devices do not count, of the process."""

    peak_bytes: int
    is_host: bool


def memory() -> Memory:
    """The peak so far; on a CPU the resident set of the process, which all simulated devices share."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return Memory(peak_bytes=max(peaks), is_host=False)
    unit = 1 if sys.platform == "darwin" else 1024
    return Memory(peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, is_host=True)
