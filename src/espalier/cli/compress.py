"""``espalier compress``."""

from espalier.cli import options, show
from espalier.verbs.compress import compress

command = options.command(compress, show.refitted, positional=("delta",), roles=("compressor",))
