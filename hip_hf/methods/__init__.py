"""Methods: rules that say which key blocks a query block reads. One small file each, listed in
`hip_hf/registry.py`."""

from hip_hf.methods.base import add_method as add_method
