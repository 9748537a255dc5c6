"""Full tuning: every number of the chosen parameters trains."""

from __future__ import annotations

from espalier.attach.whole_tensors import WholeTensors
from espalier.registry import adapter


@adapter("full", ids=(), paper="", learning_rate=2e-5, targets="all", size="")
class Full(WholeTensors):
    """Train the parameters themselves: ``W' = V``, V starting at W, kept in the trained dtype (float32).

    Products use V rounded to the dtype of the activations, so a bf16 model trains with float32 master
    values and small steps are not lost to rounding. The stored delta holds V rounded to the base's dtype:
    applying it gives exactly the model that was evaluated.
    """
