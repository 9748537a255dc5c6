"""``espalier merge report``."""

from espalier.cli import options, show
from espalier.verbs.merge_report import merge_report

command = options.command(merge_report, show.reported, positional=("models",))
