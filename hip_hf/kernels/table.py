"""Written by `benchmarks/tune.py`: kernel -> target -> head dim up to -> rows, keys, warps, stages."""

# fmt: off
TILES: dict[str, dict[str, dict[int, tuple[int, int, int, int]]]] = \
{'backward keys': {'sm90': {128: (64, 64, 8, 2), 256: (64, 64, 8, 2)}},
 'backward queries': {'sm90': {128: (128, 64, 8, 2), 256: (128, 64, 8, 2)}},
 'decode': {'sm90': {128: (16, 64, 4, 3), 256: (16, 64, 4, 3)}},
 'prefill': {'sm90': {128: (128, 64, 8, 2), 256: (128, 64, 8, 2)}}}
