"""Float32 scales of blocks along K: of a token's 128 values, of 128 weight rows times 128 K.

The MFMA of K = 128 cannot apply them, so each of its sums is closed: multiplied by both scales and
added to the total, while the MFMAs of the next phase run. All scales that a tile needs lie in LDS
before the main loop.
"""

import flydsl.expr as fx

from mixmoe.backends.cdna.atoms import MFMA_ROWS, WAVE, WORD
from mixmoe.backends.cdna.config import THREADS, WAVES, Gemm
from mixmoe.backends.cdna.tokens import Ids, Rows

SLOTS, TURNS = 4, 2  # phases whose factors, and phases whose sums, are in registers


class BlockScales:
    """Scales ``of_tokens (rows, K / 128)`` and ``of_weights (E, N / 128, K / 128)`` through LDS to
    what closes sums, and those sums. A wave's rows of a half lie in one block of 128."""

    def __init__(self, cfg: Gemm, place, lds, of_tokens: fx.Tensor, of_weights: fx.Tensor, first):
        self.cfg, self.place, self.columns = cfg, place, cfg.k_steps
        self.of_tokens = fx.get_iter(of_tokens)
        self.of_weights = fx.recast_iter(fx.Float32, fx.get_iter(of_weights))
        self.row = fx.min(first * MFMA_ROWS, cfg.rows - MFMA_ROWS)
        self.sharers = THREADS // cfg.tokens  # threads that bring a token's
        self.loaded: list[list[fx.Float32]] = []
        self.scales: list[fx.Float32] = []  # of the phase that is closed, of each half
        base = fx.recast_iter(fx.Float32, lds.scales.ptr)
        by_token = fx.make_layout((cfg.tokens, self.columns), (1, cfg.scale_stride))
        self.tokens = base.view(by_token)
        base = base + cfg.scale_room // WORD
        shape = (self.columns, cfg.halves, WAVES)
        self.weights = base.view(fx.make_ordered_layout(shape, (0, 1, 2)))
        keys = [(half, block) for half in range(cfg.halves) for block in range(cfg.blocks)]
        self.sums = [{key: fx.make_rmem_tensor(4, fx.Float32) for key in keys}
                     for _ in range(TURNS)]
        self.ring = [[fx.make_rmem_tensor(1, fx.Float32) for _ in range(1 + cfg.halves)]
                     for _ in range(SLOTS)]
        # The first phase closes the sums of one before it, which there was not.
        for frag in [f for turn in self.sums for f in turn.values()] + sum(self.ring, []):
            frag.fill(0.0)

    def start(self, ids: Ids, rows: Rows) -> None:
        """Load a thread's share: of a token; of the wave's rows of each half."""
        cfg, place = self.cfg, self.place
        starts = [self.of_tokens + fx.Int64(rows.row(ids.shared)) * self.columns]
        blocks = fx.Int64(place.expert) * -(-cfg.halves * cfg.rows // cfg.period)
        for half in range(cfg.halves):
            block = blocks + (half * cfg.rows + self.row) // cfg.period
            starts.append(self.of_weights + block * self.columns)
        for row, threads in zip(starts, self._threads(), strict=True):
            self.loaded.append([fx.Float32(row[column]) for column in self._columns(threads)])

    def publish(self) -> None:
        """Write it to LDS."""
        place = self.place
        for i, (values, threads) in enumerate(zip(self.loaded, self._threads(), strict=True)):
            for value, column in zip(values, self._columns(threads), strict=True):
                if i == 0:
                    self.tokens[place.tid // threads, column] = value
                else:
                    self.weights[column, i - 1, place.wave] = value

    def _threads(self) -> list[int]:
        """Threads side by side that share a row of scales."""
        return [self.sharers] + [WAVE] * self.cfg.halves

    def _columns(self, threads: int):
        """Columns of a thread: what is beyond the last is the last once more."""
        for first in range(0, self.columns, threads):
            yield fx.min(self.place.tid % threads + first, self.columns - 1)

    def read(self, kt, phase: int, slot: int) -> None:
        """Factors of a phase of K tile ``kt``: its tokens', its weights' of each half."""
        cfg, place = self.cfg, self.place
        step, group = divmod(phase, cfg.groups)
        column = (place.first_tile + kt) * cfg.steps + step
        column = fx.min(column, self.columns - 1) if cfg.parts > 1 else column
        of_tokens, *of_weights = self.ring[slot % SLOTS]
        of_tokens[0] = fx.Float32(self.tokens[group * MFMA_ROWS + place.r, column])
        for half, frag in enumerate(of_weights):
            frag[0] = fx.Float32(self.weights[column, half, place.wave])

    def begin(self, phase: int, key: tuple[int, int]) -> fx.Tensor:
        """What an MFMA of a phase adds to: zero."""
        frag = self.sums[phase % TURNS][key]
        frag.fill(0.0)
        return frag

    def open(self, phase: int) -> None:
        """Before a phase's first MFMA, behind which its reads may take the place of the factors of
        the phase before it."""
        factors = self.ring[(phase - 1) % SLOTS]
        of_tokens, *of_weights = (fx.Float32(frag.load()[0]) for frag in factors)
        self.scales = [of_tokens * of_half for of_half in of_weights]

    def close(self, acc, phase: int, key: tuple[int, int]) -> None:
        """A sum of the phase before the open one onto the total, under its scale."""
        total = acc[(*key, (phase - 1) % self.cfg.groups)]
        with fx.fastmath("contract"):
            part = self.sums[(phase - 1) % TURNS][key].load() * self.scales[key[0]]
            total.store(total.load() + part)

    def factors(self) -> list:
        """What a lane's sums still lack: nothing."""
        return []
