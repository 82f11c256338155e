"""Train the demo checkpoint: a tiny Llama that answers pass-key questions over real documents.

    python benchmarks/train.py --text novels/ --out run/ [--device cuda]

Interrupt it at any time: the same command resumes from the last save. `--text` is a folder of
plain-text files; the shipped weights used five novels by Jane Austen (public domain), see
hip_hf/assets/checkpoint/README.md.

The curriculum follows how retrieval forms in small transformers: first copying (random segments
that repeat after random gaps), then named notes in real text, at growing lengths. Short stages
spread their positions over the whole trained range by jumps between segments, so that long
distances cost nothing to learn; the last stages are real text at the full length.
"""

import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hip_hf.eval.measure.documents import FACT_NAMES, draw_digits, note_sentence, question

VOCAB = 1024
LENGTH = 8192
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Stage:
    """`share` of the CPU time, at sequences of `length` tokens, `batch` at a time; `copying` of
    them random."""

    share: float
    length: int
    batch: int
    copying: float


STAGES = [
    Stage(0.08, 128, 48, 1.0),
    Stage(0.15, 256, 32, 0.3),
    Stage(0.22, 1024, 8, 0.1),
    Stage(0.20, 4096, 2, 0.0),
    Stage(0.35, LENGTH, 1, 0.0),
]


def build_tokenizer(files: list[Path]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits and the notes' names are single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(FACT_NAMES),
        initial_alphabet=alphabet,
        special_tokens=["<pad>", "<s>", "</s>"],
    )
    tokenizer.train([str(file) for file in files], trainer)
    tokenizer.add_tokens([" " + name for name in FACT_NAMES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=LENGTH,
    )


def build_model(vocab: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


class Data:
    """Draws training rows: token ids, a mask of the answer tokens, positions."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, files: list[Path], seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.texts = [
            np.array(tokenizer.encode(file.read_text(), add_special_tokens=False)) for file in files
        ]
        self.vocab = len(tokenizer)

    def batch(self, stage: Stage) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = [
            self.copies(stage) if self.rng.random() < stage.copying else self.notes(stage)
            for _ in range(stage.batch)
        ]
        first, second, third = (np.stack(column) for column in zip(*rows, strict=True))
        return torch.from_numpy(first), torch.from_numpy(second), torch.from_numpy(third)

    def copies(self, stage: Stage) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.rng.getrandbits(32))
        ids = rng.integers(3, self.vocab, stage.length)
        answer = np.zeros(stage.length, dtype=bool)
        at = 0
        while True:
            size, gap = int(rng.integers(8, 32)), int(rng.integers(0, max(stage.length // 3, 1)))
            again = at + size + gap
            if again + size > stage.length:
                return ids, answer, self.positions(stage.length)
            ids[again : again + size] = ids[at : at + size]
            answer[again + 2 : again + size] = True
            at = again + size

    def notes(self, stage: Stage) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng, length = self.rng, stage.length
        most = max(length // 128, 2)
        count = min(round(math.exp(rng.uniform(0, math.log(most)))), len(FACT_NAMES))
        facts = [(name, draw_digits(rng)) for name in rng.sample(FACT_NAMES, count)]
        written = [rng.random() for _ in facts]
        events = [(at, note_sentence(*fact), "") for at, fact in zip(written, facts, strict=True)]
        for _ in range(most // 2):
            which = rng.randrange(count)
            # every second question comes late, so that most of the context lies between it and its
            # fact
            earliest = written[which] if rng.random() < 0.5 else max(written[which], 0.9)
            events.append((rng.uniform(earliest, 1), question(facts[which][0]), facts[which][1]))
        which = rng.randrange(count)
        events.append((1.0, question(facts[which][0]), facts[which][1]))
        events.sort(key=lambda event: event[0])

        pieces = []
        for at, text, digits in events:
            head = self.tokenizer.encode(text, add_special_tokens=False)
            tail = self.tokenizer.encode(" " + digits, add_special_tokens=False) if digits else []
            pieces.append((at, head + tail, len(tail)))
        room = length - sum(len(ids) for _, ids, _ in pieces)
        if room < 0:
            return self.notes(stage)
        novel = rng.choice(self.texts)
        start = rng.randrange(len(novel) - room)
        ids: list[int] = []
        answer, read = np.zeros(length, dtype=bool), 0
        for at, piece, tail in pieces:
            upto = round(at * room)
            ids.extend(novel[start + read : start + upto])
            ids.extend(piece)
            answer[len(ids) - tail : len(ids)] = True
            read = upto
        return np.array(ids), answer, self.positions(length)

    def positions(self, length: int) -> np.ndarray:
        """Consecutive positions with a few jumps, up to the trained range: far is learnt at the
        price of near."""
        jumps = np.zeros(length, dtype=np.int64)
        spare = LENGTH - length
        if spare and self.rng.random() < 0.7:
            spare = self.rng.randrange(spare)
            count = self.rng.randint(1, 4)
            cuts = sorted(self.rng.randrange(spare + 1) for _ in range(count - 1))
            for size in np.diff([0, *cuts, spare]):
                jumps[self.rng.randrange(length)] += size
        return np.arange(length) + np.cumsum(jumps)


def loss_of(
    model: LlamaForCausalLM, ids: torch.Tensor, answer: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """A fifth of the language loss plus the loss on the answers; with it both parts and the share
    of digits right."""
    logits = model(ids, position_ids=positions, use_cache=False).logits[:, :-1].float()
    target, answer = ids[:, 1:], answer[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), target.flatten(), reduction="none"
    ).view(target.shape)
    right = (logits.argmax(-1) == target)[answer].float().mean()
    return (
        0.2 * losses[~answer].mean() + losses[answer].mean(),
        losses[~answer].mean(),
        losses[answer].mean(),
        right,
    )


def main(
    text: Annotated[Path, typer.Option(help="Folder of plain-text files.")],
    out: Annotated[Path, typer.Option(help="Where the run is kept; an existing one is resumed.")],
    minutes: Annotated[
        float, typer.Option(help="Compute time to spend, in core-minutes (minutes on a GPU).")
    ] = 150.0,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Train (or resume training) the demo checkpoint."""
    files = sorted(text.glob("*.txt"))
    if not files:
        raise typer.BadParameter(f"no .txt file in {text}", param_hint="--text")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    saved = out / "train.pt"
    tokenizer = (
        PreTrainedTokenizerFast.from_pretrained(out) if saved.exists() else build_tokenizer(files)
    )
    model: Any = build_model(len(tokenizer))
    model.to(device)
    model.set_attn_implementation("sdpa")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05
    )
    spent, step = 0.0, 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        spent, step = state["spent"], state["step"]
    data = Data(tokenizer, files, seed + step)
    clock = time.process_time if device == "cpu" else time.monotonic
    tick = last_save = last_log = clock()
    history: list[torch.Tensor] = []
    while (done := spent / (60 * minutes)) < 1:
        stage = STAGES[
            min(
                int(np.searchsorted(np.cumsum([s.share for s in STAGES]), done, side="right")),
                len(STAGES) - 1,
            )
        ]
        rate = (
            LEARNING_RATE
            * min(1.0, (step + 1) / 100)
            * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, answer, positions = (column.to(device) for column in data.batch(stage))
        with torch.autocast(device, dtype=torch.bfloat16, enabled=stage.length > 512):
            loss, *parts = loss_of(model, ids, answer, positions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        history.append(torch.stack([part.detach() for part in parts]))
        now = clock()
        spent, tick = spent + now - tick, now
        if now - last_log > 30:
            text_loss, answer_loss, right = torch.stack(history).nanmean(0).tolist()
            row = dict(
                step=step,
                minutes=spent / 60,
                length=stage.length,
                text=text_loss,
                answer=answer_loss,
                right=right,
            )
            print(json.dumps(row), flush=True)
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            history, last_log = [], now
        if now - last_save > 120 or spent >= 60 * minutes:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "spent": spent,
                "step": step,
            }
            torch.save(state, out / "train.tmp")
            (out / "train.tmp").replace(saved)
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
            last_save = now


if __name__ == "__main__":
    typer.run(main)
