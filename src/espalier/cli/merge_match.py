"""``espalier merge match``."""

from espalier.cli import options, show
from espalier.verbs.merge_match import merge_match

command = options.command(merge_match, show.matched, positional=("a", "b"))
