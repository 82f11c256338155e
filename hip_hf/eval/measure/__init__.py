"""What is measured: a module for each command of `hip_hf.cli` that measures, under the same name,
and what they share."""
