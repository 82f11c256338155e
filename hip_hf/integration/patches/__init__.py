"""Per-architecture forwards: what registration alone cannot give (keys before RoPE). `registry.py`
lists the families."""
