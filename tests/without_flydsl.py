"""Run as a program: a case on kernels built ahead of time, in an interpreter without FlyDSL.

    python without_flydsl.py FOLDER CASE STANDIN_FOLDER        prints the rows as JSON

torch is told of a GPU; HIP's stand-in runs the launches in the simulator. No FlyDSL anywhere.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace


class Hidden:
    """A finder that does not find FlyDSL."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "flydsl" else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


def main(folder, case, standin):
    sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
    import torch
    from hip_standin import Simulator

    from cdnasim.memory import Memory
    from mixmoe import verify
    from mixmoe.backends.cdna import cdna, prebuilt
    from mixmoe.errors import MixMoEError
    from mixmoe.spec import Recipe

    torch.set_num_threads(1)
    memory, address = Memory(), torch.Tensor.data_ptr
    torch.Tensor.data_ptr = lambda t: (memory.map_tensor(t, "tensor"), address(t))[1]
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda *a: SimpleNamespace(gcnArchName="gfx950:sramecc+")
    torch.cuda.current_stream = lambda *a: SimpleNamespace(cuda_stream=0)

    without = cdna().unavailable()
    simulator = Simulator(Path(standin), memory)
    prebuilt.use(folder, simulator.hip)
    chosen = next(c for c in verify.CASES if c.name == case)
    rows = list(verify.judge(cdna(), "a4w4", Recipe.named("a4w4"), chosen))
    prebuilt.use(None)
    from mixmoe.backends.cdna import combine

    try:
        combine.build.__wrapped__(combine.fx.BFloat16, combine.fx.BFloat16, 3, True)(stream=None)
        refused = ""
    except MixMoEError as error:
        refused = str(error)
    found = [[row.stage, row.worst, row.tolerance, row.note] for row in rows]
    said = {"without": without, "refused": refused, "error": str(simulator.error)}
    print(json.dumps({"rows": found} | said))


if __name__ == "__main__":
    main(*sys.argv[1:])
