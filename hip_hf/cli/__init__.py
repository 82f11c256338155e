"""The commands of `hip-hf`, one small module each: the function `main`, its options, and how the
result is published.

What a command measures stands in the module of `hip_hf.eval.measure` that has the same name. Beside
the commands there is what they share: `inputs` (model, device, files), `presets` (settings), and
`publish` (tables, JSON, files). `hip_hf_cli.py` lists the commands.
"""
