"""Transformers integration: knows models, masks and caches, and not how attention is computed."""
