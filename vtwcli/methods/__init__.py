"""Published methods, one small file each, that only build schedules; the runtime knows nothing of them."""

from __future__ import annotations

from vtwcli.methods.exits import Exit
from vtwcli.methods.fastv import FastV
from vtwcli.methods.fitprune import FitPrune
from vtwcli.methods.method import Method
from vtwcli.methods.shortv import ShortV
from vtwcli.methods.st3 import ST3
from vtwcli.methods.subsets import Attention, Contribution, Random, TwoStep, Uniform
from vtwcli.methods.vica import ViCA
from vtwcli.methods.visipruner import VisiPruner
from vtwcli.methods.vtw import Vtw
from vtwcli.methods.yopo import YOPO

# every method by the name that options, recipes and documents use, in the order of comparisons
METHODS: dict[str, type[Method]] = {
    one.key: one
    for one in (
        Vtw,
        VisiPruner,
        FastV,
        Attention,
        Contribution,
        Random,
        Uniform,
        TwoStep,
        ShortV,
        ViCA,
        Exit,
        FitPrune,
        YOPO,
        ST3,
    )
}
