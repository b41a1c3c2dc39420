"""Share the workgroups of one launch among forked processes.

Each child runs every n-th group of workgroups on its copy of memory and sends back its counts and a
journal of its stores, which the parent repeats. Atomics that return nothing are journalled as
operations and performed by the parent in order of the groups. Not possible when a workgroup may see
what another wrote (atomics that return a value) or when a check is on.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .counters import Counters
from .errors import CdnaSimError, ToolError
from .memory import Memory
from .numerics import Array


@dataclass(slots=True)
class Outcome:
    """What a group of workgroups leaves behind besides memory."""

    counters: Counters
    counts: Array
    paths: dict[int, list[list[int]]]


Job = Callable[[], Outcome]


def child(memory: Memory, jobs: list[Job], write: int) -> None:
    """Run jobs, send (outcome, journal) or an error for each; never returns."""
    code = 1
    try:
        with os.fdopen(write, 'wb') as pipe:
            for job in jobs:
                memory.journal = []
                try:
                    result: Any = job(), memory.journal
                except CdnaSimError as e:
                    result = e, []
                pickle.dump(result, pipe, protocol=5)
                if isinstance(result[0], CdnaSimError):
                    break
        code = 0
    finally:
        os._exit(code)


def run_forked(memory: Memory, jobs: list[Job], processes: int) -> Iterator[Outcome]:
    """Outcomes in order of the jobs; the first error in that order is raised."""
    pipes, pids = [], []
    for k in range(processes):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            child(memory, jobs[k::processes], write)
        os.close(write)
        pids.append(pid)
        pipes.append(os.fdopen(read, 'rb'))
    try:
        for k in range(len(jobs)):
            try:
                outcome, journal = pickle.load(pipes[k % processes])
            except EOFError as e:
                raise ToolError(
                    'a worker process died (out of memory?); run with processes=1'
                ) from e
            memory.replay(journal)
            if isinstance(outcome, CdnaSimError):
                raise outcome
            yield outcome
    finally:
        for pipe in pipes:
            pipe.close()
        for pid in pids:
            os.waitpid(pid, 0)
