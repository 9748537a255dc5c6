"""``python -m espalier``."""

from espalier.cli.main import main

main()
