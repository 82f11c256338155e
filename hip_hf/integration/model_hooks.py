"""Models are looked at as they are made and as their attention is set: refused where they would ignore `hip`, patched where
their settings ask for what only a patch gives."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hip_hf.integration.changes import set_attribute
from hip_hf.integration.extension import extends
from hip_hf.integration.names import attends_by_us
from hip_hf.integration.patches.registry import layers_to_extend, patch_layers
from hip_hf.integration.reach import check_class, check_heads, check_reach
from hip_hf.integration.settings import text_config, text_part


def install() -> None:
    """Wrap the three methods of `PreTrainedModel` that are called before a model's layers are made, after they were made, and
    when its attention is set. Harmless when called again."""
    _look_at_names()
    _look_at_layers()


def _look_at_names() -> None:
    adjust, change = PreTrainedModel._check_and_adjust_attn_implementation, PreTrainedModel.set_attn_implementation
    if adjust.__name__ == "hip_adjust":
        return

    def hip_adjust(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        check_class(self, attn_implementation)
        return adjust(self, attn_implementation, *args, **kwargs)

    def hip_set(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        asked = attn_implementation
        if isinstance(asked, dict):
            asked = asked.get(text_part(self), asked.get(""))
        check_reach(self, asked)
        check_heads(self, asked)
        change(self, attn_implementation, *args, **kwargs)

    set_attribute(PreTrainedModel, "_check_and_adjust_attn_implementation", hip_adjust)
    set_attribute(PreTrainedModel, "set_attn_implementation", hip_set)


def _look_at_layers() -> None:
    made = PreTrainedModel.post_init
    if made.__name__ == "hip_post_init":
        return

    def hip_post_init(self: Any) -> None:
        made(self)
        configs = [self.config, *(getattr(self.config, name, None) for name in self.config.sub_configs)]
        if any(attends_by_us(config) for config in configs):
            check_reach(self, text_config(self)._attn_implementation)
            check_heads(self, text_config(self)._attn_implementation)
        if any(getattr(config, "hip", None) is not None for config in configs) and extends(text_config(self)):
            patch_layers(layers_to_extend(self))

    set_attribute(PreTrainedModel, "post_init", hip_post_init)
