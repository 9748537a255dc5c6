"""``espalier eval``."""

from espalier.cli import options, show
from espalier.verbs.eval import eval

command = options.command(eval, show.facts)
