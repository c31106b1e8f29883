"""Published methods, one small file each, that only build schedules; the runtime knows nothing of them."""

from __future__ import annotations

from vtwcli.methods.cdpruner import CDPruner
from vtwcli.methods.dart import Dart
from vtwcli.methods.divprune import DivPrune
from vtwcli.methods.exits import Exit
from vtwcli.methods.fastervlm import FasterVLM
from vtwcli.methods.fastv import FastV
from vtwcli.methods.fitprune import FitPrune
from vtwcli.methods.fopru import FoPru
from vtwcli.methods.himap import HiMAP
from vtwcli.methods.hiprune import HiPrune
from vtwcli.methods.holov import HoloV
from vtwcli.methods.method import Method
from vtwcli.methods.prumerge import PruMerge
from vtwcli.methods.prumerge_plus import PruMergePlus
from vtwcli.methods.prunesid import PruneSID
from vtwcli.methods.pyramiddrop import PyramidDrop
from vtwcli.methods.sgl import SGL
from vtwcli.methods.shortv import ShortV
from vtwcli.methods.sparsevlm import SparseVLM, SparseVLMPlus
from vtwcli.methods.st3 import ST3
from vtwcli.methods.stages import Stages
from vtwcli.methods.subsets import Attention, Contribution, Random, TwoStep, Uniform
from vtwcli.methods.two_cuts import TwoCuts
from vtwcli.methods.v2drop import V2Drop
from vtwcli.methods.vica import ViCA
from vtwcli.methods.visionzip import VisionZip
from vtwcli.methods.visipruner import VisiPruner
from vtwcli.methods.vispruner import VisPruner
from vtwcli.methods.vscan import VScan
from vtwcli.methods.vtc_cls import VtcCls
from vtwcli.methods.vtw import Vtw
from vtwcli.methods.yopo import YOPO

# every method by the name that options, recipes and documents use, in the order of comparisons
METHODS: dict[str, type[Method]] = {
    one.key: one
    for one in (
        *(Vtw, VisiPruner),
        *(FastV, PyramidDrop, HiMAP, SparseVLM, SparseVLMPlus, V2Drop, Dart, FitPrune),
        *(Attention, Contribution, Random, Uniform, TwoStep),
        *(ShortV, ViCA, Exit, YOPO, ST3),
        *(FasterVLM, VtcCls, FoPru),
        *(VisionZip, PruMerge, PruMergePlus, DivPrune, CDPruner, VisPruner, HiPrune, VScan, HoloV, PruneSID),
        *(TwoCuts,),
        *(SGL,),
        *(Stages,),
    )
}
