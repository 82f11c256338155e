"""Commands that measure: each module is one `hip-hf` command."""
