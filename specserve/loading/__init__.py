"""Reading models: configs, folders and hub ids, safetensors."""

from specserve.loading.model import load_model

__all__ = ["load_model"]
