"""Transformers integration: knows models, masks and caches, and nothing of how attention is
computed."""
