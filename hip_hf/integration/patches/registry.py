"""The attention layers of a model that its family's patcher knows, and patching them."""

from __future__ import annotations

from torch import nn

from hip_hf.integration.patches.base import Patcher
from hip_hf.integration.patches.families import families, patcher_for
from hip_hf.integration.patches.forward import patch_layer
from hip_hf.integration.settings import text_config


def layers_of(model: nn.Module) -> list[tuple[nn.Module, Patcher]]:
    """The attention layers of the model, with the patcher of its family.

    Raises:
        ValueError: the family has no patcher, or the model has no such layers.
    """
    kind = text_config(model).model_type
    patcher = patcher_for(kind)
    if patcher is None:
        raise ValueError(
            f"model: got model type {kind!r}, allowed: {' | '.join(families())} (docs/patchers.md says how to write a patcher)"
        )
    layers = [module for module in model.modules() if type(module).__name__ == patcher.attention]
    if not layers:
        raise ValueError(
            f"model: got {type(model).__name__} without {patcher.attention}, allowed: Transformers' own {kind}"
        )
    return [(layer, patcher) for layer in layers]


def patch_layers(layers: list[tuple[nn.Module, Patcher]]) -> None:
    """Replace the forwards of attention layers, and nothing else."""
    for layer, patcher in layers:
        patch_layer(layer, patcher)


def layers_to_extend(model: nn.Module) -> list[tuple[nn.Module, Patcher]]:
    """The layers to patch for settings that extend the context, none where the family has no
    patcher. The model may attend by us later on.

    Raises:
        ValueError: the model has not the layers of its family.
    """
    return layers_of(model) if text_config(model).model_type in families() else []
