"""Names that both the settings and the formulas go by. Standard library only."""

from typing import Literal, get_args

PreferenceKind = Literal[
    "sigmoid", "robust", "hinge", "ipo", "reference_free", "nca_pair", "apo_zero", "apo_down", "sppo_hard",
    "bco_pair",
]  # fmt: skip
PREFERENCE_KINDS: tuple[PreferenceKind, ...] = get_args(PreferenceKind)
SMOOTHED_KINDS: tuple[PreferenceKind, ...] = ("sigmoid", "robust")
