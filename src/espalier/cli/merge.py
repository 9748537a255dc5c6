"""``espalier merge``."""

from espalier.cli import options, show
from espalier.verbs.merge import merge

command = options.command(merge, show.merged, positional=("models",), roles=("merger",))
