"""Where operations come from, asked once for many.

FlyDSL walks the callers of each operation that it builds, so that a message of the compiler can
name a line. With its default of five callers that is more than half of the time to compile a kernel
of unrolled loops (gfx942 a4w4, stage 1: 5.4 of 9.8 CPU seconds, 2026-11-28). Functions that build
much at once are decorated with :func:`one_origin`: their operations share the line that called
them. The machine code is the same.
"""

from flydsl.expr.meta import dsl_loc_tracing as one_origin

__all__ = ["one_origin"]
