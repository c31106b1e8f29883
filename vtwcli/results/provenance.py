"""What every result document says about where it comes from: the model, the data, the run, the versions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vtwcli import __version__
from vtwcli.machine import distributed
from vtwcli.machine.memory import peak_memory
from vtwcli.models.dtypes import name_of

if TYPE_CHECKING:
    from vtwcli.data.sources import DataMix
    from vtwcli.models.loading import LoadedModel


def model_of(loaded: LoadedModel) -> dict[str, Any]:
    """What a result document says about the model, with ``template_date``, if its chat template asks for today's."""
    return {
        "name": loaded.name,
        "revision": loaded.revision,
        "family": loaded.family.model_type,
        "architecture": loaded.family.architecture,
        "dtype": name_of(loaded.dtype),
        **template_date(loaded),
    }


def template_date(loaded: LoadedModel) -> dict[str, str]:
    """The date that the chat template is told for today's, if it asks for one."""
    from vtwcli.models.prompts import fixed_date

    date = fixed_date(loaded.processor)
    return {} if date is None else {"template_date": date}


def run_of(loaded: LoadedModel, timing: dict[str, float], **measured: Any) -> dict[str, Any]:
    """What differs between equal runs: seconds, memory, processes, device, and what else was ``measured``."""
    return {
        "seconds": {name: round(value, 3) for name, value in timing.items()},
        "peak_memory_bytes": peak_memory(),
        "processes": distributed.size(),
        "device": str(loaded.device),
        **measured,
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
