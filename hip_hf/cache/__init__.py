"""The KV cache in pages: pool, Transformers cache, offload, files."""
