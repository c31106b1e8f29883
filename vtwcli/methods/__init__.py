"""Published methods, one small file each, that only build schedules; the runtime knows nothing of them."""

from __future__ import annotations

from vtwcli.methods.dart import Dart
from vtwcli.methods.fastv import FastV
from vtwcli.methods.himap import HiMAP
from vtwcli.methods.method import Method
from vtwcli.methods.pyramiddrop import PyramidDrop
from vtwcli.methods.sparsevlm import SparseVLM, SparseVLMPlus
from vtwcli.methods.subsets import Attention, Contribution, Random, TwoStep, Uniform
from vtwcli.methods.v2drop import V2Drop
from vtwcli.methods.visipruner import VisiPruner
from vtwcli.methods.vtw import Vtw

# every method by the name that options, recipes and documents use, in the order of comparisons
METHODS: dict[str, type[Method]] = {
    one.key: one for one in (
        Vtw, VisiPruner, FastV,
        PyramidDrop, HiMAP, SparseVLM, SparseVLMPlus, V2Drop, Dart,
        Attention, Contribution, Random, Uniform, TwoStep,
    )
}  # fmt: skip
