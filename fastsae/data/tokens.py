"""Rows of token ids from a data set of texts or of tokens."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .documents import Documents, open_dataset

Special = Literal["bos", "eos", "sep"] | int | None
Fill = Literal["pack", "pad", "drop", "keep"]

COLUMNS = ("tokens", "input_ids", "text")
CHUNK = 32
"""Documents that are tokenised at a time. Untuned."""


def special_token_ids(tokenizer: Any) -> list[int]:
    """The ids of BOS, EOS, PAD, SEP and the decoder's start, those that the tokenizer has."""
    names = ("bos", "eos", "pad", "sep", "decoder_start")
    ids = {getattr(tokenizer, f"{name}_token_id", None) for name in names}
    return sorted(id for id in ids if id is not None)


@dataclass(frozen=True)
class Packing:
    """How documents become rows of `context` tokens.

    `begin_row` starts each row, `begin_document` each document, and `separator` stands before a document that does not start
    a row. None of them is put before a token that equals it.
    """

    context: int
    begin_row: int | None = None
    begin_document: int | None = None
    separator: int | None = None

    def add(self, document: list[int], partial: list[int]) -> tuple[list[list[int]], list[int]]:
        """Append a document to a partial row: the rows that this fills, and the partial row that is left."""
        rows: list[list[int]] = []
        begin, at = self.begin_document, 0
        opens = begin is not None and document[:1] != [begin]
        while at < len(document):
            head = [begin] if opens and begin is not None else []
            glue = self.separator if partial else self.begin_row
            if glue is not None and (head or document[at : at + 1])[0] != glue:
                head = [glue, *head]
            room = self.context - len(partial)
            opens = opens and len(head) > room  # the row ends before begin_document, which then starts the next
            body = max(room - len(head), 0)
            partial = [*partial, *head[:room], *document[at : at + body]]
            at += body
            if len(partial) == self.context:
                rows.append(partial)
                partial = []
        return rows, partial


class Tokens:
    """int64 [batch, context], on the CPU, from a data set; the last batch of a data set that ends may have fewer rows.

    `dataset` is a path or a name (see `open_dataset`), or an iterable of documents: of str, of token lists, or of dicts, of
    which one column counts: `column`, or the first of tokens, input_ids, text. `fill` says how documents fill rows:

    - "pack": one after the other, as `Packing` does; the default for text
    - "pad": one a row, cut or padded on the right (a causal model needs no mask for that; exclude the PAD token later)
    - "drop": one a row, cut, and left out if shorter
    - "keep": one a row, cut, with nothing added, and refused if shorter; the default for tokens, which were packed before

    A special token is an id, or "bos", "eos", "sep": what the tokenizer has under this name, which may be nothing. With a seed
    the documents are shuffled. `repeat` begins again at the end of the data set, with a warning the first time.
    """

    def __init__(
        self,
        dataset: str | Path | Iterable[Any],
        tokenizer: Any = None,
        context: int = 128,
        batch: int = 32,
        *,
        column: str | None = None,
        fill: Fill | None = None,
        begin_row: Special = "bos",
        begin_document: Special = None,
        separator: Special = "bos",
        seed: int | None = None,
        repeat: bool = True,
    ):
        if context < 3 or batch < 1:
            raise ValueError(f"context={context}, batch={batch}: pass context >= 3 and batch >= 1")
        if fill not in (None, "pack", "pad", "drop", "keep"):
            raise ValueError(f"fill={fill!r}: pass 'pack', 'pad', 'drop' or 'keep', or None")
        self.tokenizer, self.batch, self.column = tokenizer, batch, column
        self.documents = Documents(open_dataset(dataset) if isinstance(dataset, (str, Path)) else dataset, seed, repeat)
        self.fill: Fill | None = fill
        self.packing = Packing(context, self._id(begin_row), self._id(begin_document), self._id(separator))
        self.plan = {**asdict(self.packing), "fill": fill, "seed": seed}
        self._rows: list[list[int]] = []  # full ones that were not given out yet
        self._partial: list[int] = []
        self._fruitful = 0  # the last epoch that gave a row

    def _id(self, token: Special) -> int | None:
        if not isinstance(token, str):
            return token
        if token not in ("bos", "eos", "sep"):
            raise ValueError(f"{token!r} is no special token: pass 'bos', 'eos', 'sep', an id or None")
        return getattr(self.tokenizer, f"{token}_token_id", None)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        while len(self._rows) < self.batch:
            documents = self.documents.take(CHUNK)
            if not documents:
                break
            for document, fill in self._tokenize(documents):
                self._rows += self._cut(document, fill)
            if self._rows:
                self._fruitful = self.documents.epoch
            elif self.documents.epoch > self._fruitful + 1:
                context = self.packing.context
                raise ValueError(f"a whole epoch gave no row of {context} tokens: pass a smaller context or more data")
        if not self._rows:
            raise StopIteration
        rows, self._rows = self._rows[: self.batch], self._rows[self.batch :]
        return torch.tensor(rows)

    def _tokenize(self, documents: list[Any]) -> list[tuple[list[int], Fill]]:
        """The tokens of each document, and how they fill rows."""
        contents = [self._content(document) for document in documents]
        texts = [content for content in contents if isinstance(content, str)]
        if texts and self.tokenizer is None:
            raise ValueError("the data set holds text: pass a tokenizer")
        ids = iter(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
        return [
            (next(ids), self.fill or "pack")
            if isinstance(content, str)
            else (content if isinstance(content, list) else torch.as_tensor(content).tolist(), self.fill or "keep")
            for content in contents
        ]

    def _content(self, document: Any) -> Any:
        if not isinstance(document, dict):
            return document
        columns = [self.column] if self.column else COLUMNS
        for column in columns:
            if column in document:
                return document[column]
        raise ValueError(f"the data set has the columns {list(document)} and none of {list(columns)}: pass column=")

    def _cut(self, document: list[int], fill: Fill) -> list[list[int]]:
        """The rows that a document completes."""
        context = self.packing.context
        if fill == "pack":
            rows, self._partial = self.packing.add(document, self._partial)
            return rows
        if fill == "keep":
            if len(document) < context:
                n = len(document)
                raise ValueError(f"a document has {n} tokens, context is {context}: pass a smaller one, or fill='pack'")
            return [document[:context]]
        rows, short = self.packing.add(document[:context], [])
        if rows or fill == "drop" or not short:
            return rows[:1]
        return [short + [self._pad()] * (context - len(short))]

    def _pad(self) -> int:
        for name in ("pad_token_id", "eos_token_id"):
            if (id := getattr(self.tokenizer, name, None)) is not None:
                return id
        raise ValueError("fill='pad' needs a tokenizer with a PAD or EOS token: pass one or another fill")

    def state_dict(self) -> dict[str, Any]:
        return {
            "documents": self.documents.state_dict(),
            "rows": torch.tensor(self._rows, dtype=torch.int32).view(-1, self.packing.context),
            "partial": torch.tensor(self._partial, dtype=torch.int32),
            "plan": dict(self.plan),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["plan"] != self.plan:
            raise ValueError(f"the saved tokens had {state['plan']}, these have {self.plan}: make them as the saved ones were")
        self.documents.load_state_dict(state["documents"])
        self._rows, self._partial = state["rows"].tolist(), state["partial"].tolist()
        self._fruitful = self.documents.epoch
