"""``espalier pretrain``."""

from espalier.cli import options, show
from espalier.verbs.pretrain import pretrain

command = options.command(pretrain, show.training, roles=("adapter", "optimizer"), recipe=True, also={"method": "--select"})
