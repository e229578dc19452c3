"""The HLO reader, on programs with known collectives and against XLA's own analysis."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.config import MeshConfig
from gpt2_jax.planning.collectives import Collective, read_collectives
from gpt2_jax.planning.hlo import HloModule, n_bytes_of
from gpt2_jax.sharding import make_mesh

F32 = 4


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(2, 4), jax.devices())


def compiled_for(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


def collectives_of(mesh, function, shape, in_spec, out_spec):
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, in_spec))
    return read_collectives(HloModule(jax.jit(mapped).lower(x).compile().as_text()), dict(mesh.shape))


@pytest.mark.parametrize("axes", [("data",), ("fsdp",), ("data", "fsdp")])
def test_a_reduction_counts_once_per_iteration_of_its_loop(mesh, axes):
    def five(x):
        return jax.lax.scan(lambda carry, _: (jnp.sin(jax.lax.psum(carry, axes)), None), x, length=5)[0]

    devices = {"data": 2, "fsdp": 4}
    size = devices[axes[0]] * devices.get(axes[-1], 1) if len(axes) == 2 else devices[axes[0]]
    assert collectives_of(mesh, five, (100,), P(), P()) == [Collective("all-reduce", axes, size, 5, 5 * 100 * F32)]


def test_a_branch_counts_once_per_iteration_of_its_loop(mesh):
    def five(x):
        def branch(carry):
            return jax.lax.cond(jnp.sum(carry) > 0, lambda x: jax.lax.psum(x, "data"), jnp.sin, carry)

        return jax.lax.scan(lambda carry, _: (branch(carry), None), x, length=5)[0]

    assert collectives_of(mesh, five, (100,), P(), P()) == [Collective("all-reduce", ("data",), 2, 5, 5 * 100 * F32)]


def test_every_kind_of_collective(mesh):
    def gather(x):
        return jax.lax.all_gather(x, "fsdp", tiled=True)

    def scatter(x):
        return jax.lax.psum_scatter(x, "data", tiled=True)

    def exchange(x):
        return jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True)

    def pass_on(x):
        return jax.lax.ppermute(x, "fsdp", [(place, (place + 1) % 4) for place in range(4)])

    (found,) = collectives_of(mesh, gather, (80, 3), P("fsdp"), P())
    assert found == Collective("all-gather", ("fsdp",), 4, 1, 80 * 3 * F32)
    assert found.sent() == 3 * 20 * 3 * F32  # its own part, and those of two others passing round the ring
    (found,) = collectives_of(mesh, scatter, (80, 3), P(), P("data"))
    assert found == Collective("reduce-scatter", ("data",), 2, 1, 80 * 3 * F32)
    assert found.sent() == 40 * 3 * F32
    (found,) = collectives_of(mesh, exchange, (16, 8), P("fsdp"), P("fsdp"))
    assert (found.kind, found.axes, found.n_bytes) == ("all-to-all", ("fsdp",), 4 * 8 * F32)
    (found,) = collectives_of(mesh, pass_on, (80, 3), P("fsdp"), P("fsdp"))
    assert (found.kind, found.axes, found.n_bytes) == ("collective-permute", ("fsdp",), 20 * 3 * F32)
    assert found.sent() == found.n_bytes


def test_bytes_of_a_matmul_equal_xlas_analysis():
    compiled = compiled_for(jnp.dot, (64, 32), (32, 16))
    assert HloModule(compiled.as_text()).hbm_bytes() == compiled.cost_analysis()["bytes accessed"]


def test_bytes_count_loops_and_only_the_sliced_part_of_an_array():
    def sums(x):  # one row at a time
        return jax.lax.scan(lambda total, row: (total + jnp.sum(jnp.sin(row)), None), 0.0, x)[0]

    rows, width = 50, 1000
    n_bytes = HloModule(compiled_for(sums, (rows, width)).as_text()).hbm_bytes()
    assert rows * width * F32 <= n_bytes < 5 * rows * width * F32  # a few copies, not the whole array fifty times


def test_bytes_of_shapes():
    assert n_bytes_of("f32[2,3]{1,0}") == 24
    on_chip = "bf16[8,128]{1,0:T(8,128)(2,1)S(1)}"
    assert n_bytes_of(f"({on_chip}, s32[], pred[4]{{0}}, /*index=3*/f8e4m3fn[10])") == 2048 + 4 + 4 + 10
    assert n_bytes_of(f"({on_chip}, u8[5])", on_chip=False) == 5


def test_a_collective_counts_once_and_says_whether_work_runs_beside_it():
    """The forms that the compilers for TPU and GPU print: alone, from start to done, and as a chain of fusions."""
    body = "  %p{0} = f32[{1}] parameter(0)\n  %a{0} = f32[{1}] all-reduce(%p{0}), replica_groups={{}}"
    cycles = 'backend_config={"estimated_cycles":"7"}'
    fusions = "".join(
        f"%f{name} (p: f32[{size}]) -> f32[{size}] {{\n{body.format(name, size)}, "
        f'frontend_attributes={{chain_id="{chain}"}}\n}}\n'
        for name, size, chain in ((1, 100, 0), (2, 100, 0), (3, 100, 0), (4, 1000, 1), (5, 1000, 1))
    )
    text = f"""{fusions}
ENTRY %main (x: f32[1]) -> f32[1] {{
  %x = f32[1] parameter(0)
  %alone = f32[1] all-reduce(%x), replica_groups={{}}
  %start = f32[1] all-reduce-start(%alone), replica_groups={{}}
  %done = f32[1] all-reduce-done(%start)
  %busy = f32[10] all-reduce-start(%ten), replica_groups={{}}
  %ten = f32[10] parameter(1)
  %work = f32[10] fusion(%ten), calls=%f0
  %end = f32[10] all-reduce-done(%busy)
  %c1 = f32[100] fusion(%x), calls=%f1, {cycles}
  %c2 = f32[100] fusion(%c1), calls=%f2, {cycles}
  %c3 = f32[100] fusion(%c2), calls=%f3
  %d1 = f32[1000] fusion(%x), calls=%f4, {cycles}
  %d2 = f32[1000] fusion(%d1), calls=%f5
}}
%f0 (y: f32[10]) -> f32[10] {{
  ROOT %y = f32[10] parameter(0)
}}"""
    (found,) = read_collectives(HloModule(text), {"data": 8})
    sizes = (1, 1, 10, 100, 1000)
    assert (found.times, found.n_bytes, found.overlapped_bytes) == (5, F32 * sum(sizes), F32 * (10 + 100))
    assert found.matmul_overlapped_bytes == 0


@pytest.mark.parametrize(
    ("work", "overlapped", "beside_matmuls"),
    [
        ("bitcast(%x)", False, False),
        ("fusion(%x), kind=kInput, calls=%norm", True, False),
        ('custom-call(%x), custom_call_target="__cudnn$norm"', True, False),
        ("while(%x), condition=%less, body=%norm", True, False),
        ("dot(%x, %x), lhs_contracting_dims={0}, rhs_contracting_dims={0}", True, True),
        ("convolution(%x, %x), dim_labels=bf_io->bf", True, True),
        ("fusion(%x), kind=kOutput, calls=%fused", True, True),
        ("fusion(%x), kind=kCustom, calls=%nested", True, True),
        ('custom-call(%x), custom_call_target="__cublas$lt$matmul"', True, True),
        ('custom-call(%x), custom_call_target="__cublas$gemm"', True, True),
        ('custom-call(%x), custom_call_target="__cudnn$fmhaSoftmaxBackward"', True, True),
        ('custom-call(%x), custom_call_target="tpu_custom_call"', True, True),
        ("while(%x), condition=%less, body=%loop", True, True),
        ("conditional(%i, %x, %x), branch_computations={%norm, %loop}", True, True),
        ("call(%x), to_apply=%loop", True, True),
    ],
)
def test_matmuls_beside_a_collective_are_told_from_other_work(work, overlapped, beside_matmuls):
    text = f"""
%norm (p0: f32[1]) -> f32[1] {{
  %p0 = f32[1] parameter(0)
  ROOT %sine = f32[1] sine(%p0)
}}
%fused (p1: f32[1]) -> f32[1] {{
  %p1 = f32[1] parameter(0)
  ROOT %product = f32[1] convolution(%p1, %p1), dim_labels=bf_io->bf
}}
%nested (p2: f32[1]) -> f32[1] {{
  %p2 = f32[1] parameter(0)
  ROOT %tile = f32[1] fusion(%p2), kind=kCustom, calls=%fused
}}
%loop (p3: f32[1]) -> f32[1] {{
  %p3 = f32[1] parameter(0)
  ROOT %step = f32[1] fusion(%p3), kind=kCustom, calls=%nested
}}
%less (p4: f32[1]) -> pred[] {{
  %p4 = f32[1] parameter(0)
  ROOT %bound = pred[] constant(3)
}}
ENTRY %main (x: f32[1]) -> f32[1] {{
  %x = f32[1] parameter(0)
  %i = s32[] parameter(1)
  %before = f32[1] dot(%x, %x), lhs_contracting_dims={{0}}, rhs_contracting_dims={{0}}
  %start = f32[1] all-reduce-start(%x), replica_groups={{}}
  %work = f32[1] {work}
  %done = f32[1] all-reduce-done(%start)
  ROOT %after = f32[1] dot(%done, %done), lhs_contracting_dims={{0}}, rhs_contracting_dims={{0}}
}}"""
    (found,) = read_collectives(HloModule(text), {"data": 8})
    shares = (found.overlapped_bytes, found.matmul_overlapped_bytes)
    assert shares == (F32 * overlapped, F32 * beside_matmuls)


def test_matmuls_in_a_chain_of_fusions_run_beside_its_collective():
    """The form of the TPU compiler. The first fusion of a chain starts the collective, so its matmul is not beside."""
    gather = 'all-gather(%p{0}), replica_groups={{}}, dimensions={{0}}, frontend_attributes={{chain_id="{1}"}}'
    product = "convolution(%p{0}, %p{0}), dim_labels=bf_io->bf"
    fusions = "".join(
        f"%f{name} (p: f32[1]) -> f32[1] {{\n  %p{name} = f32[1] parameter(0)\n"
        f"  %g{name} = f32[8] {gather.format(name, chain)}\n"
        f"  ROOT %r{name} = f32[1] {(product if multiplies else 'sine(%p{0})').format(name)}\n}}\n"
        for name, chain, multiplies in ((1, 0, False), (2, 0, True), (3, 1, True), (4, 1, False))
    )
    cycles = 'backend_config={"estimated_cycles":"7"}'
    text = f"""{fusions}
ENTRY %main (x: f32[1]) -> f32[1] {{
  %x = f32[1] parameter(0)
  %c1 = f32[1] fusion(%x), calls=%f1, {cycles}
  %c2 = f32[1] fusion(%c1), calls=%f2, {cycles}
  %d1 = f32[1] fusion(%x), calls=%f3, {cycles}
  ROOT %d2 = f32[1] fusion(%d1), calls=%f4, {cycles}
}}"""
    (found,) = read_collectives(HloModule(text), {"data": 8})
    assert (found.times, found.overlapped_bytes, found.matmul_overlapped_bytes) == (2, 2 * 8 * F32, 8 * F32)


def test_only_a_copy_that_changes_the_order_of_axes_is_a_relayout():
    text = """
ENTRY %main (a: bf16[4,8,1]) -> bf16[8,4,1] {
  %a = bf16[4,8,1]{1,0,2:T(8,128)} parameter(0)
  %near = bf16[4,8,1]{2,1,0:T(8,128)(2,1)S(1)} copy(%a), metadata={op_name="x/attn/near"}
  %turned = bf16[4,8,1]{0,1,2:T(8,128)} copy(%near), metadata={op_name="x/attn/turned"}
  %outside = bf16[4,8,1]{1,0,2:T(8,128)} copy(%turned), metadata={op_name="x/mlp/outside"}
  ROOT %transposed = bf16[8,4,1]{1,0,2:T(8,128)} transpose(%outside), dimensions={1,0,2}, metadata={op_name="x/attn/t"}
}
"""
    assert HloModule(text).relayouts(r'op_name="[^"]*/attn/') == 2  # turned and transposed


def test_text_that_cannot_be_read_is_an_error():
    def until(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < jnp.sum(x * x), lambda x: x * 2, x)

    with pytest.raises(ValueError, match="has no trip count"):
        HloModule(compiled_for(until, (3,)).as_text())
    with pytest.raises(ValueError, match="this is not HLO text"):
        HloModule("something else")


@pytest.mark.parametrize(
    ("groups", "axes", "devices"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("fsdp",), 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("[2,4]<=[8]", ("fsdp",), 4),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("[1,8]<=[8]", ("data", "fsdp"), 8),
        ("{}", ("data", "fsdp"), 8),
        ("mesh['a'=2,'b'=4] {'b'}", ("fsdp",), 4),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ("fsdp",), 4),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",), 2),
        ("mesh['a'=2,'b'=4] {'a', 'b'}", ("data", "fsdp"), 8),
    ],
)
def test_every_notation_of_groups(groups, axes, devices):
    """The notations in XLA's documentation of HLO text. Platform and version decide which one XLA prints."""
    text = f"""HloModule m
ENTRY %main (x: f32[5]) -> f32[5] {{
  %x = f32[5]{{0}} parameter(0)
  ROOT %r = f32[5]{{0}} all-reduce(%x), replica_groups={groups}, use_global_device_ids=true, to_apply=%add
}}"""
    (found,) = read_collectives(HloModule(text), {"data": 2, "fsdp": 4})
    assert found == Collective("all-reduce", axes, devices, 1, 20)


def test_groups_span_the_slices_of_their_devices(mesh):
    def sums(x):
        return jax.lax.psum(jnp.sin(jax.lax.psum(x, "fsdp")), "data")

    mapped = jax.shard_map(sums, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    program = HloModule(compiled_for(mapped, (100,)).as_text())
    slices = {one.axes: one.slices for one in read_collectives(program, {"data": 2, "fsdp": 4}, [0] * 4 + [1] * 4)}
    assert slices == {("fsdp",): 1, ("data",): 2}
    assert {one.slices for one in read_collectives(program, {"data": 2, "fsdp": 4})} == {1}


def test_what_the_runtime_sends_between_tpu_slices():
    """As libtpu writes it for two slices of four: sums within each, then of a quarter between them by the hosts."""
    handler = '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.1_0"'
    between = f"is_host_transfer=true, frontend_attributes={{{handler}}}"
    text = f"""
ENTRY %main (x: f32[100]) -> f32[100] {{
  %x = f32[100]{{0}} parameter(0)
  %after-all = token[] after-all()
  %send = (f32[100]{{0}}, u32[], token[]) send(%x, %after-all), channel_id=6, {between}
  %other = (f32[100]{{0}}, u32[], token[]) send(%x, %after-all), channel_id=7, is_host_transfer=true
  ROOT %sum = f32[100]{{0}} all-reduce(%x), replica_groups={{{{0,1,2,3}}}}, to_apply=%add
}}
"""
    program = HloModule(text)
    assert read_collectives(program, {"data": 4, "fsdp": 2}, [0] * 4 + [1] * 4) == [
        Collective("all-reduce", ("data",), 2, 1, 100 * F32, slices=2),
        Collective("all-reduce", ("data", "fsdp"), 4, 1, 100 * F32, slices=1),
    ]
    assert program.hbm_bytes() == 0  # no bytes of a collective


def test_what_runs_asynchronously_on_a_sparse_core():
    """As libtpu writes it for TPU7x."""
    text = """
%on_sparse_core (x: f32[100]) -> f32[100] {
  %y = f32[100]{0} parameter(0)
  ROOT %sum = f32[100]{0} all-reduce(%y), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}, execution_thread="sparsecore"
ENTRY %main (x: f32[100]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  %start = ((f32[100]{0}), f32[100]{0}) call-start(%x), to_apply=%on_sparse_core
  ROOT %done = f32[100]{0} call-done(%start)
}
"""
    (found,) = read_collectives(HloModule(text), {"data": 2, "fsdp": 4})
    assert found == Collective("all-reduce", ("data", "fsdp"), 8, 1, 100 * F32)
