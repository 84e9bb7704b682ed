"""The text of compiled programs: read as it was written, whatever kind of device it is for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from recjax.launch import hlo

TPU = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[]}

%fused_computation (param_0.1: f32[8,4], param_1: s32[]) -> f32[1,4] {
  %param_0.1 = f32[8,4]{1,0:T(8,128)S(1)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  ROOT %dynamic-slice.1 = f32[1,4]{1,0:T(8,128)} dynamic-slice(%param_0.1, %param_1, %param_1), \
dynamic_slice_sizes={1,4}, metadata={op_name="jit(f)/while/body/dynamic_slice" stack_frame_id=3}
}

ENTRY %main.9 (Arg_0.1: f32[8,4]) -> f32[] {
  %Arg_0.1 = f32[8,4]{1,0:T(8,128)} parameter(0)
  %constant.1 = s32[] constant(3)
  %fusion.2 = (f32[1,4]{1,0:T(8,128)}, /*index=1*/bf16[2,2]{1,0:T(8,128)(2,1)S(1)}) fusion(%Arg_0.1, %constant.1), \
kind=kLoop, calls=%fused_computation, metadata={op_name="jit(f)/while/body/dynamic_slice"}, \
backend_config={"flag_configs":[],"estimated_cycles":"12"}
  ROOT %custom-call.3 = f32[] custom-call(%fusion.2), custom_call_target="tpu_call", window={size=3x3 pad=1_1x0_2}
}
"""


def test_a_tpu_program_is_read() -> None:
    program = hlo.parse(TPU)
    assert program.entry.name == "main.9"
    assert [i.opcode for i in program.entry] == ["parameter", "constant", "fusion", "custom-call"]
    fusion = program.entry["fusion.2"]
    assert [str(s) for s in fusion.shapes] == ["f32[1,4]", "bf16[2,2]"]
    assert [s.memory for s in fusion.shapes] == [0, 1]
    assert [s.bytes for s in fusion.shapes] == [16, 8]
    assert fusion.operands == ("Arg_0.1", "constant.1")
    assert fusion.called == {"calls": "fused_computation"}
    assert fusion.op_name == "jit(f)/while/body/dynamic_slice"
    root = program.entry.root
    assert (root.attribute("custom_call_target"), root.attribute("window")) == ("tpu_call", "{size=3x3 pad=1_1x0_2}")
    assert program["fused_computation"].root.dims("dynamic_slice_sizes") == (1, 4)
    assert program.entry["constant.1"].literal == "3"


LINES = """%called (p: s32[4]) -> s32[4] {
  ROOT %p = s32[4]{0} parameter(0)
}, execution_thread="sparsecore"

ENTRY %main.1 (a: f32[8,4]) -> f32[8] {
  %a = f32[8,4]{1,0} parameter(0)
  %splash.1 = (f32[8], f32[8]) custom-call(%a), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="attention"}, backend_config={"body":"AA=="}
  ROOT %out = f32[8] get-tuple-element(%splash.1), index=1, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="last"}
}
"""


def test_a_kernel_may_speak_in_lines_of_its_own() -> None:
    program = hlo.parse(LINES)
    assert [i.name for i in program.entry] == ["a", "splash.1", "out"]
    assert [i.op_name for i in program.entry] == ["", "attention", "last"]
    assert 'block_q\\": 512' in program.entry["splash.1"].attributes
    assert program.entry.root.operands == ("splash.1",)
    assert [i.name for i in program["called"]] == ["p"]


def test_uses_are_found() -> None:
    inside = hlo.parse(TPU)["fused_computation"]
    assert [(i.name, at) for i, at in inside.users("param_1")] == [("dynamic-slice.1", 1), ("dynamic-slice.1", 2)]
    assert inside.operand(inside.root, 0) is inside["param_0.1"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("f32[]", 4),
        ("pred[7]{0}", 7),
        ("s4[2,3]{1,0:T(8,128)E(4)}", 3),
        ("(bf16[8,128]{1,0}, u32[], token[])", 2048 + 4),
        ("f8e4m3fn[16]", 16),
        ("((f32[2], c64[3]), s64[1])", 8 + 24 + 8),
    ],
)
def test_bytes_of_types(text: str, expected: int) -> None:
    assert sum(s.bytes for s in hlo.shapes_of(text)) == expected


def test_what_jax_compiles_here_is_read() -> None:
    def f(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, None, length=3)[0].sum()

    text = jax.jit(jax.grad(f)).lower(jnp.zeros((8, 8))).compile().as_text()
    assert text is not None
    program = hlo.parse(text)
    assert any(i.opcode == "while" for c in program.computations.values() for i in c)
    assert str(program.entry.root.shapes[0]) == "f32[8,8]"
    for computation in program.computations.values():
        for i in computation:
            assert all(name in computation.instructions for name in i.operands if i.opcode not in ("while", "call"))
            assert all(name in program.computations for name in i.called.values())


def test_other_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("module @jit_f {\n}\n")
