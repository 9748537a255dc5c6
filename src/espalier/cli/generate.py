"""``espalier generate``."""

from espalier.cli import options, show
from espalier.verbs.generate import generate

command = options.command(generate, show.text)
