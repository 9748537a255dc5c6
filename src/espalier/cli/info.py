"""``espalier info``."""

from espalier.cli import options, show
from espalier.verbs.info import info

command = options.command(info, show.facts, positional=("path",))
