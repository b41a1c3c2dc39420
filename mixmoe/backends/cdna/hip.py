"""HIP's module calls, by ctypes: a code object in memory -> a function -> a launch.

``hipModuleLoadData``, ``hipModuleGetFunction``, ``hipModuleLaunchKernel`` of libamdhip64 (HIP
runtime API, module management). The kernel's arguments go as one packed buffer by ``extra``. What
is loaded belongs to the current device, and stays loaded as long as this object lives.
"""

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p

from mixmoe.errors import MixMoEError

LIBRARIES = ("libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6")
BUFFER_POINTER, BUFFER_SIZE, BUFFER_END = 1, 2, 3  # HIP_LAUNCH_PARAM_*
MOST_ITEMS = 1 << 32  # gridDim x blockDim of an axis stays below it
SIGNATURES = {
    "hipModuleLoadData": (POINTER(c_void_p), c_char_p),
    "hipModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "hipModuleLaunchKernel": (
        c_void_p, *(c_uint,) * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)
    ),
    "hipModuleUnload": (c_void_p,),
}  # fmt: skip

Size = tuple[int, int, int]


class Hip:
    """The runtime. Raises MixMoEError where its library is not found."""

    def __init__(self, library: str | None = None) -> None:
        self.library = open_library((library,) if library else LIBRARIES)
        for name, arguments in SIGNATURES.items():
            call = getattr(self.library, name)
            call.argtypes, call.restype = arguments, c_int
        self.library.hipGetErrorString.argtypes = (c_int,)
        self.library.hipGetErrorString.restype = c_char_p
        self.modules: list[c_void_p] = []

    def call(self, name: str, *args: object) -> None:
        """One call. Raises MixMoEError with HIP's own words where it fails."""
        status = getattr(self.library, name)(*args)
        if status:
            words = self.library.hipGetErrorString(status).decode()
            raise MixMoEError(f"{name} must succeed", f"error {status}: {words}")

    def function(self, code: bytes, name: str) -> c_void_p:
        """A kernel of a code object, loaded on the current device."""
        module, found = c_void_p(), c_void_p()
        self.call("hipModuleLoadData", byref(module), code)
        self.modules.append(module)
        self.call("hipModuleGetFunction", byref(found), module, name.encode())
        return found

    def launch(
        self, function: c_void_p, grid: Size, block: Size, lds: int, stream: int, kernarg: bytes
    ) -> None:
        """Put a launch on a stream (0: the default one). ``lds``: bytes of dynamic LDS."""
        for groups, items in zip(grid, block, strict=True):
            if groups * items >= MOST_ITEMS:
                rule = f"work-items of a launch along an axis stay below {MOST_ITEMS}"
                raise MixMoEError(rule, groups * items, "fewer tokens a call")
        buffer, size = ctypes.create_string_buffer(kernarg, len(kernarg)), c_size_t(len(kernarg))
        extra = (c_void_p * 5)(
            BUFFER_POINTER, ctypes.addressof(buffer), BUFFER_SIZE, ctypes.addressof(size),
            BUFFER_END,
        )
        self.call("hipModuleLaunchKernel", function, *grid, *block, lds, stream, None, extra)

    def unload(self) -> None:
        """Give every module back. Nothing that was loaded may be launched after."""
        while self.modules:
            self.call("hipModuleUnload", self.modules.pop())


def open_library(names: tuple[str, ...]) -> ctypes.CDLL:
    """The first of these libraries that loads."""
    tried = []
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            tried.append(str(error))
    raise MixMoEError("HIP's runtime must be installed", "; ".join(tried), "ROCm 6 or 7")
