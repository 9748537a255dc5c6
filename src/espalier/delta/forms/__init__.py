"""The forms of an update: small immutable objects of tensors, one per parameter. See ``update.py`` for the contract."""

from espalier.delta.forms.dense import Dense, Replace
from espalier.delta.forms.low_rank import LowRank, Pooled
from espalier.delta.forms.magnitude import Magnitude
from espalier.delta.forms.sparse import Columns, Rows, Sparse
from espalier.delta.forms.update import FORMS, Gain, Update, form, register_form, working_dtype

__all__ = [
    "FORMS",
    "Columns",
    "Dense",
    "Gain",
    "LowRank",
    "Magnitude",
    "Pooled",
    "Replace",
    "Rows",
    "Sparse",
    "Update",
    "form",
    "register_form",
    "working_dtype",
]
