"""Published methods, one small file each, that only build schedules; the runtime knows nothing of them."""

from __future__ import annotations

from vtwcli.methods.cdpruner import CDPruner
from vtwcli.methods.divprune import DivPrune
from vtwcli.methods.fastervlm import FasterVLM
from vtwcli.methods.fastv import FastV
from vtwcli.methods.fopru import FoPru
from vtwcli.methods.hiprune import HiPrune
from vtwcli.methods.holov import HoloV
from vtwcli.methods.method import Method
from vtwcli.methods.prumerge import PruMerge
from vtwcli.methods.prumerge_plus import PruMergePlus
from vtwcli.methods.prunesid import PruneSID
from vtwcli.methods.subsets import Attention, Contribution, Random, TwoStep, Uniform
from vtwcli.methods.two_cuts import TwoCuts
from vtwcli.methods.visionzip import VisionZip
from vtwcli.methods.visipruner import VisiPruner
from vtwcli.methods.vispruner import VisPruner
from vtwcli.methods.vscan import VScan
from vtwcli.methods.vtc_cls import VtcCls
from vtwcli.methods.vtw import Vtw

# every method by the name that options, recipes and documents use, in the order of comparisons
METHODS: dict[str, type[Method]] = {
    one.key: one
    for one in (
        *(Vtw, VisiPruner, FastV, Attention, Contribution, Random, Uniform, TwoStep),
        *(FasterVLM, VtcCls, FoPru),
        *(VisionZip, PruMerge, PruMergePlus, DivPrune, CDPruner, VisPruner, HiPrune, VScan, HoloV, PruneSID),
        *(TwoCuts,),
    )
}
