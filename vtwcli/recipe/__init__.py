"""The recipe and its sections: every option of every command with its one default."""

from vtwcli.recipe.exports import ExportSection
from vtwcli.recipe.recipe import (
    STEPS,
    AnalyzeSection,
    BudgetSection,
    CalibrateSection,
    EvalSection,
    GatesSection,
    ModelSection,
    Policy,
    Recipe,
    ScheduleSection,
)
from vtwcli.recipe.search import SearchSection

__all__ = [
    "STEPS",
    "AnalyzeSection",
    "BudgetSection",
    "CalibrateSection",
    "EvalSection",
    "ExportSection",
    "GatesSection",
    "ModelSection",
    "Policy",
    "Recipe",
    "ScheduleSection",
    "SearchSection",
]
