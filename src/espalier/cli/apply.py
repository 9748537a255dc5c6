"""``espalier apply``."""

from espalier.cli import options, show
from espalier.verbs.apply import apply

command = options.command(apply, show.applied)
