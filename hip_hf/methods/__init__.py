"""Methods: rules that say which key blocks a query block reads. One small file each, listed in `hip_hf/registry.py`."""
