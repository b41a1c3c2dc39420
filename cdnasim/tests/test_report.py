"""Figures: counts, bank conflicts, occupancy, the issue-cycle model, the pictures and the command
line.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import cdnasim
from cdnasim.banks import phases
from cdnasim.cli import app, parse_argument
from cdnasim.timing import DEVICE, simulate

from .support import program, run

FINDINGS = Path(cdnasim.__file__).parent / 'examples' / 'findings'


def test_counts() -> None:
    body = (
        " global_load_dwordx4 v[4:7], v1, s[4:5]\n s_waitcnt vmcnt(0)\n"
        " global_store_dword v1, v4, s[6:7]\n"
    )
    _, r = run(body, np.zeros(512, np.uint32), grid=1, block=128, nout=128)
    assert r.counters.global_load_bytes == 128 * 16 and r.counters.global_store_bytes == 128 * 4
    assert r.by_class == {'vmem': 4, 'smem': 2, 'wait': 4, 'valu': 2, 'salu': 2}
    assert r.instructions == 14 and r.waves == 2
    d = json.loads(r.to_json())
    assert d['instructions'] == 14 and d['simulated']['label'] == 'simulated, not measured'
    # 64 lanes, 4 bytes apart, 16 bytes each: 268 bytes, 3 lines of 128
    assert (
        d['cache_lines_per_access'][next(k for k in d['cache_lines_per_access'] if 'load' in k)]
        == 3
    )


@pytest.mark.parametrize(
    'arch,stride,cycles,extra',
    [
        ('gfx942', 4, 2, 0),
        ('gfx942', 8, 4, 2),
        ('gfx942', 128, 64, 62),
        ('gfx942', 0, 2, 0),
        ('gfx950', 4, 1, 0),
        ('gfx950', 8, 2, 1),
        ('gfx950', 256, 64, 63),
    ],
)
def test_bank_conflicts(arch: str, stride: int, cycles: int, extra: int) -> None:
    """ds_read_b32 of 64 lanes `stride` bytes apart: distinct dwords per bank, phase by phase."""
    body = f' v_mul_u32_u24_e32 v3, {stride:#x}, v0\n ds_read_b32 v4, v3\n'
    _, r = run(body, np.zeros(4), arch=arch, lds=32768)
    assert (r.counters.lds_cycles, r.counters.lds_conflict_cycles) == (cycles, extra)
    assert all(
        sorted(sum(phases(n, read, b), [])) == list(range(64))
        for n in (4, 8, 16)
        for read in (0, 1)
        for b in (32, 64)
    )


def test_occupancy() -> None:
    """gfx950: 512 registers a SIMD lane in steps of 8, 160 KiB LDS, 8 waves a SIMD."""

    def occ(top: int, lds: int, block: int = 256) -> tuple[int, str]:
        body = f' v_mov_b32_e32 v{top}, 0\n'
        o = run(body, np.zeros(4), lds=lds, block=block)[1].occupancy
        return o.workgroups_per_cu, o.limit

    assert occ(31, 1024) == (8, 'wave slots')
    assert occ(127, 1024) == (4, 'registers')
    assert occ(128, 1024) == (3, 'registers')
    assert occ(31, 65536) == (2, 'LDS')


def mfma_loop(
    n: int, op: str = 'v_mfma_f32_32x32x16_f16', acc: int = 16, separate: bool = True
) -> str:
    body = ''
    for k in range(n):
        at = 32 + acc * (k % 4 if separate else 0)
        body += f' {op} v[{at}:{at + acc - 1}], v[4:7], v[8:11], v[{at}:{at + acc - 1}]\n'
    return body


def test_model_is_bound_by_the_matrix_core() -> None:
    """64 instructions of 32 cycles on one SIMD take 2048 cycles, plus what comes before."""
    _, r = run(mfma_loop(64), np.zeros(4))
    assert 64 * 32 <= r.timing.cycles < 64 * 32 + 600
    assert r.timing.busy['mfma'] == pytest.approx(64 * 32 / r.timing.cycles / 4)
    _, four = run(mfma_loop(64), np.zeros(4), block=256)
    assert four.timing.cycles < 1.1 * r.timing.cycles  # four SIMDs work side by side
    _, eight = run(mfma_loop(64), np.zeros(4), block=512)
    assert eight.timing.cycles > 1.8 * four.timing.cycles  # two waves share each core


def test_model_hides_latency_with_waves() -> None:
    load = ' global_load_dword v4, v1, s[4:5]\n s_waitcnt vmcnt(0)\n v_add_u32_e32 v5, v5, v4\n'
    _, r = run(load * 20, np.zeros(64, np.uint32))
    one, eight = simulate(r, 1), simulate(r, 8)
    assert one.cycles > 20 * DEVICE['gfx950'].memory_latency
    assert eight.cycles < 1.5 * one.cycles
    assert one.waits['wait'] > 0.9


def test_conflicts_cost_cycles() -> None:
    def cycles(stride: int) -> float:
        body = (
            f' v_mul_u32_u24_e32 v3, {stride:#x}, v0\n'
            + ' ds_read_b32 v4, v3\n' * 50
            + ' s_waitcnt lgkmcnt(0)\n'
        )
        return run(body, np.zeros(4), lds=32768)[1].timing.cycles

    assert cycles(256) > 5 * cycles(4)


def test_no_path_no_timing() -> None:
    _, r = run(' s_nop 0\n', np.zeros(4), trace=False)
    with pytest.raises(ValueError, match='trace=True'):
        _ = r.timing


# ---- command line


def test_cli_run_kernel(tmp_path: Path) -> None:
    """A race gives exit status 1 and is named; the fixed program passes; JSON and PNG are
    written.
    """
    png, out = tmp_path / 't.png', tmp_path / 'r.json'
    args = ['--block', '256', '--arg', 'f32:256:rand', '--arg', 'f32:256']
    bad = CliRunner().invoke(app, ['run', str(FINDINGS / 'softmax_reduce.s'), *args])
    assert bad.exit_code == 1 and 'race: LDS' in bad.output
    fixed = tmp_path / 'fixed.s'
    text = (FINDINGS / 'softmax_reduce.s').read_text()
    fixed.write_text(text.replace('; s_barrier', 's_barrier  '))
    good = CliRunner().invoke(
        app, ['run', str(fixed), *args, '--json', str(out), '--timeline', str(png)]
    )
    assert good.exit_code == 0 and 'no findings' in good.output
    assert json.loads(out.read_text())['findings'] == [] and png.read_bytes()[:4] == b'\x89PNG'


def test_cli_run_script() -> None:
    script = Path(cdnasim.__file__).parent / 'examples' / 'a4w4_gemm.py'
    r = CliRunner().invoke(
        app, ['run', str(script), '--rows', '32', '--cols', '64', '--depth', '256']
    )
    assert r.exit_code == 0, r.output
    assert 'pass' in r.output and 'ended normally' in r.output
    r = CliRunner().invoke(
        app,
        ['run', '--budget', '50', str(script), '--rows', '32', '--cols', '64', '--depth', '256'],
    )
    assert r.exit_code == 1 and 'stall' in r.output


def test_cli_errors_and_coverage(tmp_path: Path) -> None:
    for name in ('none.s', 'none.py'):
        r = CliRunner().invoke(app, ['run', str(tmp_path / name)])
        assert r.exit_code == 1 and r.output == f'AsmError: {tmp_path / name} does not exist\n'
    (tmp_path / 'k.s').write_text(program(' v_frob v1\n'))
    r = CliRunner().invoke(app, ['run', str(tmp_path / 'k.s')])
    assert r.exit_code == 1 and 'v_frob' in r.output
    r = CliRunner().invoke(app, ['coverage', 'gfx950', '--json', str(tmp_path / 'c.json')])
    assert r.exit_code == 0 and json.loads((tmp_path / 'c.json').read_text())['missing'] == {}


def refused(*words: str, error: str = 'LaunchError') -> str:
    """The one line of a command that is refused, exit status 1."""
    r = CliRunner().invoke(app, list(words))
    assert r.exit_code == 1 and isinstance(r.exception, SystemExit), r.output
    assert r.output.startswith(f'{error}: ') and r.output.count('\n') == 1, r.output
    return r.output


def test_cli_refuses_options_in_one_line(tmp_path: Path) -> None:
    run_it = ('run', str(FINDINGS / 'softmax_reduce.s'))
    assert '--grd 4: only a script.py' in refused(*run_it, '--grd', '4')
    assert '--arch is for a script' in refused(*run_it, '--arch', 'gfx942')
    assert '--lenient is for a script' in refused(*run_it, '--lenient')
    script = str(Path(cdnasim.__file__).parent / 'examples' / 'a4w4_gemm.py')
    for option in ('--grid', '--block', '--arg', '--kernel'):
        assert f'{option} is for a kernel' in refused('run', script, option, '4')
    for option, path, why in (
        ('--json', tmp_path / 'none' / 'x.json', 'no file can be written'),
        ('--json', tmp_path, 'no file can be written'),
        ('--timeline', tmp_path / 'x.abc', '.png, .svg, .pdf'),
        ('--timeline', tmp_path / 'none' / 'x.png', 'no file can be written'),
    ):
        assert f'{option} {path}: ' in (line := refused(*run_it, option, str(path)))
        assert why in line
    for option, value in (('--seed', '-1'), ('--budget', '0')):
        assert f'{option[2:]} {value}: a whole' in refused(*run_it, option, value)
    empty = tmp_path / 'empty.npy'
    empty.touch()
    for bad in ('f32:100000000000000', 'f32:99999999999999999999', str(empty)):
        assert f'--arg {bad!r}' in refused(*run_it, '--arg', bad)
    assert "'gfx999'" in refused('coverage', 'gfx999', error='UnsupportedError')
    assert 'x.json' in refused('coverage', 'gfx950', '--json', str(tmp_path / 'no' / 'x.json'))


def test_cli_refuses_files_in_one_line(tmp_path: Path) -> None:
    latin = tmp_path / 'latin.s'
    latin.write_bytes(b's_endpgm ; \xff\n')
    assert 'neither assembly text' in refused('run', str(latin), error='AsmError')
    assert 'Is a directory' in refused('run', str(tmp_path), error='AsmError')
    for source, why in (('', 'no file'), (tmp_path, 'no file'), ('x' * 5000, 'too long')):
        with pytest.raises(cdnasim.AsmError, match=why):
            cdnasim.load(source)


def test_cli_no_launch_is_a_failure(tmp_path: Path) -> None:
    script = tmp_path / 'nothing.py'
    script.write_text('x = 1\n')
    r = CliRunner().invoke(app, ['run', str(script)])
    assert r.exit_code == 1
    assert r.output == 'script ended normally\nno kernel was launched\n'


def test_cli_arch_of_a_script() -> None:
    script = str(Path(cdnasim.__file__).parent / 'examples' / 'a4w4_gemm.py')
    assert "'gfx999'" in refused('run', script, '--arch', 'gfx999', error='UnsupportedError')
    r = CliRunner().invoke(app, ['run', script, '--arch', 'gfx942'])
    assert r.exit_code == 1 and r.output.count('\n') == 1
    assert 'needs the scaled matrix instruction of gfx950, not gfx942' in r.output


def test_cli_arguments(tmp_path: Path) -> None:
    np.save(tmp_path / 'x.npy', np.arange(3))
    assert (
        parse_argument('f32:2x3').shape == (2, 3) and parse_argument('u16:4:7').tolist() == [7] * 4
    )
    assert (
        parse_argument('0x10') == 16
        and parse_argument('1.5') == 1.5
        and parse_argument(str(tmp_path / 'x.npy')).tolist() == [0, 1, 2]
    )
    for bad in ('foo', 'q32:4', 'f33:4', 'f32:a', 'f32:4:x', str(tmp_path / 'none.npy')):
        words = ['run', str(FINDINGS / 'softmax_reduce.s'), '--arg', bad]
        r = CliRunner().invoke(app, words)
        assert r.exit_code == 1 and r.output.startswith('LaunchError: '), bad
        assert bad.split(':')[-1] in r.output and r.output.count('\n') == 1
    r = CliRunner().invoke(app, ['run', str(FINDINGS / 'softmax_reduce.s'), '--grid', 'two'])
    assert r.exit_code == 1 and "LaunchError: 'two' is no size" in r.output


def test_launch_seconds() -> None:
    """Rounds over 256 CUs, and the memory roof."""
    _, r = run(mfma_loop(64), np.zeros(4))
    t = simulate(r, 1)
    assert t.launch_seconds(256) == pytest.approx(t.cycles / 2.4e9)
    assert t.launch_seconds(512) == pytest.approx(2 * t.launch_seconds(1))
    assert t.launch_seconds(1, hbm_bytes=8e9) == pytest.approx(1e-3)
