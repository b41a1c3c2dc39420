"""Small kernels for tests: registers in, registers out, and LLVM IR compiled on the spot."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

import cdnasim
from cdnasim import Memory, Report
from cdnasim.toolchain import run_tool

HEAD = '''.amdgcn_target "amdgcn-amd-amdhsa--{arch}"
k:
 s_load_dwordx4 s[4:7], s[0:1], 0x0
 s_waitcnt lgkmcnt(0)
 v_lshlrev_b32_e32 v1, 2, v0
'''
TAIL = '''
 s_endpgm
.amdhsa_kernel k
 .amdhsa_group_segment_fixed_size {lds}
 .amdhsa_private_segment_fixed_size 256
 .amdhsa_user_sgpr_kernarg_segment_ptr 1
 .amdhsa_user_sgpr_count 2
 .amdhsa_system_sgpr_workgroup_id_x 1
.end_amdhsa_kernel
'''


def program(body: str, arch: str = 'gfx950', lds: int = 4096) -> str:
    """s[4:5] input buffer, s[6:7] output buffer, v0 work-item, v1 = 4 * v0, s2 workgroup."""
    return HEAD.format(arch=arch) + body + TAIL.format(lds=lds)


def run(
    body: str,
    data: Any,
    nout: int = 64,
    *,
    arch: str = 'gfx950',
    grid: int = 1,
    block: int = 64,
    memory: Memory | None = None,
    lds: int = 4096,
    **options: Any,
) -> tuple[np.ndarray, Report]:
    """Run a body on `data` -> (output words, report)."""
    out = np.zeros(nout, np.uint32)
    words = np.ascontiguousarray(data).view(np.uint32)
    kernel = cdnasim.load(program(body, arch, lds))
    report = kernel.launch(grid, block, [words, out], memory=memory, **options)
    return out, report


def with_registers(
    body: str,
    regs: np.ndarray,
    outs: list[int],
    *,
    first: int = 8,
    arch: str = 'gfx950',
    **options: Any,
) -> np.ndarray:
    """regs uint32[n, 64] go to v[first..]; the registers `outs` come back as uint32[len(outs),
    64].
    """
    text, chunk = '', 15  # 12-bit offsets reach 15 rows of 256 bytes
    for k in range(len(regs)):
        if k % chunk == 0:
            text += f' v_add_u32_e32 v2, {256 * k:#x}, v1\n'
        text += f' global_load_dword v{first + k}, v2, s[4:5] offset:{256 * (k % chunk)}\n'
    text += ' s_waitcnt vmcnt(0)\n' + body + '\n'
    for k, r in enumerate(outs):
        if k % chunk == 0:
            text += f' v_add_u32_e32 v2, {256 * k:#x}, v1\n'
        text += f' global_store_dword v2, v{r}, s[6:7] offset:{256 * (k % chunk)}\n'
    out, _ = run(text, regs, 64 * len(outs), arch=arch, **options)
    return out.reshape(len(outs), 64)


def unary(op: str, a: np.ndarray, arch: str = 'gfx950', tail: str = '') -> np.ndarray:
    """One-source instruction over a uint32 array of any length."""
    return lanewise(f'{op} v9, v8{tail}', [a], arch)


def lanewise(
    text: str, sources: list[np.ndarray], arch: str = 'gfx950', keep: Any = None
) -> np.ndarray:
    """`text` computes v9 from v8 (and v10, v11); arrays of uint32, one lane per element. `keep`:
    old value of v9.
    """
    n = len(sources[0])
    waves = (n + 63) // 64
    regs = [8, 10, 11]
    stride = 4 * 64 * waves
    body = ' s_lshl_b32 s2, s2, 8\n v_add_u32_e32 v1, s2, v1\n'
    rows = [*sources] + ([keep] if keep is not None else [])
    for k, r in enumerate([*regs[: len(sources)]] + ([9] if keep is not None else [])):
        body += (
            f' s_add_u32 s8, s4, {stride * k:#x}\n s_addc_u32 s9, s5, 0\n'
            f' global_load_dword v{r}, v1, s[8:9]\n'
        )
    body += f' s_waitcnt vmcnt(0)\n {text}\n global_store_dword v1, v9, s[6:7]\n'
    data = np.zeros((len(rows), 64 * waves), np.uint32)
    for k, s in enumerate(rows):
        data[k, :n] = s
    out, _ = run(body, data, 64 * waves, arch=arch, grid=waves, batch_waves=1024)
    return out[:n]


@functools.cache
def compile_ir(ir: str, arch: str = 'gfx950') -> str:
    """LLVM IR -> assembly, by llc."""
    return run_tool(
        'llc', '-mtriple=amdgcn-amd-amdhsa', f'-mcpu={arch}', '-O2', '-o', '-', '-', text_in=ir
    )


def llvm_map(
    body: str,
    ty_in: str,
    ty_out: str,
    sources: list[np.ndarray],
    dtype_out: Any,
    arch: str = 'gfx950',
    declare: str = '',
) -> np.ndarray:
    """Run LLVM's lowering of `body`, which computes %r of ty_out from %a, %b, %c of ty_in, over
    arrays.
    """
    names = 'abc'[: len(sources)]
    loads = ''.join(
        f'  %p{k} = getelementptr {ty_in}, ptr addrspace(1) %in{k}, i32 %i\n'
        f'  %{k} = load {ty_in}, ptr addrspace(1) %p{k}\n'
        for k in names
    )
    params = ', '.join(f'ptr addrspace(1) %in{k}' for k in names)
    ir = f'''define amdgpu_kernel void @k(ptr addrspace(1) %out, {params}) #0 {{
  %t = call i32 @llvm.amdgcn.workitem.id.x()
  %g = call i32 @llvm.amdgcn.workgroup.id.x()
  %h = shl i32 %g, 6
  %i = add i32 %h, %t
{loads}{body}
  %q = getelementptr {ty_out}, ptr addrspace(1) %out, i32 %i
  store {ty_out} %r, ptr addrspace(1) %q
  ret void
}}
declare i32 @llvm.amdgcn.workitem.id.x()
declare i32 @llvm.amdgcn.workgroup.id.x()
{declare}
attributes #0 = {{ "amdgpu-flat-work-group-size"="64,64" }}
'''
    n = (len(sources[0]) + 63) // 64
    padded = [np.concatenate([s, np.repeat(s[-1:], 64 * n - len(s))]) for s in sources]
    out = np.zeros(64 * n, dtype_out)
    cdnasim.load(compile_ir(ir, arch)).launch(
        n, 64, [out, *padded], batch_waves=1024, hazard=True
    ).check()
    return out[: len(sources[0])]
