"""python -m benchmarks: the same command as `mixmoe bench`."""

from mixmoe.bench_cli import app

app()
