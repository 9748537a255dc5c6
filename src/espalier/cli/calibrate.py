"""``espalier calibrate``."""

from espalier.cli import options, show
from espalier.verbs.calibrate import calibrate

command = options.command(calibrate, show.calibrated)
