"""Offload and files: the same bits wherever the pages lie, honest statistics, and nothing lost when
something fails."""

from __future__ import annotations

import copy
import errno
import multiprocessing
import os
import pickle
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_batch, make_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

import hip_hf
from hip_hf import HiPCache
from hip_hf.cache import offload
from hip_hf.cache.pages import BlockTable
from hip_hf.integration import paged_layer


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_layer, "PAGE", 8)


def decoded(
    model: PreTrainedModel, cache: HiPCache, lengths: list[int], steps: int = 8, chunk: int = 1000
) -> torch.Tensor:
    """Logits of a left-padded prompt, read in chunks, and of steps after it."""
    batch, out = make_batch(lengths), []
    ids, mask = batch["input_ids"], batch["attention_mask"]
    more = torch.randint(3, 90, (len(lengths), steps), generator=torch.Generator().manual_seed(1))
    tokens = torch.cat([ids, more], -1)
    mask = torch.cat([mask, torch.ones_like(more)], -1)
    ends = [
        *range(min(chunk, ids.shape[1]), ids.shape[1], chunk),
        ids.shape[1],
        *range(ids.shape[1] + 1, tokens.shape[1] + 1),
    ]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    first = 0
    with torch.no_grad():
        for end in ends:
            out.append(
                model(
                    tokens[:, first:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, first:end],
                    past_key_values=cache,
                ).logits[:, -1]
            )
            first = end
    return torch.stack(out)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize(("pages", "chunk"), [(6, 1000), (6, 40), (100, 40)])
def test_offload_changes_no_bit(where: str, pages: int, chunk: int) -> None:
    model = make_model("llama", decode_refresh=2, rescore=1)
    resident = decoded(model, HiPCache(model.config), [120, 97], chunk=chunk)
    cache = HiPCache(model.config, offload=where, device_pages=pages)
    assert torch.equal(decoded(model, cache, [120, 97], chunk=chunk), resident)
    found = cache.statistics()
    assert found["attention"].hits > 0
    if pages == 6:
        assert found["attention"].misses > found["attention"].hits
    else:  # every page is fetched once at most, for two heads of two layers, keys and values
        assert found["attention"].misses <= 8 * 2 * 16
    assert found["attention"].fetched == found["attention"].misses * 8 * 16 * 4
    assert "hit rate" in str(found)


@pytest.mark.parametrize(
    ("family", "beams", "pages"),
    [
        ("llama", 3, 4),
        ("llama", 1, 100),
        ("mistral_full", 1, 5),
        ("qwen3", 1, 11),
        ("gemma2", 1, 4),
        ("gemma2", 3, 11),
    ],
)
def test_generate_with_offload_changes_no_token(family: str, beams: int, pages: int) -> None:
    """Pools that hold little more than one step needs (4 pages), less than the search looks at, and
    everything. Candidates that are looked at whole, and are more than a pool holds, stream past
    it."""
    model = make_model(family, decode_refresh=2, rescore=2)
    options: dict[str, Any] = dict(do_sample=False, max_new_tokens=5, num_beams=beams)
    batch = make_batch([130, 95])
    with torch.no_grad():
        resident = model.generate(**batch, **options)
        cache = HiPCache(model.config, offload="cpu", device_pages=pages)
        assert torch.equal(model.generate(**batch, **options, past_key_values=cache), resident)
    sparse = [row for row in hip_hf.explain(model) if row.path == "sparse"]
    assert len(sparse) == (1 if family == "gemma2" else 2)
    assert all(row.share < 0.9 for row in sparse)
    found = cache.statistics()
    assert found["search"].hits > 0 or pages == 4
    assert found["search"].streamed > 0 or pages > 4
    assert found["attention"].hits > 0
    assert found.together.misses > 0


def test_what_the_search_reads_is_counted_apart() -> None:
    model = make_model("llama", decode_refresh=1, rescore=2)
    resident = decoded(model, HiPCache(model.config), [120])
    cache = HiPCache(model.config, offload="cpu", device_pages=9)
    assert torch.equal(decoded(model, cache, [120]), resident)
    found = cache.statistics()
    assert found["search"].hits > 0
    assert found["search"].misses > 0
    together = found.together
    assert together.misses == found["search"].misses + found["attention"].misses
    assert together.fetched == together.misses * 8 * 16 * 4
    assert f"{together.hit_rate:.1%}" in str(found).splitlines()[-1]
    sizes = {
        (store.keys.pool.pages, store.values.pool.pages)
        for store in (layer.pool for layer in cache.paged)
    }
    assert sizes == {(18, 9)}


def small_store() -> offload.OffloadedStore:
    """Five pages of two tokens in host memory, three on the device."""
    store = offload.OffloadedStore(1, 4, torch.float32, torch.device("cpu"), 2, "cpu", 3, 0)
    store.arenas, store.bounds = [torch.arange(40.0).view(1, 10, 4)], [0]
    return store


def test_the_search_and_attention_hold_a_page_once() -> None:
    """What attention reads, the search has just looked at. Hits and misses are those of the reader
    that asked."""
    store = small_store()
    out = torch.empty(2, 8)
    store.for_search().head_rows(slice(0, 1), 2)[0].take(torch.tensor([1, 3]), out)
    assert out.tolist() == [[*range(8, 16)], [*range(24, 32)]]
    store.arenas[0].zero_()  # whoever went back to host memory would see it
    store.head_rows(slice(0, 1), 2)[0].take(torch.tensor([3, 4]), out)
    assert out.tolist() == [[*range(24, 32)], [0] * 8]
    assert store.pool.traffic == {
        "search": offload.Traffic(misses=2, fetched=64),
        "attention": offload.Traffic(hits=1, misses=1, fetched=32),
    }
    # a page that is written anew is so on the device
    table = BlockTable([3])
    store.write(table, 0, torch.full((1, 2, 4), 7.0))
    store.for_search().head_rows(slice(0, 1), 2)[0].take(torch.tensor([3]), out[:1])
    assert out[0].tolist() == [7] * 8
    # and one that another is copied over is forgotten
    store.copy_page(3, 4, 1)
    store.head_rows(slice(0, 1), 2)[0].take(torch.tensor([4]), out[:1])
    assert out[0].tolist() == [7] * 4 + [0] * 4
    assert store.pool.traffic["attention"].misses == 2


@pytest.mark.fast
def test_the_least_recently_used_page_makes_room() -> None:
    store = small_store()
    pool = store.pool
    traffic = pool.traffic["attention"]
    for page in (0, 1, 2, 0, 3):  # 3 takes the place of 1
        pool.slots(0, torch.tensor([page]), "attention")
    assert traffic.misses == 4
    pool.slots(0, torch.tensor([0, 2, 3]), "attention")
    assert traffic.misses == 4
    slot = int(pool.slots(0, torch.tensor([1]), "attention")[0])
    assert traffic.misses == 5
    assert torch.equal(pool.rows[0, slot * 2 : slot * 2 + 2], store.arenas[0][0, 2:4])


@pytest.mark.parametrize("rescore", [1, 8])
def test_a_pool_that_is_too_small_is_refused_and_the_cache_intact(rescore: int) -> None:
    """A selection is four blocks, at worst each in a page of its own. The search looks at more, in
    several goes."""
    model = make_model("llama", rescore=rescore)
    ids = make_batch([120])["input_ids"]
    with torch.no_grad():
        cache = HiPCache(model.config, offload="cpu", device_pages=3)
        model(ids[:, :16], past_key_values=cache)
        before = [layer.keys.clone() for layer in cache.layers]
        with pytest.raises(
            ValueError,
            match="device_pages: got 3, allowed: at least 4, the pages one step may need",
        ):
            model(ids[:, 16:], past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [16, 16]
        assert all(
            torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True)
        )
    enough = HiPCache(model.config, offload="cpu", device_pages=4)
    resident = decoded(model, HiPCache(model.config), [120])
    assert torch.equal(decoded(model, enough, [120]), resident)
    assert [row.path for row in hip_hf.explain(model)] == ["sparse", "sparse"]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (dict(offload="gpu", device_pages=3), "offload: got 'gpu', allowed: None | cpu | disk"),
        (dict(offload="cpu"), "device_pages: got None, allowed: an integer >= 2"),
        (dict(device_pages=3), "device_pages: got 3, allowed: .* None without"),
        (dict(offload="cpu", device_pages=1), "device_pages: got 1"),
    ],
)
def test_bad_arguments(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match.replace("|", r"\|")):
        HiPCache(make_model("llama").config, **given)
    with pytest.raises(ValueError, match="offload: got None"):
        HiPCache(make_model("llama").config).statistics()


def test_a_full_disk_is_an_error_and_the_cache_intact(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", rescore=1)
    ids = make_batch([100])["input_ids"]
    cache = HiPCache(model.config, offload="disk", device_pages=20)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(MemoryError, match="No space left on device"):
                model(ids[:, 40:], past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [40, 40]
        model(ids[:, 40:], past_key_values=cache)


def append_without_room(cache: HiPCache, what: int, limit: int) -> None:
    """In a child process: append 2 GiB (more than lies free) under a limit; 7: a MemoryError, and
    the cache is what it was."""
    before = [layer.keys for layer in cache.layers]
    more = torch.zeros(1, 1, 1, 1).expand(1, 2, 2**24, 16)
    resource.setrlimit(what, (limit, limit))
    try:
        cache.update(more, more, 1)
    except MemoryError:
        same = [
            torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True)
        ]
        os._exit(7 if all(same) else 8)
    os._exit(0)


@pytest.mark.parametrize("where", [None, "cpu", "disk"])
def test_no_room_for_pages_is_an_error_and_the_cache_intact(where: str | None) -> None:
    """The operating system itself refuses: address space, or for files their size (as a full disk
    does)."""
    cache = small_cache(**{} if where is None else dict(offload=where, device_pages=20))
    what, limit = resource.RLIMIT_FSIZE, 2**20
    if where != "disk":
        what, limit = (
            resource.RLIMIT_AS,
            int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**25,
        )
    process = multiprocessing.get_context("fork").Process(
        target=append_without_room, args=(cache, what, limit)
    )
    process.start()
    process.join(60)
    assert process.exitcode == 7


@pytest.mark.fast
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_saved_cache_goes_on_where_it_was(family: str, tmp_path: Path) -> None:
    model = make_model(family, decode_refresh=1)
    batch = make_batch([60, 43])
    cache = HiPCache(model.config)
    with torch.no_grad():
        model(**batch, past_key_values=cache)
        cache.save(tmp_path / "cache")
        again = HiPCache(model.config, offload="cpu", device_pages=20)
        again.load(tmp_path / "cache")
        again.save(tmp_path / "cache")
        assert again.statistics().together.misses == 0  # files are written past the pools
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], -1)
        step = dict(input_ids=torch.tensor([[5], [6]]), attention_mask=mask)
        assert torch.equal(
            model(**step, past_key_values=again).logits, model(**step, past_key_values=cache).logits
        )
    # the file is plain safetensors
    plain = load_file(tmp_path / "cache")
    assert torch.equal(plain["1.keys"], cache.layers[1].keys[:, :, :-1])
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"]


def small_cache(tokens: int = 30, **options: Any) -> HiPCache:
    cache = HiPCache(make_model("llama").config, **options)
    for layer in cache.layers:
        layer.update(torch.randn(1, 2, tokens, 16), torch.randn(1, 2, tokens, 16))
    return cache


@pytest.mark.parametrize(
    "through",
    [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))],
    ids=["copied", "pickled"],
)
@pytest.mark.parametrize("where", [None, "cpu", "disk"])
def test_copies_and_pickles_go_on_by_themselves(where: str | None, through: Any) -> None:
    model = make_model("llama", decode_refresh=4)
    ids = make_batch([90])["input_ids"]
    cache = HiPCache(model.config, offload=where, device_pages=where and 20)

    def steps(of: HiPCache, *tokens: int) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat(
                [model(torch.tensor([[token]]), past_key_values=of).logits for token in tokens]
            )

    with torch.no_grad():
        model(ids, past_key_values=cache)
    steps(cache, 5, 6)
    other = through(cache)
    assert [layer.offload_to for layer in other.paged] == [where] * 2
    elsewhere = steps(other, 7, 8, 9)
    assert cache.get_seq_length() == 92
    assert torch.equal(steps(cache, 7, 8, 9), elsewhere)


def test_broken_and_foreign_files_are_refused_and_change_nothing(tmp_path: Path) -> None:
    cache, path = small_cache(), tmp_path / "cache"
    before = cache.layers[0].keys
    other = HiPCache(make_model("qwen3").config)
    other.save(path)
    with pytest.raises(ValueError, match="allowed: one of this model"):
        cache.load(path)
    cache.save(path)
    whole = path.read_bytes()
    for broken in (
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:4],
        b"",
        b"not a cache at all",
        whole + b"more",
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="truncated or foreign file"):
            cache.load(path)
    checkpoint = Path(hip_hf.__file__).parent / "assets" / "checkpoint" / "model.safetensors"
    with pytest.raises(ValueError, match="format 'pt', allowed: 'hip_hf"):
        cache.load(checkpoint)
    with pytest.raises(FileNotFoundError, match="which is no file"):
        cache.load(tmp_path / "nowhere")
    assert torch.equal(cache.layers[0].keys, before)


def save_under(cache: HiPCache, path: Path, limit: int | None) -> None:
    """In a child process: save under a limit of file size, or be killed in the middle."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            cache.save(path)
        except OSError:
            os._exit(7)
        os._exit(0)
    fsync = os.fsync

    def killed(descriptor: int) -> None:
        fsync(descriptor)
        os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = killed
    cache.save(path)


@pytest.mark.parametrize(("limit", "code"), [(100_000, 7), (None, -signal.SIGKILL)])
def test_a_full_disk_or_a_kill_during_save_leaves_the_old_file(
    limit: int | None, code: int, tmp_path: Path
) -> None:
    path = tmp_path / "cache"
    small_cache().save(path)
    before = path.read_bytes()
    # parts small enough for torch to copy them without threads, which a forked process does not
    # have
    process = multiprocessing.get_context("fork").Process(
        target=save_under, args=(small_cache(1500), path, limit)
    )
    process.start()
    process.join(60)
    assert process.exitcode == code
    assert path.read_bytes() == before
    small_cache().load(path)
    if limit is not None:  # an error cleans up after itself; a killed process cannot
        assert list(tmp_path.iterdir()) == [path]


def test_a_file_made_of_something_else_is_refused_when_asked(tmp_path: Path) -> None:
    cache, path = small_cache(), tmp_path / "cache"
    made_of = {"tokens": [1, 2], "layers": {0: "dense"}}
    cache.save(path, made_of=made_of)
    before = cache.layers[0].keys
    for other in ({**made_of, "tokens": [1, 3]}, {"layers": {0: "dense"}}, {}):
        with pytest.raises(
            ValueError,
            match=r"got a cache made with tokens=\[1, 2\], allowed: tokens=(\[1, 3\]|None)",
        ):
            cache.load(path, made_of=other)
    with pytest.raises(ValueError, match="got a cache made with seed=None, allowed: seed=0"):
        cache.load(path, made_of={**made_of, "seed": 0})
    for same in (made_of, None):
        again = HiPCache(cache.config)
        again.load(path, made_of=same)
        assert torch.equal(again.layers[0].keys, before)
    cache.save(path)
    with pytest.raises(ValueError, match="got a cache made with tokens=None"):
        cache.load(path, made_of=made_of)
