"""``espalier diff``."""

from espalier.cli import options, show
from espalier.verbs.diff import diff

command = options.command(diff, show.differed, positional=("base", "tuned"))
