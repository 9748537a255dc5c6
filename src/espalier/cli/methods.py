"""``espalier methods``."""

from espalier.cli import options, show
from espalier.verbs.methods import methods

command = options.command(methods, show.methods)
