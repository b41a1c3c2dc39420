"""Run FlyDSL kernels on torch CPU tensors: FlyDSL compiles for gfx950 or gfx942, its own host stub
packs the arguments, and every launch runs in the simulator.

    from cdnasim import flydsl as sim
    with sim.session('gfx950', hazard=True) as s:
        launch_fn(a, b, out, stream=None)          # any @flyc.jit function, unmodified
    print(s.launches[-1].report)

How: the library that FlyDSL's compiled host code links against (module load, kernel launch,
streams) is replaced by a few functions that call back into Python, so no assumption about argument
packing is made. torch.Tensor.data_ptr and __dlpack__ map the tensor into the simulator's memory on
the way; the tensor's storage is its bounds.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from types import TracebackType
from typing import Any

from .asm import parse_asm
from .errors import CdnaSimError, ToolError, UnsupportedError
from .machine import LDS_LIMIT, Kernel, Options
from .memory import Memory
from .report import Report
from .toolchain import find_tool, rocm_folder

STANDIN = r'''
#include <stdint.h>
#include <stddef.h>
#include <string.h>
typedef void (*launch_t)(const char *, int64_t *, int32_t, void **);
static launch_t on_launch;
void cdnasim_set(launch_t f) { on_launch = f; }
void *mgpuModuleLoad(void *data, size_t n) { return (void *)1; }
void *mgpuModuleLoadJIT(void *data, int opt) { return (void *)1; }
void mgpuModuleUnload(void *m) {}
void *mgpuModuleGetFunction(void *m, const char *name) { return strdup(name); }
void mgpuLaunchKernel(void *f, intptr_t gx, intptr_t gy, intptr_t gz, intptr_t bx,
                      intptr_t by, intptr_t bz, int32_t lds, void *stream, void **params,
                      void **extra, size_t n) {
  int64_t dims[6] = {gx, gy, gz, bx, by, bz};
  if (on_launch) on_launch((const char *)f, dims, lds, params);
}
void *mgpuStreamCreate(void) { return 0; }
void mgpuStreamDestroy(void *s) {}
void mgpuStreamSynchronize(void *s) {}
void mgpuStreamWaitEvent(void *s, void *e) {}
void *mgpuEventCreate(void) { return 0; }
void mgpuEventDestroy(void *e) {}
void mgpuEventSynchronize(void *e) {}
void mgpuEventRecord(void *e, void *s) {}
void mgpuSetDefaultDevice(int32_t d) {}
'''
VERSION = '0.4'
SETTINGS = {'FLYDSL_DEBUG_DUMP_ASM': '1', 'FLYDSL_RUNTIME_ENABLE_CACHE': '0'}


@dataclass(slots=True)
class Launched:
    """One launch as FlyDSL asked for it; `report` is None in a session that only records."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic_lds: int
    kernarg: bytes
    kernel: Kernel
    report: Report | None = None
    error: Exception | None = None

    @property
    def verdict(self) -> str:
        """pass, race, hazard, uninitialised, wait-states, fault or stall."""
        if self.error is not None:
            return {'DeadlockError': 'stall', 'BudgetError': 'stall', 'MemFault': 'fault'}.get(
                type(self.error).__name__, 'error'
            )
        if self.report is None:
            return 'recorded'
        if self.report.ok:
            return 'pass'
        return ', '.join(sorted(self.report.kinds)) or 'stray loads'


@cache
def standin_library() -> str:
    """Compile the stand-in for FlyDSL's launch library."""
    cc = shutil.which('cc') or shutil.which('gcc') or shutil.which('clang')
    if not cc:
        raise ToolError(
            'a C compiler is needed to build the stand-in launch library: apt-get install gcc'
        )
    folder = tempfile.mkdtemp(prefix='cdnasim-lib-')
    source, library = (
        os.path.join(folder, 'standin.c'),
        os.path.join(folder, 'libcdnasim_standin.so'),
    )
    with open(source, 'w') as f:
        f.write(STANDIN)
    subprocess.run([cc, '-shared', '-fPIC', '-O1', '-w', '-o', library, source], check=True)
    return library


def require_flydsl() -> Any:
    """Import FlyDSL, or say what to install."""
    try:
        import flydsl
    except ImportError as e:
        raise ToolError(
            'FlyDSL is not installed: pip install flydsl==0.4.2 (Linux, Python 3.10 to 3.12)'
        ) from e
    if not str(getattr(flydsl, '__version__', '')).startswith(VERSION):
        raise ToolError(
            f'FlyDSL {flydsl.__version__} is installed; sessions are tested with {VERSION}.x'
        )
    return flydsl


@lru_cache(32)
def decoded(text: str, name: str) -> Kernel:
    """A kernel of an assembly dump; later sessions that launch it again find it decoded."""
    module = parse_asm(text)
    return Kernel(module, module.kernels[name])


@cache
def dump_folder() -> str:
    return tempfile.mkdtemp(prefix='cdnasim-dump-')


def environment(arch: str) -> None:
    """Settings FlyDSL's compiler reads: target, assembly dump, where ld.lld is."""
    find_tool('ld.lld')
    os.environ.update(SETTINGS, ARCH=arch, FLYDSL_GPU_ARCH=arch, FLYDSL_DUMP_DIR=dump_folder())
    # Each operation's chain of call sites is printed after every pass of a dump; one link is enough
    # for messages, and the assembly has no source lines.
    os.environ.setdefault('FLYDSL_DEBUG_MAX_LOC_DEPTH', '1')
    have = os.environ.get('ROCM_PATH', '')
    if not os.path.exists(os.path.join(have, 'llvm', 'bin', 'ld.lld')):
        os.environ['ROCM_PATH'] = rocm_folder()
    os.environ.pop('COMPILE_ONLY', None)


def to_cpu(x: Any) -> Any:
    """A CUDA device in any spelling -> the CPU."""
    kind = x.type if hasattr(x, 'type') and not callable(x.type) else x
    return 'cpu' if isinstance(kind, str) and kind.split(':')[0] in ('cuda', 'hip') else x


@cache
def device_mode() -> Any:
    """A torch function mode that puts what is meant for the GPU on the CPU, so that scripts with
    device='cuda' run.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class OnCpu(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = dict(kwargs or {})
            if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
                return True
            if 'device' in kwargs:
                kwargs['device'] = to_cpu(kwargs['device'])
            if func in (torch.Tensor.to, torch.Tensor.type) and len(args) > 1:
                args = (args[0], *(to_cpu(a) for a in args[1:]))
            return func(*args, **kwargs)

    return OnCpu


@cache
def cpu_generator() -> Any:
    """torch.Generator that accepts any device and lives on the CPU."""
    import torch

    class CpuGenerator(torch.Generator):
        def __new__(cls, device: Any = 'cpu') -> Any:
            return super().__new__(cls, to_cpu(device))  # type: ignore[call-arg]

    return CpuGenerator


class FakeEvent:
    """torch.cuda.Event: no time passes."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record(self, *args: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Launches are synchronous."""

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class FakeProperties:
    """Device properties that kernels ask for (MI300X, MI355X)."""

    def __init__(self, arch: str):
        self.gcnArchName, self.name = arch, f'cdnasim {arch}'
        self.multi_processor_count = 304 if arch == 'gfx942' else 256
        self.warp_size, self.total_memory, self.L2_cache_size = 64, 192 << 30, 4 << 20
        self.major, self.minor = 9, 4 if arch == 'gfx942' else 5


class FakeStream:
    """What torch.cuda.current_stream() gives inside a session."""

    cuda_stream, device = 0, 'cpu'

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def synchronize(self) -> None:
        """Launches are synchronous."""


class session:
    """Context in which FlyDSL launches are simulated (`run=False`: only recorded).

    arch: gfx950 or gfx942. Keyword options are the fields of `cdnasim.Options`. `keep_going`:
    errors inside a launch are kept in its record instead of raised at the end of the session.
    Raises UnsupportedError for another architecture, ToolError when FlyDSL, ld.lld or cc is
    missing.
    """

    def __init__(
        self,
        arch: str = 'gfx950',
        run: bool = True,
        keep_going: bool = False,
        lenient: bool = False,
        options: Options | None = None,
        **changes: Any,
    ):
        if arch not in LDS_LIMIT:  # LLVM would end the process
            raise UnsupportedError(f'arch {arch!r}: sessions are for {" or ".join(LDS_LIMIT)}')
        self.arch, self.run, self.keep_going = arch, run, keep_going
        self.options = replace(options or Options(), **changes)
        self.memory = Memory(lenient)
        self.launches: list[Launched] = []
        self.kernels: dict[int, Kernel] = {}
        self.error: BaseException | None = None
        self.saved: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> session:
        require_flydsl()
        environment(self.arch)
        from flydsl.compiler import jit_executor, jit_function

        library = ctypes.CDLL(standin_library())
        kind = ctypes.CFUNCTYPE(
            None,
            ctypes.c_void_p,
            ctypes.POINTER(ctypes.c_int64),
            ctypes.c_int32,
            ctypes.POINTER(ctypes.c_void_p),
        )
        self.callback = kind(self.launched)
        library.cdnasim_set(self.callback)
        for module in (jit_executor, jit_function):
            if hasattr(module, '_resolve_runtime_libs'):
                self.patch(module, '_resolve_runtime_libs', lambda: [standin_library()])
        self.patch(jit_function, '_is_compile_placeholder', lambda *a, **k: False)
        self.patch_torch()
        return self

    def patch_torch(self) -> None:
        import torch

        real, dlpack, seen = torch.Tensor.data_ptr, torch.Tensor.__dlpack__, self.memory

        def data_ptr(t: Any) -> int:
            if t.device.type == 'cpu':
                seen.map_tensor(t, f'tensor{tuple(t.shape)}')
            return real(t)

        def to_dlpack(t: Any, *args: Any, **kwargs: Any) -> Any:
            data_ptr(t)
            return dlpack(t, *args, **kwargs)

        self.patch(torch.Tensor, 'data_ptr', data_ptr)
        self.patch(torch.Tensor, '__dlpack__', to_dlpack)
        self.patch(torch.Tensor, 'cuda', lambda t, *a, **k: t)
        for name, value in {
            'is_available': lambda: True,
            'synchronize': lambda *a: None,
            'Stream': FakeStream,
            'Event': FakeEvent,
            'current_stream': lambda *a: FakeStream(),
            'current_device': lambda: 0,
            'device_count': lambda: 1,
            'set_device': lambda *a: None,
            'device': contextlib.nullcontext,
            'stream': contextlib.nullcontext,
            'get_device_properties': lambda *a: FakeProperties(self.arch),
            'empty_cache': lambda: None,
            'mem_get_info': lambda *a: (64 << 30, 64 << 30),
            'manual_seed': lambda *a: None,
            'manual_seed_all': lambda *a: None,
        }.items():
            self.patch(torch.cuda, name, value)
        self.patch(torch, 'Generator', cpu_generator())
        self.mode = device_mode()()
        self.mode.__enter__()

    def patch(self, owner: Any, name: str, value: Any) -> None:
        self.saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.mode.__exit__(None, None, None)
        for owner, name, value in reversed(self.saved):
            setattr(owner, name, value)
        self.saved.clear()
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise an error that happened inside a launch (it could not cross the C frame by
        itself).
        """
        if self.error is not None and not self.keep_going:
            error, self.error = self.error, None
            raise error

    def map(self, *tensors: Any) -> None:
        """Make tensors known that reach the kernel by raw address only."""
        for t in tensors:
            self.memory.map_tensor(t, f'tensor{tuple(t.shape)}')

    def fresh(self, tensor: Any) -> Any:
        """Declare that nothing wrote this tensor yet: with uninitialised=True, reading it before a
        store is a finding.
        """
        import numpy as np

        at = self.memory.map_tensor(tensor, f'fresh tensor{tuple(tensor.shape)}')
        region = self.memory.region_at(at)
        region.written = np.zeros(len(region.data), bool)
        return tensor

    def kernel_for(self, handle: int, name: str) -> Kernel:
        """One handle per loaded module; its code is the newest dump that holds the name."""
        if handle not in self.kernels:
            pattern = os.path.join(dump_folder(), '**', '*final_isa.s')
            for path in sorted(
                glob.glob(pattern, recursive=True), key=os.path.getmtime, reverse=True
            ):
                with open(path) as f:
                    text = f.read()
                if f'\n{name}:' in text:
                    self.kernels[handle] = decoded(text, name)
                    break
            else:
                raise CdnaSimError(f'FlyDSL launched {name}, but no assembly dump holds it')
        return self.kernels[handle]

    def launched(self, handle: int, dims: Any, lds: int, params: Any) -> None:
        """Called by the host stub for each launch. Nothing may unwind through the C frame."""
        try:
            name = ctypes.string_at(handle).decode()
            kernel = self.kernel_for(handle, name)
            size = max(
                [16]
                + [a.offset + a.size for a in kernel.args]
                + [kernel.meta.get('kernarg_segment_size', 0)]
            )
            packed = bytearray(size)
            for k, a in enumerate(kernel.visible_args):
                packed[a.offset : a.offset + a.size] = ctypes.string_at(params[k], a.size)
            record = Launched(name, tuple(dims[0:3]), tuple(dims[3:6]), lds, bytes(packed), kernel)
            self.launches.append(record)
            if self.run:
                self.simulate(record)
        except BaseException as e:  # noqa: BLE001
            self.error = self.error or e

    def simulate(self, record: Launched) -> None:
        try:
            record.report = record.kernel.launch(
                record.grid,
                record.block,
                record.kernarg,
                memory=self.memory,
                dynamic_lds=record.dynamic_lds,
                options=self.options,
            )
        except CdnaSimError as e:
            record.error = e
            if not self.keep_going:
                raise


def compile_only(fn: Callable[..., Any], *args: Any, arch: str = 'gfx950') -> Launched:
    """Compile a FlyDSL function for these arguments and run nothing -> the launch it would make,
    with its `kernel`.
    """
    with session(arch, run=False) as s:
        fn(*args)
    return s.launches[-1]
