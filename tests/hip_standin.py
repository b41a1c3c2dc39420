"""A stand-in for libamdhip64 whose launches run in the simulator.

The library is C and is called as HIP's own would be; it keeps a copy of each code object, and hands
a launch to Python: name, code, sizes, the packed arguments. ``Simulator`` runs the code object.
"""

import ctypes
import shutil
import subprocess

import cdnasim
from mixmoe.backends.cdna.hip import Hip

SOURCE = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef struct { size_t size; char code[]; } module_t;
typedef struct { module_t *module; char name[512]; } function_t;
typedef int (*launch_t)(const char *, const char *, size_t, const uint32_t *, const void *, size_t);
static launch_t on_launch;
static uint64_t field(const char *at, int n) { uint64_t v = 0; memcpy(&v, at, n); return v; }
void standin_set(launch_t f) { on_launch = f; }
int hipModuleLoadData(void **module, const void *image) {
  const char *elf = image;
  if (memcmp(elf, "\177ELF", 4)) return 200;
  size_t size = field(elf + 40, 8) + field(elf + 58, 2) * field(elf + 60, 2);
  module_t *m = malloc(sizeof *m + size);
  m->size = size;
  memcpy(m->code, image, size);
  *module = m;
  return 0;
}
int hipModuleGetFunction(void **function, void *module, const char *name) {
  module_t *m = module;
  function_t *f = calloc(1, sizeof *f);
  size_t n = strlen(name) + 1, at = 0;
  while (at + n <= m->size && memcmp(m->code + at, name, n)) at++;
  if (at + n > m->size) return 500;
  f->module = m;
  strncpy(f->name, name, sizeof f->name - 1);
  *function = f;
  return 0;
}
int hipModuleLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                          unsigned by, unsigned bz, unsigned lds, void *stream, void **params,
                          void **extra) {
  function_t *f = function;
  uint32_t dims[7] = {gx, gy, gz, bx, by, bz, lds};
  if (params || extra[0] != (void *)1 || extra[2] != (void *)2 || extra[4] != (void *)3) return 1;
  return on_launch(f->name, f->module->code, f->module->size, dims, extra[1],
                   *(size_t *)extra[3]);
}
int hipModuleUnload(void *module) { free(module); return 0; }
const char *hipGetErrorString(int status) {
  return status == 200 ? "device kernel image is invalid" : status == 500 ? "named symbol not found"
       : "invalid argument";
}
"""
LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_uint32), ctypes.c_void_p, ctypes.c_size_t,
)


def compile_library(folder):
    """Path of the stand-in."""
    source, library = folder / "standin.c", folder / "libamdhip64.so"
    source.write_text(SOURCE)
    cc = shutil.which("cc") or shutil.which("gcc")
    subprocess.run([cc, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    return str(library)


class Simulator:
    """Runs what a stand-in is told to launch, hazards and races on, in a session's memory."""

    def __init__(self, folder, memory):
        self.folder, self.memory, self.reports, self.error = folder, memory, [], None
        self.kernels = {}
        self.hip = Hip(compile_library(folder))
        self.callback = LAUNCH(self.launch)
        self.hip.library.standin_set(self.callback)

    def launch(self, name, code, size, dims, kernarg, kernarg_size):
        try:
            name = name.decode()
            if name not in self.kernels:
                path = self.folder / f"{name}.elf"
                path.write_bytes(ctypes.string_at(code, size))
                self.kernels[name] = cdnasim.load(path, name)
            report = self.kernels[name].launch(
                tuple(dims[0:3]), tuple(dims[3:6]), ctypes.string_at(kernarg, kernarg_size),
                memory=self.memory, dynamic_lds=dims[6], hazard=True, races=True,
            )
            self.reports.append(report)
            return 0
        except Exception as error:  # nothing may unwind through C
            self.error = error
            return 1
