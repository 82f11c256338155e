"""What attention is worth and what it costs: `measure` finds out, `reporting` shows and keeps it,
`tasks` are for lm-eval.

The commands that users run are in `hip_hf.cli`. Nothing here parses a command line: what is wrong
raises ValueError.
"""
