"""What compiled programs move: known answers on eight simulated devices, and the ways in which XLA writes things."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sslx.models.attention import attend
from sslx.planning import hlo, topology, traffic
from sslx.settings import MeshConfig
from sslx.train.sharding import make_mesh, on_mesh

ROWS, WIDTH = 16, 32
SIZE = 4 * ROWS * WIDTH  # bytes of the whole float32 array
SHARD = SIZE // 8


SPLIT, WHOLE = PartitionSpec("x"), PartitionSpec()


def compiled_text(function, *, spec=SPLIT, out=SPLIT):
    """The optimised program of a function under shard_map over eight devices."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False)
    argument = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, spec))
    return jax.jit(mapped).lower(argument).compile().as_text()


def compiled(function, **specs):
    return hlo.parse(compiled_text(function, **specs))


def found(module, slice_of=(0,) * 8):
    return traffic.collectives(module, slice_of)


def looped(body, turns):
    return lambda x: jax.lax.scan(lambda x, _: (body(x), None), x, None, length=turns)[0]


def test_a_reduction_in_a_loop_counts_as_often_as_the_loop_turns():
    (one,) = found(compiled(looped(lambda x: jax.lax.psum(jnp.tanh(x), "x") / 8, 7)))
    assert (one.kind, one.bytes, one.times, one.group) == ("all-reduce", SHARD, 7, 8)
    assert one.ici_sent == 7 * 2 * SHARD * 7 / 8
    assert one.dcn_sent == 0


def test_loops_in_loops_multiply():
    inner = looped(lambda x: jax.lax.psum(jnp.tanh(x), "x") / 8, 3)
    (one,) = found(compiled(looped(lambda x: inner(jnp.sin(x)), 7)))
    assert one.times == 21


def test_a_while_loop_with_a_counter_of_its_own_is_counted():
    def function(x):
        def body(state):
            i, x = state
            return i + 2, jax.lax.psum(jnp.tanh(x), "x") / 8

        return jax.lax.while_loop(lambda state: state[0] < 11, body, (1, x))[1]

    (one,) = found(compiled(function))
    assert one.times == 5  # 1, 3, 5, 7, 9


def test_trips_are_found_where_xla_has_not_noted_them():
    text = compiled_text(looped(lambda x: jax.lax.psum(jnp.tanh(x), "x") / 8, 7))
    assert "known_trip_count" in text
    silent = hlo.parse(text.replace("known_trip_count", "unknown"))
    assert [one.times for one in found(silent)] == [7]


def test_a_loop_of_unknown_length_is_told():
    def function(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 3.0, lambda x: jax.lax.psum(jnp.exp(x), "x"), x)

    module, unknown = compiled(function), []
    assert [one.instruction.opcode for one in hlo.executions(module, unknown)]
    assert len(unknown) == 1
    assert all(one.times == 1 for one in found(module))


def test_every_kind_is_found_with_the_bytes_that_a_chip_sends():
    gather = found(compiled(lambda x: jax.lax.all_gather(x, "x", tiled=True), out=WHOLE))
    assert [(one.kind, one.bytes, one.ici_sent) for one in gather] == [("all-gather", SHARD, SIZE * 7 / 8)]
    scatter = found(compiled(lambda x: jax.lax.psum_scatter(x, "x", tiled=True), spec=WHOLE))
    assert [(one.kind, one.bytes, one.ici_sent) for one in scatter] == [("reduce-scatter", SIZE, SIZE * 7 / 8)]
    around = [(i, (i + 1) % 8) for i in range(8)]
    permute = found(compiled(functools.partial(jax.lax.ppermute, axis_name="x", perm=around)))
    assert [(one.kind, one.bytes, one.ici_sent) for one in permute] == [("collective-permute", SHARD, SHARD)]
    swap = found(compiled(lambda x: jax.lax.all_to_all(x, "x", 1, 0, tiled=True)))
    assert [(one.kind, one.bytes, one.ici_sent) for one in swap] == [("all-to-all", SHARD, SHARD * 7 / 8)]


def test_what_crosses_slices_is_told_apart():
    module = compiled(lambda x: jax.lax.psum(x, "x"), out=WHOLE)
    (one,) = found(module, (0, 0, 0, 0, 1, 1, 1, 1))
    assert (one.group, one.slices) == (8, 2)
    assert one.ici_sent == 2 * SHARD * 3 / 4  # inside: scattered and gathered over four
    assert one.dcn_sent == 2 * (SHARD / 4) / 2  # across: a quarter, reduced over two
    around = [(i, (i + 1) % 8) for i in range(8)]
    module = compiled(functools.partial(jax.lax.ppermute, axis_name="x", perm=around))
    assert found(module, (0, 0, 0, 0, 1, 1, 1, 1))[0].dcn_sent == SHARD
    assert found(module, (0,) * 8)[0].dcn_sent == 0


def test_groups_are_read_however_xla_writes_them():
    read = functools.partial(traffic.replica_groups, devices=8)
    halves = [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert read("replica_groups={{0,1,2,3},{4,5,6,7}}, x") == halves
    assert read("replica_groups=[2,4]<=[8], x") == halves
    assert read("replica_groups=[4,2]<=[2,4]T(1,0), x") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert read("replica_groups={}, x") == [list(range(8))]
    assert read("channel_id=1") == [list(range(8))]
    assert read("replica_groups=mesh['a'=2,'b'=4] {'b'}, x") == halves
    assert read("replica_groups=mesh['a'=2,'b'=4] {'a'}, x") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert read("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, x") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert read("replica_groups=mesh['a'=8] {'a':(2)2}, x") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    with pytest.raises(ValueError, match="cannot read the groups"):
        read("replica_groups=?")


ASYNCHRONOUS = """HloModule jit_f, num_partitions=8

%wrapped (p: f32[8]) -> f32[64] {
  %p = f32[8]{0} parameter(0)
  ROOT %all-gather.1 = f32[64]{0} all-gather(%p), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}
}

%started (q: f32[8]) -> f32[64] {
  %q = f32[8]{0} parameter(0)
  %all-gather.2 = f32[64]{0} all-gather(%q), channel_id=4, replica_groups=[1,8]<=[8], dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %c = (f32[8]{0}, f32[64]{0:S(1)}) custom-call(%all-gather.2), custom_call_target="AsyncCollectiveStart"
}

%carried (r: f32[8]) -> f32[64] {
  %r = f32[8]{0} parameter(0)
  %all-gather.3 = f32[64]{0} all-gather(%r), channel_id=4, replica_groups=[1,8]<=[8], dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %t = f32[64]{0} negate(%all-gather.3)
}

%all-reduce-scatter.1 (s: f32[64]) -> f32[8] {
  %s = f32[64]{0} parameter(0)
  %zero = s32[] constant(0)
  %all-reduce.1 = f32[64]{0} all-reduce(%s), channel_id=5, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %slice = f32[8]{0} dynamic-slice(%all-reduce.1, %zero), dynamic_slice_sizes={8}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %async-start = ((f32[8]{0}), f32[64]{0}) async-start(%a), calls=%wrapped
  %async-done = f32[64]{0} async-done(%async-start), calls=%wrapped
  %ags = (f32[8]{0}, f32[64]{0}) all-gather-start(%a), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %agd = f32[64]{0} all-gather-done(%ags)
  %f.1 = (f32[8]{0}, f32[64]{0:S(1)}) fusion(%a), kind=kCustom, calls=%started
  %f.2 = f32[64]{0} fusion(%a), kind=kOutput, calls=%carried
  ROOT %f.3 = f32[8]{0} fusion(%f.2), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_an_asynchronous_collective_counts_once_where_it_starts():
    kinds = [(one.name, one.kind, one.bytes, one.group) for one in found(hlo.parse(ASYNCHRONOUS))]
    assert kinds == [
        ("all-gather.1", "all-gather", 32, 8),
        ("ags", "all-gather", 32, 4),
        ("all-gather.2", "all-gather", 32, 8),
        ("all-reduce.1", "reduce-scatter", 256, 8),
    ]


def test_an_asynchronous_operation_moves_what_its_computation_moves_and_no_more():
    without = "".join(line for line in ASYNCHRONOUS.splitlines(keepends=True) if "async-" not in line)
    whole, rest = (traffic.hbm_bytes(hlo.parse(text)) for text in (ASYNCHRONOUS, without))
    assert whole - rest == 4 * (8 + 64)  # read and gathered


SLICES = """HloModule jit_f

ENTRY %main (a: f32[1000,8], i: s32[], j: s32[]) -> f32[4,8] {
  %a = f32[1000,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %j = s32[] parameter(2)
  %s = ((f32[1000,8]{1,0}), f32[4,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:4], [0:8]}
  %sd = f32[4,8]{1,0:S(1)} slice-done(%s)
  %d = ((f32[1000,8]{1,0}, s32[], s32[]), f32[2,8]{1,0}, s32[]{:S(2)}) dynamic-slice-start(%a, %i, %j), \
dynamic_slice_sizes={2,8}
  ROOT %dd = f32[2,8]{1,0} dynamic-slice-done(%d)
}
"""


def test_a_started_slice_moves_itself_and_not_what_it_is_taken_from():
    into_fast_memory, inside_hbm = 4 * 4 * 8, 2 * (4 * 2 * 8)
    assert traffic.hbm_bytes(hlo.parse(SLICES)) == into_fast_memory + inside_hbm


def test_products_are_counted_with_their_loops():
    weights = np.ones((WIDTH, WIDTH), np.float32)

    def function(x):
        x = looped(lambda x: jnp.tanh(x @ weights), 5)(x)
        return jnp.einsum("bi,ci->bc", x, x)

    lowered = jax.jit(function).lower(jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32))
    flops = traffic.product_flops(hlo.parse(lowered.as_text(dialect="hlo")))
    assert flops == 5 * 2 * ROWS * WIDTH * WIDTH + 2 * ROWS * ROWS * WIDTH


def test_memory_traffic_reads_operands_and_writes_results_once():
    shape = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    module = hlo.parse(jax.jit(lambda x, y: jnp.tanh(x) + y).lower(shape, shape).compile().as_text())
    assert traffic.hbm_bytes(module) == 3 * 4 * 1024 * 1024


def test_memory_traffic_of_a_scan_counts_slices_not_stacks():
    turns, rows = 50, 64
    stack = jax.ShapeDtypeStruct((turns, rows, rows), jnp.float32)
    first = jax.ShapeDtypeStruct((rows, rows), jnp.float32)

    def function(x, stack):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x * layer), None), x, stack)[0]

    module = hlo.parse(jax.jit(function).lower(first, stack).compile().as_text())
    layer = 4 * rows * rows
    assert 3 * turns * layer <= traffic.hbm_bytes(module) <= 6 * turns * layer  # the whole stack a turn would be 50 x


def test_products_inside_splash_attention_are_counted_where_it_is_compiled_for_a_tpu():
    rows, length, heads, width, asking = 4, 512, 4, 64, 77
    mesh = make_mesh(MeshConfig(data=2, tensor=2), list(topology.tpu("v5e-4").devices))
    placed, ids = PartitionSpec(("data", "fsdp"), None, "tensor"), PartitionSpec(("data", "fsdp"))

    def of(length, spec, *features, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((rows, length, *features), dtype, sharding=NamedSharding(mesh, spec))

    def loss(query, key, value, asked, segments):
        out = attend(query, key, value, asked, segments, implementation="auto")
        return jnp.sum(out.astype(jnp.float32))

    arguments = of(asking, placed, heads, width), *(of(length, placed, heads, width) for _ in range(2))
    segments = (of(size, ids, dtype=jnp.int32) for size in (asking, length))
    with on_mesh(mesh):
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arguments, *segments).compile().as_text()
    module = hlo.parse(text)
    # Forward two products; backward the scores twice, once in each kernel, and one each for dv, dq and dk, two for dp.
    # The 77 picked queries fill a block of 128.
    assert traffic.kernel_flops(module) == 9 * 2 * (rows / 2) * (heads / 2) * 128 * length * width
    assert traffic.collectives(module, (0,) * 4) == []
