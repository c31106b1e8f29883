"""What every result document says about where it comes from: the model, the data, the run, the versions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vtwcli import __version__
from vtwcli.machine import distributed
from vtwcli.machine.libraries import versions
from vtwcli.machine.memory import peak_memory
from vtwcli.models.dtypes import name_of
from vtwcli.results.document import Dated, ModelRecord, Origin, RunRecord

if TYPE_CHECKING:
    from vtwcli.data.sources import DataMix
    from vtwcli.models.loading import LoadedModel


def model_of(loaded: LoadedModel) -> ModelRecord:
    """What a result document says about the model."""
    return {
        "name": loaded.name,
        "revision": loaded.revision,
        "family": loaded.family.model_type,
        "architecture": loaded.family.architecture,
        "dtype": name_of(loaded.dtype),
        **template_date(loaded),
    }


def template_date(loaded: LoadedModel) -> Dated:
    """The date that the chat template is told for today's, if it asks for one."""
    from vtwcli.models.prompts import fixed_date

    date = fixed_date(loaded.processor)
    return {} if date is None else {"template_date": date}


def origin_of(mix: DataMix, seed: int) -> Origin:
    """What documents end with: the data, what was skipped, the seed and the versions."""
    return {"data": list(mix.sources), "skipped": mix.skipped, "seed": seed, "versions": versions()}


def run_of(loaded: LoadedModel, timing: dict[str, float]) -> RunRecord:
    """What differs between equal runs."""
    return {
        "seconds": {name: round(value, 3) for name, value in timing.items()},
        "peak_memory_bytes": peak_memory(),
        "processes": distributed.size(),
        "device": str(loaded.device),
    }


def provenance_of(loaded: LoadedModel, mix: DataMix, **found: Any) -> dict[str, Any]:
    """Where a schedule comes from: the model, how it was found, and the data."""
    return {
        "model": loaded.name,
        "revision": loaded.revision,
        **found,
        "data": [entry["fingerprint"] for entry in mix.sources],
        "vtwcli": __version__,
    }
