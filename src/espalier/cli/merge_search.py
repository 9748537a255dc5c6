"""``espalier merge search``."""

from espalier.cli import options, show
from espalier.verbs.merge_search import merge_search

command = options.command(merge_search, show.searched, positional=("models",), roles=("searcher", "merger"))
