"""The arithmetic of kernels is what their formulas say, counted pair by pair."""

from __future__ import annotations

import numpy as np
import pytest

from recjax.launch import hlo
from recjax.launch.cost import cost_of
from recjax.launch.kernel_flops import kernel_flops

B, H, G, Q, S, K = 2, 4, 2, 1024, 2048, 128
RAGGED = """ENTRY %main (a: bf16[96,64]) -> bf16[96,32] {
  %n = s32[1]{0} parameter(0)
  %ends = s32[5]{0} parameter(1)
  %x = bf16[96,64]{1,0} parameter(2)
  %w = bf16[4,64,32]{2,1,0} parameter(3)
  %ragged-dot-metadata.1 = (s32[5]{0}, s32[1]{0}) custom-call(%ends), custom_call_target="tpu_custom_call"
  ROOT %ragged-dot-none.6 = bf16[96,32]{1,0} custom-call(%n, %ends, %ends, %ends, %n, /*index=5*/%x, %w), \
custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/ragged-dot-none"}
}
"""
SPLASH = f"""ENTRY %main (q: bf16[{B},{H},{Q},{K}]) -> bf16[{B},{H},{Q},{K}] {{
  %mask = s8[1,2,4]{{2,1,0}} parameter(0)
  %q = bf16[{B},{H},{Q},{K}]{{3,2,1,0}} parameter(1)
  %k = bf16[{B},{G},{S},{K}]{{3,2,1,0}} parameter(2)
  %v = bf16[{B},{G},{S},{K}]{{3,2,1,0}} parameter(3)
  ROOT %splash_mha_PART_segmented.1 = bf16[{B},{H},{Q},{K}]{{3,2,1,0}} custom-call(%mask, %mask, %q, %k, %v), \
custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{\\"block_q\\": 512, \\"block_kv\\": 256, \\"block_q_dkv\\": 256, \\"block_kv_dkv\\": 512, \\
\\"block_q_dq\\": 128, \\"block_kv_dq\\": 1024}}"
}}}}, metadata={{op_name="jit(f)/vmap(SCOPE)/pallas_call"}}
}}
"""


MEGABLOX = """ENTRY %main (x: bf16[96,64], w: bf16[4,32,64], g: bf16[96,32]) -> bf16[4,64,32] {
  %ends = s32[5]{0} parameter(0)
  %x = bf16[96,64]{1,0} parameter(1)
  %w = bf16[4,32,64]{2,1,0} parameter(2)
  %g = bf16[96,32]{1,0} parameter(3)
  %turned = bf16[64,96]{0,1} transpose(%x), dimensions={1,0}
  %gmm.5 = bf16[96,32]{1,0} custom-call(%ends, %x, %w), custom_call_target="tpu_custom_call", \\
metadata={op_name="jit(f)/shard_map/jit(gmm)/pallas_call"}
  ROOT %tgmm.3 = bf16[4,64,32]{2,1,0} custom-call(%ends, %turned, %g), custom_call_target="tpu_custom_call", \\
metadata={op_name="jit(f)/transpose(jvp())/shard_map/jit(tgmm)/pallas_call"}
}
"""


def flops(text: str, **more: float) -> float | None:
    entry = hlo.parse(text).entry
    return kernel_flops(entry, entry.root, **more)


def test_rows_of_groups() -> None:
    assert flops(RAGGED) == 2 * 96 * 64 * 32
    assert flops(RAGGED, grouped=0.25) == 24 * 2 * 64 * 32
    # the rows of each group are laid out by another kernel, which multiplies nothing
    found = cost_of(hlo.parse(RAGGED), grouped=0.25)
    assert found.flops == 24 * 2 * 64 * 32 and not found.kernels


def test_rows_of_groups_by_megablox() -> None:
    found = cost_of(hlo.parse(MEGABLOX), grouped=0.25)
    assert found.flops == 2 * (24 * 2 * 64 * 32) and not found.kernels


@pytest.mark.parametrize(
    "part, products, block_q, block_k", [("fwd", 2, 512, 256), ("dkv", 4, 256, 512), ("dq", 3, 128, 1024)]
)
def test_blocks_of_attention(part: str, products: int, block_q: int, block_k: int) -> None:
    every = SPLASH.replace("PART", part)
    assert flops(every) == products * 2 * B * H * Q * S * K
    sees = np.tril(np.ones((Q, S), bool))
    blocks = sees.reshape(Q // block_q, block_q, S // block_k, block_k).any((1, 3)).sum()
    assert 0 < blocks < Q * S / (block_q * block_k)
    causal = flops(every.replace("SCOPE", "causal_attention"))
    assert causal == products * 2 * B * H * blocks * block_q * block_k * K


def test_other_kernels_are_named() -> None:
    found = cost_of(hlo.parse(RAGGED.replace("ragged-dot-none", "something")))
    assert (found.flops, dict(found.kernels)) == (0, {"tpu_custom_call": 1})
