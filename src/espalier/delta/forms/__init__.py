"""The forms of an update: small immutable objects of tensors, one per parameter. See ``update.py`` for the contract."""

from espalier.delta.forms.bank import Bank
from espalier.delta.forms.block_affine import BlockAffine
from espalier.delta.forms.blocks import Blocks
from espalier.delta.forms.combined import Chain, Sum
from espalier.delta.forms.dense import Dense, Replace
from espalier.delta.forms.diagonal import Diagonal
from espalier.delta.forms.factored import Factored
from espalier.delta.forms.golomb import Golomb
from espalier.delta.forms.hadamard import Hadamard
from espalier.delta.forms.kronecker import Kronecker
from espalier.delta.forms.low_rank import LowRank, Pooled
from espalier.delta.forms.made import Made
from espalier.delta.forms.magnitude import Magnitude
from espalier.delta.forms.masked import MaskedLowRank, ScaledLowRank, bitmaps
from espalier.delta.forms.output_map import OutputMap
from espalier.delta.forms.permute import Permute
from espalier.delta.forms.quantized import Quantized
from espalier.delta.forms.random_bases import RandomBases
from espalier.delta.forms.seeded import Seeded, SeededLowRank
from espalier.delta.forms.singular_scale import SingularScale
from espalier.delta.forms.sparse import Columns, Rows, Sparse
from espalier.delta.forms.subspace import Subspace
from espalier.delta.forms.support import compact
from espalier.delta.forms.ternary import Ternary
from espalier.delta.forms.tiled import Tiled
from espalier.delta.forms.tucker import Tucker
from espalier.delta.forms.update import FORMS, Gain, Update, form, register_form, working_dtype

__all__ = [
    "FORMS",
    "Bank",
    "BlockAffine",
    "Blocks",
    "Chain",
    "Columns",
    "Dense",
    "Diagonal",
    "Factored",
    "Gain",
    "Golomb",
    "Hadamard",
    "Kronecker",
    "LowRank",
    "Made",
    "Magnitude",
    "MaskedLowRank",
    "OutputMap",
    "Permute",
    "Pooled",
    "Quantized",
    "RandomBases",
    "Replace",
    "Rows",
    "ScaledLowRank",
    "Seeded",
    "SeededLowRank",
    "SingularScale",
    "Sparse",
    "Subspace",
    "Sum",
    "Ternary",
    "Tiled",
    "Tucker",
    "Update",
    "bitmaps",
    "compact",
    "form",
    "register_form",
    "working_dtype",
]
