"""What the fuzzing has found, each in one small case."""

from __future__ import annotations

import torch
from helpers import assert_near, causal, eager, make_problem, make_qkv, small
from small_pages import make_layer

from hip_hf import DecodeState, HiPConfig, hip_attention
from hip_hf.attention import attend
from hip_hf.backends.tensors import merge


def test_half_precision_is_widened_before_it_is_scaled() -> None:
    """A query of 60,000, times 1.5, is no infinity, whether it is read densely or by blocks."""
    for method in ("dense", "hip"):
        q, k, v = make_qkv(20, dtype=torch.float16)
        q[..., 0], k[..., 0] = 60000.0, 0.0
        out, _ = hip_attention(
            q, k, v, config=small(method=method, budget=32), scale=1.5, return_lse=True
        )  # type: ignore[misc]
        assert_near(out, eager(q, k, v, causal(1, 20, 20), 1.5)[0], 5e-3)


def test_an_infinite_logit_of_a_later_key_stays_hidden() -> None:
    for config in (HiPConfig(method="dense"), small(budget=32)):
        q, k, v = make_qkv(20)
        q[:, :, :10] = q[:, :, :10].abs() * 1e25
        k[:, :, 10] = 1e25
        out, _ = hip_attention(q, k, v, config=config, return_lse=True)  # type: ignore[misc]
        assert out[:, :, :10].isfinite().all()


def test_keys_whose_logits_overflow_downwards_weigh_nothing() -> None:
    """All keys of a row, beside the attention sink; plain attention gives 0."""
    q, k, v = make_qkv(20)
    out = hip_attention(q.abs() * 1e25, -k.abs() * 1e25, v, sinks=torch.zeros(4))
    assert torch.equal(out, torch.zeros_like(v).repeat_interleave(2, 1))  # type: ignore[arg-type]


def test_merged_parts_weigh_one_together() -> None:
    """Also where the log-sum-exp of two parts is that of one, since 1e9 + log(2) is 1e9 in fp32."""
    out, lse = torch.ones(1, 3), torch.full((1,), 1e9)
    merge(out, lse, torch.ones(1, 3), lse.clone())
    assert torch.equal(out, torch.ones(1, 3))


def test_h2o_after_a_crop_within_the_window() -> None:
    q, k, v = make_qkv(120)
    config, state = small(method="h2o", decode_refresh=1), DecodeState()
    hip_attention(q, k, v, config=config, state=state)
    state.crop(112)
    again = hip_attention(
        q[:, :, 112:113], k[:, :, :113], v[:, :, :113], config=config, state=state
    )
    assert torch.equal(
        again, hip_attention(q[:, :, 112:113], k[:, :, :113], v[:, :, :113], config=config)
    )  # type: ignore[arg-type]


def test_a_chunk_by_hyper_from_pages() -> None:
    config = small(method="hyper", options={"block_size": 8, "sample_size": 8, "min_seq_len": 16})
    q, k, v = make_qkv(80, 40)
    layer = make_layer(config, "pages")
    for part in (slice(0, 40), slice(40, 80)):
        keys, values = layer.update(k[:, :, part], v[:, :, part])
    got, want = (attend(make_problem(q, *pair), config).out for pair in ((keys, values), (k, v)))
    assert torch.equal(got, want)
