"""``espalier merge``."""

from espalier.cli import options, show
from espalier.verbs.merge import merge

command = options.command(merge, show.facts, positional=("models",), roles=("merger",))
