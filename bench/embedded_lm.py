"""Train the small language model that fastsae ships:  python -m bench.embedded_lm [--gather]

Gathers the text that Python carries (documentation topics, docstrings of the standard library), sets passages aside, trains a
byte-level BPE tokenizer and a GPT-2 on the rest, and writes the Hugging Face folder fastsae/embedded/pydoc-gpt2 with the text
in it. One thread, so that the same text and settings give the same weights on the same machine.
"""

import argparse
import ast
import copy
import importlib
import inspect
import json
import lzma
import math
import random
import re
import shutil
import sys
import sysconfig
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import ModuleType

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fastsae import embedded

SEPARATOR = "<|endoftext|>"  # token 0: first in every window, and between passages
PASSAGE = 1200  # characters at most, where paragraphs allow it
HELD_OUT = 0.06  # of the characters
SHARED_WORDS = 12  # a held-out passage shares no run of so many words with any other passage
STDLIB = Path(sysconfig.get_path("stdlib"))
SKIPPED = {"site-packages", "test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3", "__pycache__"}


@dataclass(frozen=True)
class Settings:
    vocabulary: int = 4096
    context: int = 256
    width: int = 128
    layers: int = 5
    heads: int = 4
    dropout: float = 0.0
    learning_rate: float = 4e-3  # at its height: 3 % of the steps go up to it, a cosine goes down to zero
    weight_decay: float = 0.1  # of the matrices
    batch: int = 8  # windows
    epochs: int = 2
    seed: int = 0


def python_docstrings(file: Path) -> Iterator[tuple[str, str]]:
    """(what it belongs to, docstring) of a source file, from its syntax tree: nothing is imported."""
    tree = ast.parse(file.read_text("utf-8"))
    definitions = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in (tree, *sorted(definitions, key=lambda definition: definition.lineno)):
        if doc := ast.get_docstring(node):
            if isinstance(node, ast.Module):
                yield "", doc
            else:
                node.body, node.decorator_list = [ast.Pass()], []
                yield ast.unparse(node).removesuffix("\n    pass"), doc


def extension_docstrings(module: ModuleType) -> Iterator[tuple[str, str]]:
    """The same of a module written in C."""
    for owner in [module, *(v for _, v in sorted(vars(module).items()) if inspect.isclass(v))]:
        if doc := inspect.getdoc(owner):
            yield f"class {owner.__name__}:" if inspect.isclass(owner) else "", doc
        for name, member in sorted(vars(owner).items()):
            if inspect.isroutine(member) and (doc := inspect.getdoc(member)):
                signature = getattr(member, "__text_signature__", None) or "(...)"
                yield f"def {name}{signature.replace('$', '')}:", doc


def blocks_of(docstrings: Iterator[tuple[str, str]], seen: set[str]) -> list[str]:
    """One text for each docstring not seen before, laid out like the code that it stands in."""
    blocks: list[str] = []
    for header, doc in docstrings:
        if doc not in seen:
            seen.add(doc)
            quoted = f'"""{doc}"""' if "\n" not in doc else f'"""{doc}\n"""'
            blocks.append(f"{header}\n{textwrap.indent(quoted, '    ')}" if header else quoted)
    return blocks


def passages_of(blocks: list[str]) -> Iterator[str]:
    """The blocks joined, and cut where a paragraph ends: at most PASSAGE characters, unless one paragraph is longer."""
    passage = ""
    for paragraph in (part for block in blocks for part in block.split("\n\n") if part.strip()):
        if passage and len(passage) + len(paragraph) + 2 > PASSAGE:
            yield passage
            passage = ""
        passage += ("\n\n" if passage else "") + paragraph.rstrip()
    if passage:
        yield passage


def gather() -> list[str]:
    """Passages, in order: the documentation topics, the modules written in Python, those written in C."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    documents = [[topic] for _, topic in sorted(topics.items())]
    seen: set[str] = set()
    for file in sorted(STDLIB.rglob("*.py")):
        if not SKIPPED.intersection(file.relative_to(STDLIB).parts):
            documents.append(blocks_of(python_docstrings(file), seen))
    compiled = {file.name.split(".")[0] for file in (STDLIB / "lib-dynload").glob("*.so")} | set(sys.builtin_module_names)
    for name in sorted(compiled):
        if not re.match("_test|_?xx", name):
            with warnings.catch_warnings(action="ignore"):
                documents.append(blocks_of(extension_docstrings(importlib.import_module(name)), seen))
    return [passage for blocks in documents for passage in passages_of(blocks)]


def split(passages: list[str], seed: int) -> dict[str, list[str]]:
    """Held out: a random choice of the passages that share no run of SHARED_WORDS words with any other."""
    runs: list[set[tuple[str, ...]]] = []
    for passage in passages:
        words = re.findall(r"\w+", passage.lower())
        runs.append({tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)})
    owners = Counter(run for of_passage in runs for run in of_passage)
    alone = [i for i, of_passage in enumerate(runs) if of_passage and all(owners[run] == 1 for run in of_passage)]
    random.Random(seed).shuffle(alone)  # noqa: S311
    wanted, held_out = HELD_OUT * sum(map(len, passages)), set[int]()
    for i in alone:
        if wanted > 0:
            held_out.add(i)
            wanted -= len(passages[i])
    return {
        "train": [p for i, p in enumerate(passages) if i not in held_out],
        "held_out": [p for i, p in enumerate(passages) if i in held_out],
    }


def train_tokenizer(passages: list[str], settings: Settings) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(passages, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        unk_token=SEPARATOR,
        clean_up_tokenization_spaces=False,
        model_max_length=settings.context,
    )


def encode(tokenizer: PreTrainedTokenizerFast, passages: list[str]) -> list[list[int]]:
    return tokenizer(passages, verbose=False)["input_ids"]  # longer than the context is no mistake here: windows cuts


def windows(passages: list[list[int]], context: int) -> Tensor:
    """[windows, 1 + context]: the separator, then a stretch of the passages, which are joined by the separator."""
    stream = torch.tensor([token for passage in passages for token in (*passage, 0)])
    rows = stream[: len(stream) // context * context].view(-1, context)
    return torch.cat([rows.new_zeros(len(rows), 1), rows], 1)


def unigram_loss(train: Tensor, held_out: Tensor, vocabulary: int) -> float:
    """Nats per token of the frequencies in train, one added to each count."""
    counts = train[:, 1:].flatten().bincount(minlength=vocabulary) + 1.0
    return -(counts / counts.sum()).log()[held_out[:, 1:]].mean().item()


def loss(model: GPT2LMHeadModel, batch: Tensor) -> Tensor:
    """Nats per token: each but the first of a window from those before it."""
    return cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, held_out: Tensor) -> float:
    model.eval()
    total = sum(loss(model, batch).item() * len(batch) for batch in held_out.split(16))
    model.train()
    return total / len(held_out)


def optimizers(model: GPT2LMHeadModel, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks (0.7 nats below AdamW alone after one epoch), AdamW for embeddings, norms, biases."""
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    embeddings = [model.transformer.wte.weight, model.transformer.wpe.weight]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    decayed = [{"params": embeddings, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    rate, decay = settings.learning_rate, settings.weight_decay
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(decayed, lr=rate, betas=(0.9, 0.98), fused=True),
    ]


def train(passages: list[list[int]], held_out: Tensor, settings: Settings) -> GPT2LMHeadModel:
    """The weights, in bf16, of the epoch that is best on the held-out windows."""
    torch.manual_seed(settings.seed)
    order = random.Random(settings.seed)  # noqa: S311
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=settings.vocabulary,
            n_positions=settings.context,
            n_embd=settings.width,
            n_layer=settings.layers,
            n_head=settings.heads,
            activation_function="gelu_pytorch_tanh",  # gelu_new, computed in one pass
            embd_pdrop=settings.dropout,
            resid_pdrop=settings.dropout,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    print(f"{model.num_parameters():,} parameters", flush=True)
    chosen = optimizers(model, settings)
    steps = settings.epochs * math.ceil(len(windows(passages, settings.context)) / settings.batch)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / (0.03 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
        )
        for optimizer in chosen
    ]
    best, best_loss, began = model, math.inf, time.monotonic()
    for epoch in range(1, settings.epochs + 1):
        shuffled = windows(order.sample(passages, len(passages)), settings.context)
        total = 0.0
        for batch in shuffled[torch.randperm(len(shuffled))].split(settings.batch):
            nats = loss(model, batch)
            nats.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(chosen, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            total += nats.item() * len(batch)
        rounded = copy.deepcopy(model).bfloat16().float()
        now = held_out_loss(rounded, held_out)
        if now < best_loss:
            best, best_loss = rounded, now
        minutes = (time.monotonic() - began) / 60
        print(f"epoch {epoch}: train {total / len(shuffled):.3f}, held out {now:.4f}, {minutes:.0f} minutes", flush=True)
    return best.bfloat16()


CARD = """---
license: mit
language: en
library_name: transformers
---
# pydoc-gpt2

A GPT-2 of {parameters:,} parameters, trained on the text that Python carries: the documentation topics (`pydoc_data.topics`)
and the docstrings of the standard library. fastsae ships it so that `fastsae train` works offline: its activations are there
to be looked into. What it knows is that text; it is no assistant.

| | |
|---|---|
| layers, width, heads, context | {layers}, {width}, {heads}, {context} |
| vocabulary | {vocabulary} tokens of a byte-level BPE trained on the training passages |
| weights | bf16, tied embeddings |
| passages: training, held out | {train_passages}, {held_out_passages} |
| tokens: training, held out | {train_tokens}, {held_out_tokens} |
| held-out loss, nats per token | {held_out_loss:.4f} |
| held-out unigram loss, nats per token | {unigram_loss:.4f} |
| below the unigram, nats per token | {gain:.4f} |
| held-out loss, nats per byte | {per_byte:.4f} |

**Loss.** Passages are joined by `<|endoftext|>` (token 0) and cut into windows of {context} tokens, each predicted from that
token and those before it in the window, with the weights as shipped. The unigram is the frequencies of the training tokens,
one added to each count. The epoch with the lowest held-out loss was kept, which favours that number a little.

**Text.** `texts.json.xz` holds the passages of both sides (read by `fastsae.embedded.texts`), gathered from Python {python},
since the text differs between versions. A passage is held out only if it shares no run of {shared} words with any other.
Changed: docstrings stand below the signature that they belong to, repeated ones are left out, text is cut between paragraphs.
{copyright} It is distributed under the licences in LICENSE-PYTHON.txt.

**Training.** `python -m bench.embedded_lm` on {date} with torch {torch}, {minutes:.0f} minutes on one thread of a shared CPU,
with Muon and AdamW: {recipe}.
"""


def write_json(file: Path, content: object, indent: int | None = None) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=indent, separators=None if indent else (",", ":")), "utf-8")


def write(folder: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Model and tokenizer, readable by all."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers writes neither: TransformerLens 3 needs n_ctx, transformers 4 knows the tokenizer by this name
    for name, change in {
        "config.json": {"n_ctx": model.config.n_positions},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }.items():
        write_json(folder / name, json.loads((folder / name).read_text("utf-8")) | change, indent=2)
    write_json(folder / "tokenizer.json", json.loads((folder / "tokenizer.json").read_text("utf-8")))  # half the size
    (folder / "model.safetensors").chmod(0o644)  # it comes as 0600, which a wheel would keep


def card(folder: Path, settings: Settings, minutes: float) -> str:
    """The model card, with the losses measured on what lies in the folder."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    passages = {side: embedded.texts(side) for side in ("train", "held_out")}
    tokens = {side: encode(tokenizer, passages[side]) for side in passages}
    train_windows, held_out = (windows(tokens[side], settings.context) for side in tokens)
    nats, unigram = held_out_loss(model, held_out), unigram_loss(train_windows, held_out, settings.vocabulary)
    tokens_per_byte = sum(len(passage) + 1 for passage in tokens["held_out"]) / len("".join(passages["held_out"]).encode())
    return CARD.format(
        **vars(settings),
        **json.loads((folder / "texts.origin.json").read_text("utf-8")),
        parameters=model.num_parameters(),
        train_passages=len(passages["train"]),
        held_out_passages=len(passages["held_out"]),
        train_tokens=train_windows[:, 1:].numel(),
        held_out_tokens=held_out[:, 1:].numel(),
        held_out_loss=nats,
        unigram_loss=unigram,
        gain=unigram - nats,
        per_byte=nats * tokens_per_byte,
        shared=SHARED_WORDS,
        date=date.today().isoformat(),
        torch=torch.__version__.split("+")[0],
        minutes=minutes,
        recipe=", ".join(f"{name.replace('_', ' ')} {value}" for name, value in vars(settings).items()),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.embedded_lm", description="Train the model that fastsae ships.")
    parser.add_argument("--gather", action="store_true", help="first replace the shipped text by this Python's")
    folder, settings, began = embedded.path(), Settings(), time.monotonic()
    torch.set_num_threads(1)
    if parser.parse_args(arguments).gather:
        texts = json.dumps(split(gather(), settings.seed), ensure_ascii=False).encode()
        folder.mkdir(exist_ok=True)
        (folder / "texts.json.xz").write_bytes(lzma.compress(texts, preset=9 | lzma.PRESET_EXTREME))
        shutil.copyfile(STDLIB / "LICENSE.txt", folder / "LICENSE-PYTHON.txt")
        write_json(folder / "texts.origin.json", {"python": sys.version.split()[0], "copyright": sys.copyright.splitlines()[0]})

    tokenizer = train_tokenizer(embedded.texts("train"), settings)
    held_out = windows(encode(tokenizer, embedded.texts("held_out")), settings.context)
    write(folder, train(encode(tokenizer, embedded.texts("train")), held_out, settings), tokenizer)
    (folder / "README.md").write_text(card(folder, settings, (time.monotonic() - began) / 60), "utf-8")
    print(f"{sum(file.stat().st_size for file in folder.iterdir()):,} bytes in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
