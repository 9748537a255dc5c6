"""``espalier revert``."""

from espalier.cli import options, show
from espalier.verbs.revert import revert

command = options.command(revert, show.facts, positional=("model",))
