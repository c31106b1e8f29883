"""The demo: a small trained LLaVA model and its training script."""

from vtwcli.io.files import demo_model as model_dir

__all__ = ["model_dir"]
