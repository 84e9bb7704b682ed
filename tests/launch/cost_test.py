"""Costs read from programs are those that can be worked out by hand."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from recjax.core.module import Functional
from recjax.launch import hlo
from recjax.launch.cost import Cost, convolution_flops, cost_of, trips
from recjax.launch.traffic import groups_of, leaves_slice
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig
from recjax.nn.moe import MoeConfig

F32 = 4


def compiled(function, *shapes: Any, devices: int = 1) -> Cost:
    text = jax.jit(function).lower(*shapes).compile().as_text()
    assert text is not None
    return cost_of(hlo.parse(text), devices=devices)


def shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, np.float32)


def test_products_in_loops_count_as_often_as_they_run() -> None:
    def f(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0].sum()

    forward = 5 * 2 * 16 * 32 * 32
    assert compiled(f, shape(5, 32, 32), shape(16, 32)).flops == forward
    # backward: one product for the weights and one for the stream, and no stream before the first
    found = compiled(jax.grad(f, argnums=(0, 1)), shape(5, 32, 32), shape(16, 32))
    assert (found.flops, found.assumed) == (3 * forward, 0)


def test_what_is_made_again_counts_again() -> None:
    def f(w: jax.Array, x: jax.Array) -> jax.Array:
        @jax.checkpoint
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.sin(jnp.sin(x @ w) @ w), None

        return jax.lax.scan(layer, x, w)[0].sum()

    # two products a layer: forward, both again but for the last whose result nobody asks for, and two for each backward
    product = 5 * 2 * 16 * 32 * 32
    found = compiled(jax.grad(f, argnums=(0, 1)), shape(5, 32, 32), shape(16, 32))
    assert found.flops in ((2 + 2 + 4) * product, (2 + 1 + 4) * product)


def test_attention_and_experts_of_a_layer() -> None:
    b, length, h, k, d, e, f = 2, 32, 4, 16, 64, 4, 96
    config = TransformerConfig(
        num_layers=1, width=d, num_heads=h, head_dim=k, mlp_width=f, ffn="swiglu", norm="rms", position="rotary",
        bias=False, kernel="library", moe=MoeConfig(num_experts=e, top_k=2, kernel="dense"),
    )  # fmt: skip
    model = Functional(functools.partial(Sequence, num_rows=128, encoder=config, max_length=length))
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = {n: jax.ShapeDtypeStruct((b, length), np.int32) for n in ("history_ids", "positions", "segment_ids")}
    found = compiled(lambda p, x: model.apply(p, x, train=True, key=None)["hidden"], params, batch)
    tokens = b * length
    projections, scores, experts = 4 * tokens * d * h * k, 2 * tokens * length * h * k, 3 * tokens * e * d * f
    router, shares = tokens * d * e, tokens * 2 * e
    assert 2 * (projections + scores + experts + router) <= found.flops
    assert found.flops <= 2 * (projections + scores + experts + router + shares)


def test_the_dearest_branch_counts() -> None:
    def f(at: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.cond(at > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    found = compiled(f, jax.ShapeDtypeStruct((), np.int32), shape(64, 64))
    assert found.flops == 2 * 2 * 64**3


def test_a_loop_that_the_data_ends_walks_through_its_array() -> None:
    def f(count: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
        def body(i: jax.Array, out: jax.Array) -> jax.Array:
            part = jax.lax.dynamic_slice_in_dim(x, i * 8, 8)
            return jax.lax.dynamic_update_slice_in_dim(out, part @ w, i * 8, 0)

        return jax.lax.fori_loop(0, count, body, jnp.zeros((48, 16)))

    found = compiled(f, jax.ShapeDtypeStruct((), np.int32), shape(48, 32), shape(32, 16))
    assert (found.flops, found.assumed) == (2 * 48 * 32 * 16, 1)


def test_collectives_of_a_sharded_program() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def put(shape: tuple[int, ...], *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, P(*spec)))

    def island(function, ins, out):
        return jax.shard_map(function, mesh=mesh, in_specs=ins, out_specs=out, check_vma=False)

    x = put((64, 16), "data")
    summed = compiled(island(lambda x: jax.lax.psum(x, "data"), P("data"), P()), x, devices=8)
    part = 8 * 16 * F32
    assert dict(summed.sent) == {"all-reduce": 2 * part * 7 / 8}
    gathered = island(lambda x: jax.lax.all_gather(x, "data", tiled=True), P("data"), P())
    assert dict(compiled(gathered, x, devices=8).sent) == {"all-gather": 7 * part}
    scattered = island(lambda x: jax.lax.psum_scatter(x, "data", tiled=True), P(), P("data"))
    assert dict(compiled(scattered, put((64, 16)), devices=8).sent) == {"reduce-scatter": 7 * part}

    def looped(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(jax.lax.psum(x, "data")), x)

    three = compiled(island(looped, P("data"), P("data")), x, devices=8)
    assert (three.times["all-reduce"], three.sent["all-reduce"]) == (3, 3 * 2 * part * 7 / 8)
    assert three.sent_within() == three.sent["all-reduce"] and not three.sent_between()


def test_memory_traffic_of_an_elementwise_program() -> None:
    found = compiled(lambda x, y: x * y + 1, shape(256, 64), shape(256, 64))
    assert found.memory == 3 * 256 * 64 * F32
    assert found.largest(1)[0].bytes == 256 * 64 * F32


def test_only_the_slice_of_a_stack_is_read() -> None:
    def f(at: jax.Array, stack: jax.Array) -> jax.Array:
        return jnp.sin(jax.lax.dynamic_index_in_dim(stack, at, keepdims=False))

    found = compiled(f, jax.ShapeDtypeStruct((), np.int32), shape(100, 64, 64))
    assert found.memory <= 2 * 64 * 64 * F32 + 16


# A product with a batch of 4 x 2 as a TPU program writes it, a plain one, and a real convolution with padding.
CONVOLUTIONS = [
    (
        "f32[4,2,100,200]",
        "f32[4,2,100,32]",
        "f32[4,2,200,32]",
        "window={size=4x2 stride=3x1 lhs_dilate=4x2}, dim_labels=01bf_01oi->01bf",
        2 * 4 * 2 * 100 * 200 * 32,
    ),
    ("f32[4,20,192]", "f32[4,20,64]", "f32[64,192,1]", "window={size=1}, dim_labels=0bf_io0->0bf", 2 * 80 * 192 * 64),
    ("f32[1,5,3]", "f32[1,5,2]", "f32[3,2,3]", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 13 * 2 * 3),
]


@pytest.mark.parametrize("result, left, right, attributes, expected", CONVOLUTIONS)
def test_convolutions(result: str, left: str, right: str, attributes: str, expected: int) -> None:
    text = (
        f"ENTRY %main (a: {left}, b: {right}) -> {result} {{\n  %a = {left} parameter(0)\n  %b = {right} parameter(1)\n"
        f"  ROOT %c = {result} convolution(%a, %b), {attributes}\n}}\n"
    )
    entry = hlo.parse(text).entry
    assert convolution_flops(entry, entry.root) == expected


@pytest.mark.parametrize(
    "groups, expected",
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", [list(range(8))]),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=(0,4,1,5,2,6,3,7) {'axis_1'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['axis_0'=8] {'axis_0':(4)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("{}", [list(range(8))]),
    ],
)
def test_groups(groups: str, expected: list[list[int]]) -> None:
    text = (
        "ENTRY %main (a: f32[8]) -> f32[8] {\n  %a = f32[8] parameter(0)\n"
        f"  ROOT %r = f32[8] all-reduce(%a), channel_id=1, replica_groups={groups}, to_apply=%add\n}}\n"
    )
    found = hlo.parse(text).entry.root
    assert sorted(map(sorted, groups_of(found, 8).tolist())) == expected
    assert leaves_slice(found, 8, 2) == any(min(group) < 4 <= max(group) for group in expected)


SLICES = """%all-reduce-scatter.1 (input.1: bf16[512,512]) -> bf16[128,512] {
  %input.1 = bf16[512,512]{1,0} parameter(0)
  %all-reduce.12 = bf16[512,512]{1,0} all-reduce(%input.1), channel_id=5, replica_groups={{0,1,2,3}}, to_apply=%add
  %constant.1 = s32[] constant(0)
  ROOT %dynamic-slice.1 = bf16[128,512]{1,0} dynamic-slice(%all-reduce.12, %constant.1, %constant.1), \
dynamic_slice_sizes={128,512}
}

ENTRY %main (a: bf16[512,512]) -> bf16[128,512] {
  %a = bf16[512,512]{1,0} parameter(0)
  %fusion.1 = bf16[128,512]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %fusion.2 = bf16[128,512]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %after-all.1 = token[] after-all()
  %send.1 = (bf16[128,512]{1,0}, u32[], token[]) send(%fusion.1, %after-all.1), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %copy = bf16[128,512]{1,0} copy(%fusion.1)
}
"""


def test_what_leaves_a_slice_is_told_apart() -> None:
    found = cost_of(hlo.parse(SLICES), devices=8, slices=2)
    whole, part = 512 * 512 * 2, 128 * 512 * 2
    # the second fusion is a part of the first
    assert dict(found.sent) == {"reduce-scatter": whole * 3 / 4, "all-reduce between slices": 2 * part / 2}
    assert (found.sent_within(), found.sent_between()) == (whole * 3 / 4, part)


ASYNC = """%gather (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
}

%body (t: (s32[], f32[6,4])) -> (s32[], f32[6,4]) {
  %t = (s32[], f32[6,4]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[6,4] get-tuple-element(%t), index=1
  %start.1 = (f32[6,4], f32[6,4], u32[], u32[]) collective-permute-start(%x), channel_id=1, \\
source_target_pairs={{0,1},{1,0}}
  %done.1 = f32[6,4] collective-permute-done(%start.1)
  %start.2 = (f32[6,4], f32[12,4]) all-gather-start(%done.1), channel_id=2, replica_groups={{0,1}}, dimensions={0}
  %done.2 = f32[12,4] all-gather-done(%start.2)
  ROOT %out = (s32[], f32[6,4]) tuple(%i, %done.1)
}

%condition (p: (s32[], f32[6,4])) -> pred[] {
  %p = (s32[], f32[6,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: bf16[4,8], b: f32[6,4]) -> bf16[16,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = f32[6,4] parameter(1)
  %first = s32[] constant(0)
  %tuple = (s32[], f32[6,4]) tuple(%first, %b)
  %loop = (s32[], f32[6,4]) while(%tuple), condition=%condition, body=%body
  %beside = ((bf16[4,8]), bf16[16,8], u32[]) async-start(%a), calls=%gather
  ROOT %end = bf16[16,8] async-done(%beside), calls=%gather
}
"""


def test_what_is_begun_in_one_place_and_ended_in_another_counts_once() -> None:
    found = cost_of(hlo.parse(ASYNC), devices=8)
    once = 4 * 8 * 2 * 3
    assert dict(found.sent) == {"collective-permute": 7 * 6 * 4 * F32, "all-gather": 7 * 6 * 4 * F32 + once}
    assert dict(found.times) == {"collective-permute": 7, "all-gather": 8}


BESIDE = """%start (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
}

%async_collective_fusion.7 (p: bf16[4,8], x: f32[8,8]) -> f32[8,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %x = f32[8,8]{1,0} parameter(1)
  %all-gather.2 = bf16[16,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %dot = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%end (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.3 = bf16[16,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (a: bf16[4,8], x: f32[8,8]) -> f32[] {
  %a = bf16[4,8]{1,0} parameter(0)
  %x = f32[8,8]{1,0} parameter(1)
  %async-collective-start.1 = bf16[16,8]{1,0} fusion(%a), kind=kCustom, calls=%start
  %fusion.1 = f32[8,8]{1,0} fusion(%a, %x), kind=kOutput, calls=%async_collective_fusion.7
  %async-collective-done.1 = bf16[16,8]{1,0} fusion(%a), kind=kCustom, calls=%end
  %other = bf16[16,8]{1,0} all-gather(%a), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %sum = f32[] constant(0)
}
"""


def test_a_collective_beside_other_work_counts_once_and_others_of_its_channel_too() -> None:
    found = cost_of(hlo.parse(BESIDE), devices=8)
    once = 4 * 8 * 2 * 3
    assert (found.sent["all-gather"], found.times["all-gather"], found.flops) == (2 * once, 2, 2 * 8**3)


LOOP = """%body (p: (u32[], f32[4])) -> (u32[], f32[4]) {
  %p = (u32[], f32[4]) parameter(0)
  %j = u32[] get-tuple-element(%p), index=0
  %x = f32[4] get-tuple-element(%p), index=1
  %more = u32[] constant(STEP)
  %next = u32[] add(%j, %more)
  ROOT %both = (u32[], f32[4]) tuple(%next, %x)
}

%condition (p: (u32[], f32[4])) -> pred[] {
  %p = (u32[], f32[4]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %n = u32[] constant(4)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[4]) -> (u32[], f32[4]) {
  %a = f32[4] parameter(0)
  %first = u32[] constant(START)
  %moved = u32[] copy(%first)
  %t = (u32[], f32[4]) tuple(%moved, %a)
  ROOT %w = (u32[], f32[4]) while(%t), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(("start", "step", "turns"), [(0, 1, 4), (1, 1, 3), (0, 2, 2), (1, 2, 2)])
def test_a_loop_of_which_the_first_turn_was_taken_out_or_that_counts_in_twos(start: int, step: int, turns: int) -> None:
    program = hlo.parse(LOOP.replace("START", str(start)).replace("STEP", str(step)))
    assert trips(program, program.entry, program.entry.root) == (turns, True)
