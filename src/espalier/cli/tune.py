"""``espalier tune``."""

from espalier.cli import options, show
from espalier.verbs.tune import tune

command = options.command(tune, show.training, roles=("adapter", "brancher", "optimizer"), recipe=True, also={"method": "--select"})
