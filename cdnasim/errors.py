"""One class per way a simulation stops. Every message says where, and what to do next."""


class CdnaSimError(Exception):
    """Base class of everything that cdnasim raises on purpose."""

    issued = (
        -1
    )  # program counter of the memory operation that failed while it landed, in hazard mode


class AsmError(CdnaSimError):
    """The text or code object cannot be read."""


class UnsupportedError(CdnaSimError):
    """An instruction, modifier or target that the simulator does not implement; named, never
    skipped.
    """


class LaunchError(CdnaSimError):
    """Grid, block, arguments or resources do not fit the kernel."""


class BudgetError(CdnaSimError):
    """A wave ran longer than the instruction budget: an endless loop, or a budget that is too
    small.
    """


class DeadlockError(CdnaSimError):
    """No wave of a workgroup can go on (a barrier that some wave never reaches)."""


class ToolError(CdnaSimError):
    """A program outside this package (lld, llvm-objdump, a C compiler) is missing or failed."""


class ExecError(CdnaSimError):
    """The kernel did something the hardware gives no meaning to."""


class CheckError(CdnaSimError):
    """A report holds races, hazards or uninitialised reads; see `Report.findings`."""


class MemFault(CdnaSimError):
    """An access outside every mapped buffer, or outside LDS or scratch.

    `address` is the first offending byte, `lane` the lane, `wave` the wave in its workgroup,
    `workgroup` its linear id. The machine adds kernel, instruction and source line to the message
    when the fault passes through it.
    """

    def __init__(self, message: str, address: int = 0, lane: int = -1, row: int = -1):
        super().__init__(message)
        self.address, self.lane, self.row = address, lane, row
        self.wave = self.workgroup = self.line = -1
