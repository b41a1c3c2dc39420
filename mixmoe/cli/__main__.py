"""``python -m mixmoe.cli``."""

from mixmoe.cli import main

main()
