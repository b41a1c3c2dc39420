"""E8M0 scales folded into FP8 codes: exact for every code and exponent, refused where it is not."""

import pytest
import torch
from test_preshuffle import weights

from mixmoe.errors import MixMoEError
from mixmoe.fold import Fold, fold_range, fold_table, narrowest_fold
from mixmoe.formats import mxfp4, mxfp8
from mixmoe.preshuffle import hopper_fp4


def check_table(table):
    """Every e2m1 code times every exponent, exact against torch's own e4m3fn decode."""
    codes = torch.tensor([[0x10, 0x32, 0x54, 0x76]], dtype=torch.uint8)
    powers = torch.arange(-8, 7).exp2().double().unsqueeze(1)
    exact = mxfp4.element.decode(codes, torch.float64) * powers
    assert table.shape == (15, 8) and table.dtype == torch.uint8
    assert torch.equal(table.view(torch.float8_e4m3fn).double(), exact)
    negative = (table | 0x80).view(torch.float8_e4m3fn).double()
    assert torch.equal(negative, -exact)
    for k in range(-5, 7):
        b = (k + 5) * 8
        low = (b * 0x01010100 + 0x14100800) & 0xFFFFFFFF
        high = (b * 0x01010101 + 0x24201C18) & 0xFFFFFFFF
        assert table[k + 8].tolist() == list(low.to_bytes(4, "little") + high.to_bytes(4, "little"))


def test_fold_table():
    check_table(fold_table())


@pytest.mark.parametrize("row", [0, 2, 3, 14])
def test_fold_table_catches_a_mutation(row):
    broken = fold_table()
    broken[row, 5] ^= 1
    with pytest.raises(AssertionError):
        check_table(broken)


def wgmma_registers(packed, expert):
    """What the kernel makes of hopper_fp4 storage (warps=8): e4m3 values (rows, K), float64."""
    fold, table = packed.order.fold, fold_table().to(torch.int64)
    words = packed.codes[expert].to(torch.int64).view(-1, 8, 2, 8, 4, 4) & 0xFFFFFFFF
    byte = packed.scales[expert].to(torch.int64).view(-1, 8, 2, 8, 4, 1).expand_as(words)
    lut = table[byte // fold.step + fold.lowest - Fold.WIDE.lowest]
    halves = []
    for value, sign in ((words & 0x77777777, words), (words >> 16 & 0x7777, words << 4)):
        places = torch.stack([value >> 4 * i & 7 for i in range(4)], -1)
        signs = torch.stack([sign >> 8 * i & 0x80 for i in range(4)], -1)
        halves.append(torch.gather(lut, -1, places) | signs)
    x = torch.stack(halves, -2).to(torch.uint8).view(torch.float8_e4m3fn).double()
    tiles = -(-packed.shape[1] // 128)
    x = x.view(tiles, -1, 8, 2, 8, 4, 4, 2, 4)  # tile kt warp half g q ks lohi by
    return x.permute(0, 2, 3, 4, 1, 5, 6, 7, 8).reshape(128 * tiles, -1)


@pytest.mark.parametrize("kind", Fold)
def test_folded_weights_are_exact(kind):
    n, k = 150, 320
    q = weights(mxfp4, 2, n, k, scales=(100, 100 + kind.reach + 1))
    packed = hopper_fp4(fold=kind).pack(q)
    assert (packed.row_scale.log2() % 1 == 0).all()
    for expert in range(2):
        got = wgmma_registers(packed, expert)
        want = q[expert].dequantise(torch.float64)
        assert torch.equal(got[:n, :k] * packed.row_scale[expert].double()[:, None], want)
        assert not got[n:].any() and not got[:, k:].any()
    packed.scales[0, 0, 3] += kind.step if packed.scales[0, 0, 3] < kind.step else -kind.step
    shifted = wgmma_registers(packed, 0)[:n, :k] * packed.row_scale[0].double()[:, None]
    assert not torch.equal(shifted, q[0].dequantise(torch.float64))


def test_fold_range_and_refusal():
    q = weights(mxfp4, 3, 20, 256, scales=(120, 121))
    q.codes.bitwise_or_(0x11)
    assert narrowest_fold(q) is Fold.NARROW and not fold_range(q).any()
    q.scales[1, 17, 2] = 132
    assert int(fold_range(q)[1, 17]) == 12 and int(fold_range(q).sum()) == 12
    assert narrowest_fold(q) is Fold.WIDE
    with pytest.raises(MixMoEError, match="expert 1, row 17.* got 12.*_wide"):
        hopper_fp4().pack(q)
    hopper_fp4(fold=Fold.WIDE).pack(q)
    q.scales[1, 17, 2] = 135
    assert narrowest_fold(q) is None
    with pytest.raises(MixMoEError, match="expert 1, row 17.* got 15.*order rows"):
        hopper_fp4(fold=Fold.WIDE).pack(q)
    q.codes[1, 17, 32:48] = 0x80  # the block holds only zeros now: its scale does not count
    assert narrowest_fold(q) is Fold.NARROW
    packed = hopper_fp4().pack(q)
    assert torch.equal(packed.unpack().dequantise(), q.dequantise())
    assert torch.equal(packed.unpack().codes, q.codes)


@pytest.mark.parametrize("byte", [0, 5, 127, 249, 254])
@pytest.mark.parametrize("kind", Fold)
def test_row_scale_is_a_normal_float(byte, kind):
    """At both ends of E8M0 the base stays where no GPU flushes it to zero or infinity."""
    q = weights(mxfp4, 1, 16, 128, scales=(byte, byte + 1))
    for span in (0, kind.reach):
        q.scales[..., 0] = byte + span if byte < 128 else byte - span
        packed = hopper_fp4(fold=kind).pack(q)
        assert (packed.row_scale >= 2.0**-126).all() and packed.row_scale.isfinite().all()
        assert torch.equal(packed.unpack().dequantise(torch.float64), q.dequantise(torch.float64))


def test_rows_of_zeros_fold():
    q = weights(mxfp4, 1, 16, 128, scales=(0, 255))
    q.codes.zero_()
    assert not fold_range(q).any()
    packed = hopper_fp4().pack(q)
    assert (packed.row_scale == 1).all() and not packed.unpack().dequantise().any()


def test_fold_takes_mxfp4():
    with pytest.raises(MixMoEError, match="mxfp4"):
        fold_range(weights(mxfp8, 1, 16, 64))
