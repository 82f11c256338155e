"""What a model says of each token of a prompt: read in one forward pass, or its end by decode
steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hip_hf.config import HiPConfig
from hip_hf.integration.api import configure
from hip_hf.integration.hip_cache import HiPCache

# Rows whose logits are computed at once: with a vocabulary of 50,000 they take 100 MB, and those of
# 8K rows 1.6 GB.
LOGITS_ROWS = 512
# How many tokens show whether a model's logits are made as `logits_of` makes them, and how exactly.
LOGITS_PROBE, TOLERANCE = 8, 1e-2


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of the decoder's last hidden states, fp32: `[rows, hidden size]` to
    `[rows, vocabulary]`."""
    config = model.config.get_text_config(decoder=True)
    logits = model.get_output_embeddings()(hidden).float()
    # of Cohere and of Granite
    logits = logits * getattr(config, "logit_scale", 1) / getattr(config, "logits_scaling", 1)
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return logits if cap is None else cap * torch.tanh(logits / cap)


def hidden_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """The decoder's last hidden states of a prompt: `[tokens, hidden size]`."""
    tokens = torch.tensor([ids], device=model.device)
    return model.get_decoder()(tokens, use_cache=False).last_hidden_state[0]


@torch.no_grad()
def check_logits(model: Any, ids: Sequence[int]) -> None:
    """Raise ValueError for a model whose logits are made in another way than `logits_of` knows."""
    some = ids[:LOGITS_PROBE]
    got = logits_of(model, hidden_of(model, some))
    want = model(torch.tensor([some], device=model.device), use_cache=False).logits[0].float()
    if not torch.allclose(got, want, atol=TOLERANCE * float(want.abs().max())):
        allowed = "models whose logits come from output embeddings, scaled or capped"
        raise ValueError(f"MODEL: got a {type(model).__name__}, allowed: {allowed}")


def losses_of(model: Any, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every token of a prompt but the first: its negative log-likelihood in nats (float64), and
    whether it is the likeliest; both `[tokens - 1]`."""
    return compare(model, hidden_of(model, ids)[:-1], ids[1:])


def compare(
    model: Any, hidden: torch.Tensor, targets: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `losses_of`, of the tokens that come after these hidden states."""
    loss, right = [], []
    wanted = torch.tensor(targets, device=model.device)
    for some, target in zip(hidden.split(LOGITS_ROWS), wanted.split(LOGITS_ROWS), strict=True):
        logits = logits_of(model, some)
        loss.append(F.cross_entropy(logits, target, reduction="none").double().cpu())
        right.append((logits.argmax(1) == target).cpu())
    return torch.cat(loss), torch.cat(right)


class StepLosses:
    """Losses of prompts whose documents are read by dense attention, and what comes after them
    token by token: a decode step's selection serves the next ones, too. A document is read once for
    all settings that are asked about it one after another, where the cache can go back to its
    end."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: HiPCache | None = None
        self.read: tuple[Any, ...] = ()  # what the cache's document was read with
        self.hidden = torch.empty(0)

    def losses_of(
        self, ids: Sequence[int], document: int, config: HiPConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same as the function `losses_of`, both `[tokens - 1]`; the first `document`
        tokens are read at once."""
        self.model.set_attn_implementation("hip")
        # un-rotated keys serve no other settings
        wanted = list(ids[:document]), config.extend, config.backend
        try:
            if again := self.read == wanted and self.cache is not None:
                self.cache.crop(document - self.cache.get_seq_length())  # back to its end
        except RuntimeError:  # a sliding layer has forgotten keys meanwhile
            again = False
        if not again:
            self.read = ()
            dense = HiPConfig(method="dense", extend=config.extend, backend=config.backend)
            configure(self.model, dense)
            self.cache = HiPCache(config=self.model.config)
            self.hidden = self._ahead(ids[:document])
            self.read = wanted
        configure(self.model, config)
        steps = [self._ahead([token]) for token in ids[document:]]
        return compare(self.model, torch.cat([self.hidden, *steps])[:-1], ids[1:])

    def _ahead(self, ids: Sequence[int]) -> torch.Tensor:
        tokens = torch.tensor([list(ids)], device=self.model.device)
        decoder = self.model.get_decoder()
        return decoder(tokens, past_key_values=self.cache, use_cache=True).last_hidden_state[0]
