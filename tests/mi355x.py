"""AMD's own times of MoE GEMMs on MI355X: what the cost model is fitted to and judged by.

From aiter's tuned tables (commit e4048607a5, 2026-08-22), us of the GEMM of each stage; measured by
AMD, not here. Stage 2 holds the reduction over a token's experts. A tile is tokens x rows (of gate
and of up in stage 1) and the shares of K in a workgroup; None where the
table names none or a kernel of another library (CK).
"""

from mixmoe.backends.cdna.cost import Cut, Work


def tile(tokens, rows, split=1):
    """Upstream's naming: a wave for 32 rows, at most four; ``split`` groups of them."""
    return Cut(tokens, rows, min(4, rows // 32) * split, split)


# T: (us of stage 1, us of stage 2, tile of stage 1, tile of stage 2)
DSV3_A4W4 = {
    1: (11.4, 7.5, tile(32, 32, 4), None),
    8: (27.7, 17.7, tile(32, 32, 2), tile(32, 128)),
    16: (40.5, 25.0, tile(32, 128), tile(32, 128)),
    32: (58.9, 36.7, tile(32, 64), tile(16, 256)),
    64: (87.0, 50.2, tile(32, 32), None),
    128: (87.5, 54.4, tile(32, 32), None),
    512: (91.3, 70.3, tile(32, 32), tile(32, 256)),
    1024: (106.3, 107.5, tile(64, 64), tile(64, 256)),
    4096: (192.0, 283.9, None, tile(64, 256)),
    8192: (273.8, 515.3, tile(64, 64), tile(64, 256)),
    16384: (425.3, 1027.5, None, tile(64, 256)),
}
GPTOSS_A8W4 = {
    1: (12.3, 13.2, tile(32, 128), None),
    8: (51.1, 33.1, tile(32, 128), None),
    16: (83.6, 52.9, tile(32, 128), None),
    32: (135.4, 81.2, tile(32, 128), None),
    64: (174.9, 102.9, tile(32, 128), None),
    128: (190.3, 104.2, tile(32, 128), None),
    512: (214.4, 111.6, tile(32, 128), None),
    1024: (235.2, 125.5, tile(64, 256), None),
    4096: (442.3, 256.2, tile(128, 256), None),
    8192: (714.6, 413.5, tile(128, 256), None),
    16384: (1356.6, 731.4, tile(128, 256), None),
}
KIMI_A4W4 = {
    1: (13.6, 7.7), 8: (23.0, 16.7), 16: (35.9, 23.7), 32: (63.9, 37.1), 64: (93.5, 54.0),
    128: (108.4, 66.7), 512: (117.6, 81.0), 1024: (121.1, 106.4), 4096: (158.9, 270.4),
    8192: (252.2, 463.9), 16384: (397.2, 924.9),
}  # fmt: skip
KIMI_A8W4 = {
    1: (18.2, 8.2), 8: (23.8, 18.1), 16: (41.5, 27.7), 32: (78.9, 46.4), 64: (115.1, 65.7),
    128: (115.1, 68.0), 512: (119.2, 79.4), 1024: (123.1, 105.3), 4096: (168.2, 292.2),
    8192: (302.5, 514.9), 16384: (481.7, 1006.6),
}  # fmt: skip
# H, I, experts and topk (DeepSeek's rows count the shared expert), bits of a token with its scale
LAYERS = {
    "dsv3 a4w4": (DSV3_A4W4, 7168, 256, 257, 9, 4.25),
    "gptoss a8w4": (GPTOSS_A8W4, 3072, 3072, 128, 4, 8.25),
    "kimi a4w4": (KIMI_A4W4, 7168, 256, 384, 8, 4.25),
    "kimi a8w4": (KIMI_A8W4, 7168, 256, 384, 8, 8.25),
}
# The tiles that upstream's kernels come in, at most four waves. Stage 1 sorts by 32 at least: its
# tile of 16 leaves routes out.
CUTS = {
    1: [
        tile(m, n, s) for m in (32, 64, 128) for n in (32, 64, 128, 256) for s in (1, 2, 4)
        if s == 1 or n // 32 * s <= 4
    ],
    2: [tile(m, n) for m in (16, 32, 64, 128) for n in (64, 128, 256)],
}  # fmt: skip


def works(name):
    """(stage, T, Work, us, tile or None) of every measured GEMM of a layer."""
    table, hidden, inter, experts, topk, bits = LAYERS[name]
    for tokens, (us1, us2, *tiles) in table.items():
        first, second = tiles or (None, None)
        routed = (tokens, topk, experts)
        yield 1, tokens, Work(*routed, 2, inter, hidden, 4.25, bits, bits / 8), us1, first
        yield 2, tokens, Work(*routed, 1, hidden, inter, 4.25, bits, 2, 1.0), us2, second
