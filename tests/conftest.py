"""One torch thread a test process: `make test` runs one process a core."""

import torch

torch.set_num_threads(1)
