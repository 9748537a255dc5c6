"""``espalier plan``."""

from espalier.cli import options, show
from espalier.verbs.plan import plan

command = options.command(plan, show.planned, roles=("adapter", "brancher", "optimizer"), recipe=True, also={"method": "--select"})
