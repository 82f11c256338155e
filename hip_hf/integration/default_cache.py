"""Which caches models get: the dynamic cache of a model that attends by `hip` is a `HiPCache`, and the full-attention layers of
a static cache have a decode state."""

from __future__ import annotations

from typing import Any

from transformers import cache_utils
from transformers.cache_utils import DynamicCache, LinearAttentionAndStaticFullAttentionLayer, StaticLayer

from hip_hf.integration.cache_layers import HiPHybridStaticLayer, HiPStaticLayer, at_defaults
from hip_hf.integration.changes import set_attribute, set_item
from hip_hf.integration.hip_cache import HiPCache
from hip_hf.integration.names import attends_by_us


def _new_object(cls: type, *args: Any, **kwargs: Any) -> Any:
    """What Python does for a class without a `__new__`."""
    return object.__new__(cls)


def _new_dynamic_cache(cls: type, *args: Any, **kwargs: Any) -> Any:
    """`DynamicCache.__new__`: the cache made from the config of a `hip` model, and from nothing else, is a `HiPCache`."""
    config = kwargs.get("config")
    others = {name: value for name, value in kwargs.items() if name != "config"}
    if (
        cls is DynamicCache
        and not args
        and at_defaults(others)
        and config is not None
        and attends_by_us(config.get_text_config(decoder=True))
    ):
        cls = HiPCache
    return object.__new__(cls)


def install() -> None:
    """Let caches made from a model's config be these."""
    ours = {StaticLayer: HiPStaticLayer, LinearAttentionAndStaticFullAttentionLayer: HiPHybridStaticLayer}
    mapping = cache_utils.STATIC_LAYER_TYPE_MAPPING
    for name, layer in list(mapping.items()):
        if layer in ours:
            set_item(mapping, name, ours[layer])
    if "__new__" not in vars(DynamicCache):
        # what a class once had in this place cannot be deleted: `object.__new__` would refuse all arguments ever after
        DynamicCache.__new__ = _new_object  # type: ignore[method-assign]
    set_attribute(DynamicCache, "__new__", _new_dynamic_cache)
