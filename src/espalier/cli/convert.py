"""``espalier convert``."""

from espalier.cli import options, show
from espalier.verbs.convert import convert

command = options.command(convert, show.refitted, positional=("source",))
