"""Launches: arguments, memory, control flow, schedules, errors. Batched execution must equal one
wave at a time.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import cdnasim
from cdnasim import Memory

from .support import compile_ir, lanewise, program, run, with_registers

SAXPY = '''define amdgpu_kernel void @saxpy(ptr addrspace(1) %x, ptr addrspace(1) %y, float %a,
                                   i32 %n) #0 {
  %t = call i32 @llvm.amdgcn.workitem.id.x()
  %g = call i32 @llvm.amdgcn.workgroup.id.x()
  %h = shl i32 %g, 7
  %i = add i32 %h, %t
  %in = icmp ult i32 %i, %n
  br i1 %in, label %body, label %done
body:
  %px = getelementptr float, ptr addrspace(1) %x, i32 %i
  %py = getelementptr float, ptr addrspace(1) %y, i32 %i
  %vx = load float, ptr addrspace(1) %px
  %vy = load float, ptr addrspace(1) %py
  %m = fmul float %vx, %a
  %r = fadd float %m, %vy
  store float %r, ptr addrspace(1) %py
  br label %done
done:
  ret void
}
declare i32 @llvm.amdgcn.workitem.id.x()
declare i32 @llvm.amdgcn.workgroup.id.x()
attributes #0 = { "amdgpu-flat-work-group-size"="1,256" }
'''
# data-dependent loop: lane i of wave w adds 1 (w * 64 + i) % 7 times; waves of a batch leave the
# loop at different times
COLLATZ = ''' s_lshl_b32 s8, s2, 8
 v_add_u32_e32 v3, s8, v1
 global_load_dword v4, v3, s[4:5]
 v_mov_b32_e32 v5, 0
 s_mov_b64 s[10:11], exec
 s_waitcnt vmcnt(0)
.Lloop:
 v_cmp_lt_u32_e32 vcc, 1, v4
 s_and_b64 exec, exec, vcc
 s_cbranch_execz .Ldone
 v_and_b32_e32 v6, 1, v4
 v_lshrrev_b32_e32 v7, 1, v4
 v_mad_u32_u24 v8, v4, 3, 1
 v_cmp_eq_u32_e32 vcc, 1, v6
 v_cndmask_b32_e32 v4, v7, v8, vcc
 v_add_u32_e32 v5, 1, v5
 s_branch .Lloop
.Ldone:
 s_mov_b64 exec, s[10:11]
 global_store_dword v3, v5, s[6:7]
'''


def collatz(n: int) -> int:
    steps = 0
    while n > 1:
        n, steps = (3 * n + 1 if n % 2 else n // 2), steps + 1
    return steps


def test_saxpy_torch_and_numpy() -> None:
    kernel = cdnasim.load(compile_ir(SAXPY))
    x, y = torch.randn(1000), torch.randn(1000)
    want = y + x * 2.5
    report = kernel.launch(
        8, 128, [x, y, 2.5, 1000], hazard=True, races=True, uninitialised=True
    ).check()
    assert torch.equal(y, want)
    assert report.waves == 16 and report.by_op['global_load_dword'] == 32
    xn, yn = np.arange(1000, dtype=np.float32), np.ones(1000, np.float32)
    kernel.launch(8, 128, [xn, yn, 2.0, 1000])
    assert (yn == 2 * np.arange(1000) + 1).all()
    kernel.launch(8, 128, [xn, yn, 2.0, 10])
    assert yn[10] == 21 and yn[9] == 37


@pytest.mark.parametrize('batch', (1, 3, 128))
def test_divergence(batch: int) -> None:
    """Batches split and rejoin; every batch size gives the same numbers and the same counts."""
    data = np.random.default_rng(0).integers(1, 60, 64 * 20).astype(np.uint32)
    out, report = run(COLLATZ, data, 64 * 20, grid=20, batch_waves=batch)
    assert (out == [collatz(int(v)) for v in data]).all()
    _, one = run(COLLATZ, data, 64 * 20, grid=20, batch_waves=1)
    assert report.by_op == one.by_op


@pytest.mark.parametrize('schedule', ('lockstep', 'serial', 'reverse', 'random'))
def test_schedules_agree_with_barriers(schedule: str) -> None:
    """A rotation of 256 values through LDS, with its barrier, under every schedule."""
    body = ''' ds_write_b32 v1, v0
 s_waitcnt lgkmcnt(0)
 s_barrier
 v_xor_b32_e32 v3, 0x2a4, v1
 ds_read_b32 v2, v3
 s_waitcnt lgkmcnt(0)
 global_store_dword v1, v2, s[6:7]
'''
    out, report = run(
        body, np.zeros(4), 256, block=256, schedule=schedule, seed=3, hazard=True, races=True
    )
    assert (out == (np.arange(256) ^ 0xA9)).all() and report.ok
    if schedule in ('serial', 'reverse'):
        out, _ = run(
            body.replace(' s_barrier\n', ''), np.zeros(4), 256, block=256, schedule=schedule
        )
        assert (out != (np.arange(256) ^ 0xA9)).any()


def test_random_schedules_differ_and_repeat() -> None:
    """A race whose winner depends on the schedule: the same seed repeats, some seeds differ."""
    body = (
        ' v_mov_b32_e32 v3, 0\n v_lshrrev_b32_e32 v4, 6, v0\n ds_write_b32 v3, v4\n'
        ' s_barrier\n ds_read_b32 v2, v3\n global_store_dword v1, v2, s[6:7]\n'
    )
    winners = [
        run(body, np.zeros(4), 256, block=256, schedule='random', seed=k)[0][0] for k in range(8)
    ]
    assert len(set(winners)) > 1
    assert winners[:3] == [
        run(body, np.zeros(4), 256, block=256, schedule='random', seed=k)[0][0] for k in range(3)
    ]


def test_wave_specialisation() -> None:
    """Waves of one workgroup take different paths and meet at different barrier instructions."""
    body = ''' v_readfirstlane_b32 s8, v0
 s_cmp_ge_u32 s8, 64
 s_cbranch_scc1 .Lconsumer
 v_mov_b32_e32 v3, 42
 v_mov_b32_e32 v4, 0
 ds_write_b32 v4, v3
 s_waitcnt lgkmcnt(0)
 s_barrier
 s_endpgm
.Lconsumer:
 s_barrier
 v_mov_b32_e32 v4, 0
 ds_read_b32 v5, v4
 s_waitcnt lgkmcnt(0)
 global_store_dword v1, v5, s[6:7]
'''
    for schedule in ('lockstep', 'serial', 'reverse', 'random'):
        out, report = run(
            body, np.zeros(4), 128, block=128, schedule=schedule, races=True, hazard=True
        )
        assert (out[64:] == 42).all() and report.ok, schedule


def test_atomics_across_workgroups() -> None:
    """Every lane of every wave adds; returned values are a permutation of 0..n-1."""
    body = (
        ' v_mov_b32_e32 v3, 0\n v_mov_b32_e32 v4, 1\n'
        ' global_atomic_add v5, v3, v4, s[4:5] sc0\n s_lshl_b32 s8, s2, 9\n'
        ' v_add_u32_e32 v6, s8, v1\n s_waitcnt vmcnt(0)\n global_store_dword v6, v5, s[6:7]\n'
    )
    counter = np.zeros(4, np.uint32)
    out, report = run(body, counter, 128 * 6, grid=6, block=128, races=True)
    assert counter[0] == 128 * 6 and sorted(out) == list(range(128 * 6)) and report.ok


def test_function_calls() -> None:
    """LLVM's calling convention: s_getpc, s_add with a relocation, s_swappc, s_setpc, scratch for
    the stack.
    """
    ir = '''define float @twice(float %x) #1 {
  %r = fmul float %x, 2.0
  ret float %r
}
define amdgpu_kernel void @k(ptr addrspace(1) %out, ptr addrspace(1) %in) #0 {
  %t = call i32 @llvm.amdgcn.workitem.id.x()
  %p = getelementptr float, ptr addrspace(1) %in, i32 %t
  %a = load float, ptr addrspace(1) %p
  %r = call float @twice(float %a)
  %q = getelementptr float, ptr addrspace(1) %out, i32 %t
  store float %r, ptr addrspace(1) %q
  ret void
}
declare i32 @llvm.amdgcn.workitem.id.x()
attributes #0 = { "amdgpu-flat-work-group-size"="64,64" }
attributes #1 = { noinline }
'''
    text = compile_ir(ir)
    assert 's_swappc_b64' in text
    x, out = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    cdnasim.load(text).launch(1, 64, [out, x])
    assert (out == 2 * x).all()


def test_dynamic_register_index() -> None:
    """A dynamically indexed vector: s_set_gpr_idx_on or s_movrel, or selects, whatever LLVM
    picks.
    """
    ir = '''define amdgpu_kernel void @k(ptr addrspace(1) %out, ptr addrspace(1) %in, i32 %j) #0 {
  %t = call i32 @llvm.amdgcn.workitem.id.x()
  %p = getelementptr <16 x i32>, ptr addrspace(1) %in, i32 %t
  %v = load <16 x i32>, ptr addrspace(1) %p
  %r = extractelement <16 x i32> %v, i32 %j
  %q = getelementptr i32, ptr addrspace(1) %out, i32 %t
  store i32 %r, ptr addrspace(1) %q
  ret void
}
declare i32 @llvm.amdgcn.workitem.id.x()
attributes #0 = { "amdgpu-flat-work-group-size"="64,64" }
'''
    data, out = np.arange(1024, dtype=np.uint32), np.zeros(64, np.uint32)
    cdnasim.load(compile_ir(ir)).launch(1, 64, [out, data, 11])
    assert (out == 16 * np.arange(64) + 11).all()


@pytest.mark.parametrize('size', ('b32', 'b64', 'b96', 'b128'))
def test_lds_widths(size: str) -> None:
    n = int(size[1:]) // 32
    regs = np.random.default_rng(1).integers(0, 1 << 32, (n, 64), dtype=np.uint64).astype(np.uint32)
    last = f'v[8:{7 + n}]' if n > 1 else 'v8'
    back = f'v[16:{15 + n}]' if n > 1 else 'v16'
    body = (
        f' v_mul_u32_u24_e32 v3, {4 * n}, v0\n ds_write_{size} v3, {last}\n'
        f' s_waitcnt lgkmcnt(0)\n ds_read_{size} {back}, v3\n s_waitcnt lgkmcnt(0)'
    )
    assert (with_registers(body, regs, list(range(16, 16 + n)), hazard=True) == regs).all()


def test_flat_access_to_lds() -> None:
    body = ''' ds_write_b32 v1, v0
 s_waitcnt lgkmcnt(0)
 s_mov_b64 s[8:9], src_shared_base
 v_mov_b32_e32 v4, s9
 v_xor_b32_e32 v3, 4, v1
 v_mov_b32_e32 v5, v4
 v_mov_b32_e32 v4, v3
 flat_load_dword v6, v[4:5]
 s_waitcnt vmcnt(0) lgkmcnt(0)
 global_store_dword v1, v6, s[6:7]
'''
    out, _ = run(body, np.zeros(4), hazard=True)
    assert (out == (np.arange(64) ^ 1)).all()


def test_scratch() -> None:
    body = (
        ' scratch_store_dword off, v0, off offset:16\n s_waitcnt vmcnt(0)\n'
        ' scratch_load_dword v3, off, off offset:16\n s_waitcnt vmcnt(0)\n'
        ' global_store_dword v1, v3, s[6:7]\n'
    )
    out, _ = run(body, np.zeros(4), 128, block=128, hazard=True)
    assert (out[:64] == np.arange(64)).all()
    with pytest.raises(cdnasim.MemFault, match='scratch'):
        run(body.replace('offset:16', 'offset:256'), np.zeros(4))


def test_swizzled_descriptor() -> None:
    """Array-of-structures swizzle: records of 16 bytes, elements of 4, index stride 8."""
    setup = (
        ' s_mov_b32 s8, s4\n s_or_b32 s9, s5, 0x80100000\n s_mov_b32 s10, 64\n'
        ' s_mov_b32 s11, 0x00080000\n'
    )
    data = np.arange(64 * 4, dtype=np.uint32)
    out, _ = run(
        setup
        + (
            ' v_mov_b32_e32 v3, 8\n v_mov_b32_e32 v2, v0\n'
            ' buffer_load_dword v4, v[2:3], s[8:11], 0 idxen offen\n s_waitcnt vmcnt(0)\n'
            ' global_store_dword v1, v4, s[6:7]\n'
        ),
        data,
    )
    i = np.arange(64)
    assert (out == (i // 8 * 16 + 8 // 4 * 4) * 8 // 4 + i % 8).all()


def test_buffer_range() -> None:
    """Dwords outside num_records read zero and are not written."""
    setup = ' s_mov_b32 s8, s4\n s_mov_b32 s9, s5\n s_mov_b32 s10, 128\n s_mov_b32 s11, 0x27000\n'
    data = np.arange(1, 65, dtype=np.uint32)
    out, _ = run(
        setup
        + (
            ' buffer_load_dword v2, v1, s[8:11], 0 offen\n s_waitcnt vmcnt(0)\n'
            ' global_store_dword v1, v2, s[6:7]\n'
        ),
        data,
    )
    assert (out[:32] == data[:32]).all() and not out[32:].any()
    run(setup + ' v_mov_b32_e32 v2, 0\n buffer_store_dword v2, v1, s[8:11], 0 offen\n', data)
    assert not data[:32].any() and data[32:].all()


@pytest.mark.parametrize('op,shift', [('ds_bpermute_b32', 1), ('ds_permute_b32', -1)])
def test_permutes(op: str, shift: int) -> None:
    got = lanewise(
        (
            f'v_add_u32_e32 v3, 1, v0\n v_and_b32_e32 v3, 63, v3\n v_lshlrev_b32_e32 v3, 2, v3\n'
            f' {op} v9, v3, v8\n s_waitcnt lgkmcnt(0)'
        ),
        [np.arange(64, dtype=np.uint32)],
    )
    assert (got == (np.arange(64) + shift) % 64).all()


# ---- errors


def test_out_of_bounds_names_the_place() -> None:
    with pytest.raises(cdnasim.MemFault) as e:
        run(
            (
                ' .file 1 "tile.py"\n .loc 1 42 0\n global_load_dword v2, v1, s[4:5] offset:4\n'
                ' s_waitcnt vmcnt(0)\n'
            ),
            np.zeros(64, np.uint32),
            grid=1,
        )
    fault = e.value
    assert fault.lane == 63 and fault.wave == 0 and fault.workgroup == 0
    for word in ('global_load_dword', 'lane 63', 'tile.py:42', 'offset 0x100', 'in k at'):
        assert word in str(fault)
    run(' global_load_dword v2, v1, s[4:5]\n s_waitcnt vmcnt(0)\n', np.zeros(64, np.uint32))


def test_lds_bounds() -> None:
    with pytest.raises(cdnasim.MemFault, match='beyond the 4096 bytes'):
        run(' v_add_u32_e32 v3, 0xf80, v1\n ds_write_b32 v3, v0\n', np.zeros(4))


@pytest.mark.parametrize('offset', [1024, 1020])
def test_lds_addresses_have_32_bits(offset: int) -> None:
    """An address below 0 and an offset that makes it one inside; a lane that stays below is
    outside."""
    body = (
        f' v_add_u32_e32 v3, 0xfffffc00, v1\n ds_write_b32 v3, v0 offset:{offset}\n'
        ' ds_read_b32 v4, v1\n s_waitcnt lgkmcnt(0)\n global_store_dword v1, v4, s[6:7]\n'
    )
    if offset == 1024:
        assert (run(body, np.zeros(4), hazard=True)[0] == np.arange(64)).all()
    else:
        with pytest.raises(cdnasim.MemFault, match='beyond the 4096 bytes'):
            run(body, np.zeros(4))


def test_lenient_memory_records() -> None:
    memory = Memory(lenient=True)
    out, report = run(
        (
            ' global_load_dword v2, v1, s[4:5] offset:4\n s_waitcnt vmcnt(0)\n'
            ' global_store_dword v1, v2, s[6:7]\n'
        ),
        np.ones(64, np.uint32),
        memory=memory,
    )
    assert out[62] == 1 and out[63] == 0 and len(report.stray_loads) == 1 and not report.ok


def test_endless_loop() -> None:
    with pytest.raises(cdnasim.BudgetError, match='endless'):
        run('.Lx:\n s_nop 0\n s_branch .Lx\n', np.zeros(4), budget=10_000)


def test_unknown_instruction() -> None:
    with pytest.raises(cdnasim.UnsupportedError, match='v_frobnicate_b32'):
        cdnasim.load(program(' v_frobnicate_b32 v1, v2\n'))


def test_other_architecture() -> None:
    with pytest.raises(cdnasim.UnsupportedError, match='gfx1100'):
        cdnasim.load(program('').replace('gfx950', 'gfx1100'))


def test_argument_errors() -> None:
    kernel = cdnasim.load(compile_ir(SAXPY))
    x = np.zeros(8, np.float32)
    with pytest.raises(cdnasim.LaunchError, match='takes 4 arguments'):
        kernel.launch(1, 64, [x, x, 1.0])
    with pytest.raises(cdnasim.LaunchError, match='takes 4 bytes'):
        kernel.launch(1, 64, [x, x, np.float64(1), 8])
    with pytest.raises(cdnasim.LaunchError, match='compiled for 256'):
        kernel.launch(1, 512, [x, x, 1.0, 8])
    for grid in (0, 1.5, (1.5, 2), '4', None):
        with pytest.raises(cdnasim.LaunchError, match='positive whole numbers'):
            kernel.launch(grid, 64, [x, x, 1.0, 8])  # type: ignore[arg-type]
    for name, bad in (('batch_waves', 0), ('processes', 0), ('quantum', -1), ('seed', -1),
                      ('budget', 0), ('processes', 1.5)):  # fmt: skip
        with pytest.raises(cdnasim.LaunchError, match=f'{name} {bad}: a whole number from'):
            kernel.launch(1, 64, [x, x, 1.0, 8], **{name: bad})
    with pytest.raises(cdnasim.LaunchError, match='workgroups=range'):
        kernel.launch((1 << 20, 1 << 10), 64, [x, x, 1.0, 8])
    with pytest.raises(cdnasim.LaunchError, match='LDS'):
        cdnasim.load(program('', lds=200_000)).launch(1, 64, [x, x])


def test_no_kernel_and_no_file() -> None:
    with pytest.raises(cdnasim.AsmError, match='no kernel'):
        cdnasim.load('\n ; nothing\n')
    with pytest.raises(cdnasim.AsmError, match='does not exist'):
        cdnasim.load('/nowhere/kernel.s')


@pytest.mark.parametrize('processes', (2, 3))
def test_processes(processes: int) -> None:
    """Several processes leave the same memory, counts and errors as one."""
    data = np.random.default_rng(0).integers(1, 60, 64 * 20).astype(np.uint32)
    one, r1 = run(COLLATZ, data, 64 * 20, grid=20, batch_waves=2)
    many, r2 = run(COLLATZ, data, 64 * 20, grid=20, batch_waves=2, processes=processes)
    assert (one == many).all() and r1.by_op == r2.by_op and r2.paths.keys() == r1.paths.keys()
    add = ' v_mov_b32_e32 v3, 0\n v_mov_b32_e32 v4, 1\n global_atomic_add v3, v4, s[6:7]\n'
    assert run(add, np.zeros(4), 64, grid=20, batch_waves=2, processes=processes)[0][0] == 64 * 20
    with pytest.raises(cdnasim.MemFault, match='workgroup 0'):
        run(
            ' global_load_dword v2, v1, s[4:5] offset:4\n s_waitcnt vmcnt(0)\n',
            np.zeros(64, np.uint32),
            grid=4,
            batch_waves=1,
            processes=processes,
        )


def test_code_object(tmp_path: Path) -> None:
    """An ELF gives the same launch as the text it was assembled from, function calls included."""
    from cdnasim.toolchain import find_tool, run_tool

    source = tmp_path / 'k.s'
    source.write_text(compile_ir(SAXPY))
    run_tool(
        'llvm-mc',
        '-triple=amdgcn-amd-amdhsa',
        '-mcpu=gfx950',
        '-filetype=obj',
        str(source),
        '-o',
        str(tmp_path / 'k.o'),
    )
    subprocess.run(
        [find_tool('ld.lld'), '-shared', str(tmp_path / 'k.o'), '-o', str(tmp_path / 'k.hsaco')],
        check=True,
    )
    x, y = np.arange(1000, dtype=np.float32), np.ones(1000, np.float32)
    report = (
        cdnasim.load(tmp_path / 'k.hsaco').launch(8, 128, [x, y, 2.0, 1000], hazard=True).check()
    )
    assert (
        (y == 2 * x + 1).all() and report.kernel.name == 'saxpy' and report.kernel.arch == 'gfx950'
    )
    with pytest.raises(cdnasim.AsmError, match='no AMDGPU code object'):
        cdnasim.load(find_tool('ld.lld'))


def test_lenient_lds() -> None:
    """Lanes outside LDS read zero and write nothing, and are recorded."""
    memory = Memory(lenient=True)
    body = (
        ' v_add_u32_e32 v3, 0xf80, v1\n ds_write_b32 v3, v0\n ds_read_b32 v4, v3\n'
        ' s_waitcnt lgkmcnt(0)\n global_store_dword v1, v4, s[6:7]\n'
    )
    out, report = run(body, np.zeros(4), memory=memory, hazard=True)
    assert (out == np.where(np.arange(64) < 32, np.arange(64), 0)).all()
    assert len(report.stray_loads) == 2
