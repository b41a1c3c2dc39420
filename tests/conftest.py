"""One torch thread a test process: `make test` runs one process a core."""

import sys

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def mixmoe(monkeypatch, capsys):
    """Run a command line in this process: (exit code, standard output, standard error)."""

    def call(*words):
        from mixmoe import cli

        monkeypatch.setattr(sys, "argv", ["mixmoe", *words])
        monkeypatch.setenv("COLUMNS", "140")
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr()
        return stop.value.code or 0, out.out, out.err

    return call


@pytest.fixture(scope="module")
def registered():
    """mixmoe known to transformers."""
    from mixmoe import hf

    hf.register()


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield
