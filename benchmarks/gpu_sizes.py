"""The sizes of `gpu_run.py`: what a GPU measures, and the same, tiny, on a machine without one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tune

from hip_hf.backends.triton import checks
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import doctor, documents, real_model
from hip_hf.eval.measure.latency import TimingPlan

ROOT = Path(__file__).resolve().parents[1]

# Kernel tests that need no GPU. Of the others, those of what every call with the default settings
# runs come first: they are also the quicker half. A new file belongs to the second.
NO_GPU = ("test_kernel_results.py", "test_kernel_rule.py", "test_kernel_tuning.py")
NAMES = ("prefill", "decode", "pyramid", "need", "select_half", "dense", "paged", "ops")
FIRST = tuple(f"test_kernel_{name}.py" for name in NAMES)
KERNEL_TESTS = ROOT / "tests" / "backends"
EVERY = sorted(file.name for file in KERNEL_TESTS.glob("test_kernel_*.py"))
SECOND = tuple(name for name in EVERY if name not in NO_GPU and name not in FIRST)
# Of models with random weights: Llama 3.1 8B's, and one for the dry run.
LLAMA_8B = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072,
)  # fmt: skip
TINY = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=256, max_position_embeddings=1024,
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What is measured: of attention calls in `dtype` on `device`, of the first and the second half
    of the tests, and of a model.

    `checks`, `parts`: dtypes and parts of the kernels that `doctor` tries. `hyper`:
    HyperAttention's options. `candidates`: other launches of each of the `kernels`, for a call of
    `tuned` tokens. `shape`: of a Llama with random weights, which is timed with a `long_prompt`
    where `model` is not there.
    """

    device: str = "cuda:0"
    dtype: str = "bf16"
    checks: tuple[str, ...] = ("bf16", "fp16", "fp32")
    parts: tuple[str, ...] = doctor.PARTS
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    config: dict[str, Any] = field(default_factory=lambda: dict(backend="triton", dense_below=0))
    prefill: tuple[int, ...] = (8192, 32768, 131072, 1 << 20)
    decode: tuple[int, ...] = (131072, 1 << 20)
    backward: tuple[int, ...] = (8192, 32768)
    hyper: dict[str, int] = field(default_factory=dict)
    batches: tuple[int, ...] = (1, 16)
    repeats: int = 5
    tests: tuple[tuple[str, ...], tuple[str, ...]] = (FIRST, SECOND)
    processes: int = 14
    kernels: tuple[str, ...] = ("prefill", "search", "decode search", "votes", "decode")
    candidates: int = 16
    tuned: int = tune.TOKENS
    tune_repeats: int = tune.REPEATS
    model: Path = ROOT / real_model.FOLDER
    model_dtype: str = "bf16"
    shape: dict[str, Any] = field(default_factory=lambda: LLAMA_8B)
    prompt: int = 8192
    long_prompt: int = 32768
    budget: int = HiPConfig.budget
    new_tokens: int = 64

    @property
    def settings(self) -> HiPConfig:
        return HiPConfig(**self.config)

    def plan(self, **fields: Any) -> TimingPlan:
        shape = dict(
            heads=self.heads, kv_heads=self.kv_heads, head_dim=self.dim, repeats=self.repeats
        )
        # a dense prompt of a million tokens takes some 15 s: its first run counts, and there is no
        # other
        own = dict(
            dtypes=[self.dtype],
            settings={"hip": self.settings},
            device=torch.device(self.device),
            enough=5.0,
        )
        return TimingPlan(**{**shape, **own, **fields})


# The same steps on a machine without a GPU: kernels by Triton's interpreter, which does not know
# bf16.
DRY = Sizes(
    device="cpu", dtype="fp16", checks=("fp32",), parts=(checks.GRADIENTS,), heads=2, kv_heads=1,
    dim=16, config=dict(doctor.SIZES, backend="triton", beam=2, rescore=2, decode_refresh=2),
    prefill=(128, 192), decode=(96,), backward=(128,), hyper=checks.HYPER_SIZES, batches=(2,),
    repeats=1, tests=(("test_kernel_rule.py",), ("test_kernel_tuning.py",)), processes=1,
    kernels=("prefill", "search", "decode search", "votes"), candidates=1, tuned=64, tune_repeats=1,
    model=documents.CHECKPOINT, model_dtype="fp32", shape=TINY, prompt=512, long_prompt=192,
    budget=64, new_tokens=2,
)  # fmt: skip
