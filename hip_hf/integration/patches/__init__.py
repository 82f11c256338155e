"""Per-architecture forwards: what registration alone cannot give (keys before RoPE). `families.py`
lists the families."""
