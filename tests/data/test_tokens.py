"""Rows of tokens: how documents fill them, in which order, and that a resumed source goes on with the same rows."""

import sys
import warnings
from itertools import islice

import pytest
import tiny_lm
import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny_lm import TEXTS
from transformers import AutoTokenizer

from fastsae.data import documents
from fastsae.data.documents import Documents, open_dataset
from fastsae.data.source import NotResumable, Source
from fastsae.data.tokens import Packing, Tokens, special_token_ids

BOS, EOS, PAD = 0, 1, 2


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny_lm.save(tmp_path_factory.mktemp("lm")))


@pytest.fixture(autouse=True)
def small_windows_and_own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(documents, "WINDOW", 5)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def rows(tokens, batches=None):
    """The rows of all batches, or of so many."""
    return torch.cat(list(islice(tokens, batches))).tolist()


def documents_of(n, length=3):
    """n distinguishable documents: [100], [101, 101], ..."""
    return [[100 + i] * (1 + i % length) for i in range(n)]


# How documents fill rows


def test_packed_rows_begin_with_bos_and_have_bos_between_documents():
    got = rows(Tokens([[5, 6, 7], [8, 9], [10, 11, 12, 13]], None, 4, fill="pack", begin_row=BOS, separator=BOS, repeat=False))
    assert got == [[BOS, 5, 6, 7], [BOS, 8, 9, BOS], [BOS, 10, 11, 12]]


def test_each_document_can_begin_with_its_own_token_and_no_token_is_doubled():
    got = Packing(5, begin_row=BOS, begin_document=EOS, separator=None).add([7, 7], [])
    assert got == ([], [BOS, EOS, 7, 7])
    assert Packing(5, begin_row=BOS, separator=BOS).add([BOS, 7], []) == ([], [BOS, 7])
    assert Packing(5, begin_row=BOS, separator=BOS).add([BOS, 7], [BOS, 3]) == ([], [BOS, 3, BOS, 7])


def test_a_document_token_that_finds_no_room_starts_the_next_row():
    rows, partial = Packing(4, begin_document=EOS, separator=BOS).add([7, 8], [3, 3, 3])
    assert (rows, partial) == ([[3, 3, 3, BOS]], [EOS, 7, 8])


@given(
    st.lists(st.lists(st.integers(0, 6), max_size=30), max_size=12),
    st.integers(3, 9),
    *[st.sampled_from([None, 0, 1]) for _ in range(3)],
)
def test_packing_loses_no_token_and_adds_only_the_special_ones(texts, context, begin_row, begin_document, separator):
    packing = Packing(context, begin_row, begin_document, separator)
    partial, flat = [], []
    for text in texts:
        full, partial = packing.add(text, partial)
        assert all(len(row) == context for row in full) and len(partial) < context
        flat += sum(full, [])
    added = {begin_row, begin_document, separator}
    want = [t for text in texts for t in text if t not in added]
    assert [t for t in flat + partial if t not in added] == want


def test_text_is_tokenised_without_special_tokens_and_packed(tokenizer):
    got = rows(Tokens(TEXTS, tokenizer, 16, 4, repeat=False))
    ids = [id for text in TEXTS for id in [BOS, *tokenizer(text, add_special_tokens=False)["input_ids"]]]
    assert [id for row in got for id in row if id != BOS] == [id for id in ids if id != BOS][
        : sum(x != BOS for r in got for x in r)
    ]
    assert all(row[0] == BOS and len(row) == 16 for row in got)
    text = tokenizer.decode([id for row in got for id in row])
    assert text.replace("<bos>", "").startswith(TEXTS[0] + TEXTS[1] + TEXTS[2])


def test_one_document_a_row_padded_or_dropped(tokenizer):
    texts = [[5, 6, 7, 8, 9], [], [5, 6], [5, 6, 7]]
    padded = rows(Tokens(texts, tokenizer, 4, fill="pad", repeat=False))
    assert padded == [[BOS, 5, 6, 7], [BOS, 5, 6, PAD], [BOS, 5, 6, 7]]
    assert rows(Tokens(texts, tokenizer, 4, fill="drop", repeat=False)) == [[BOS, 5, 6, 7], [BOS, 5, 6, 7]]


def test_rows_of_tokens_are_kept_as_they_are_and_short_ones_refused():
    pretokenized = [{"tokens": [5, 6, 7, 8], "text": "not this"}, {"tokens": [9, 10, 11, 12], "text": "nor this"}]
    assert rows(Tokens(pretokenized, None, 3, begin_row=BOS, repeat=False)) == [[5, 6, 7], [9, 10, 11]]
    with pytest.raises(ValueError, match="a document has 4 tokens, context is 5: pass a smaller one, or fill='pack'"):
        next(Tokens(pretokenized, None, 5))


def test_documents_may_be_strings_lists_tensors_or_dicts(tokenizer):
    ids = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    for document in (TEXTS[0], {"text": TEXTS[0]}, {"poem": TEXTS[0]}, ids, torch.tensor(ids), {"input_ids": ids}):
        column = "poem" if isinstance(document, dict) and "poem" in document else None
        got = rows(Tokens([document], tokenizer, 8, column=column, fill="pack", repeat=False))
        assert got[0] == [BOS, *ids[:7]]


def test_batches_are_int64_and_the_last_may_be_smaller():
    tokens = Tokens([[i] * 3 for i in range(7)], None, 3, 4, repeat=False)
    first, last = tokens
    assert first.dtype == torch.int64 and first.shape == (4, 3) and last.shape == (3, 3)
    assert isinstance(tokens, Source)


def test_special_token_ids_are_those_that_the_tokenizer_has(tokenizer):
    assert special_token_ids(tokenizer) == [BOS, EOS, PAD]
    assert special_token_ids(object()) == []


# Order and end


def test_at_its_end_a_data_set_starts_again_with_one_warning():
    tokens = Tokens([[i] * 3 for i in range(7)], None, 3, 7)
    first = rows(tokens, 1)
    with pytest.warns(UserWarning, match="the data set has ended and starts again") as warned:
        assert rows(tokens, 3) == first * 3
    assert len(warned) == 1 and warned[0].filename == __file__


@pytest.mark.parametrize("make", [list, lambda d: map(lambda x: x, d)], ids=["list", "iterator"])
def test_it_ends_if_asked_to_or_if_it_cannot_start_again(make):
    data = [[i] * 3 for i in range(7)]
    assert rows(Tokens(make(data), None, 3, 4, repeat=make is not list)) == data


def test_what_can_give_no_row_is_refused():
    for data, message in (([], "the data set has no rows"), ([[5]], "a whole epoch gave no row of 9 tokens")):
        with pytest.raises(ValueError, match=message), warnings.catch_warnings(action="ignore"):
            next(Tokens(data, None, 9, fill="pack"))


def test_a_seed_shuffles_each_epoch_anew_and_completely():
    documents = Documents(list(range(23)), seed=1)
    with pytest.warns(UserWarning):
        epochs = [sum((documents.take(4) for _ in range(9)), [])[:23] for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(23))] * 3
    assert len({tuple(epoch) for epoch in [*epochs, range(23)]}) == 4
    again = Documents(list(range(23)), seed=1)
    assert sum((again.take(4) for _ in range(5)), []) == epochs[0][:14]  # a take ends where its window does
    assert Documents(list(range(23)), seed=2).take(5) != epochs[0][:5]


def test_a_stream_is_shuffled_within_windows(monkeypatch):
    monkeypatch.setattr(documents, "WINDOW", 8)
    stream = Documents(iter(range(20)), seed=0)
    windows = [stream.take(8) for _ in range(3)]
    assert [sorted(w) for w in windows] == [list(range(0, 8)), list(range(8, 16)), list(range(16, 20))]
    assert windows[0] != sorted(windows[0]) and windows[1] != [8 + row for row in windows[0]] and stream.take(8) == []


# Resuming


def sources(tokenizer, tmp_path):
    """A maker of the same data set, by the kind of its storage."""
    Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "a.parquet")
    Dataset.from_dict({"text": TEXTS[::-1]}).to_parquet(tmp_path / "b.parquet")
    parquet = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]

    class Lines:  # can be iterated again, and no more
        def __iter__(self):
            return iter(TEXTS)

    return {
        "list": lambda: TEXTS,
        "iterable": Lines,
        "dataset": lambda: load_dataset("parquet", data_files=parquet, split="train"),
        "stream": lambda: load_dataset("parquet", data_files=parquet, split="train", streaming=True),
    }


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("kind", ["list", "iterable", "dataset", "stream"])
@pytest.mark.filterwarnings("ignore:the data set has ended")
def test_a_resumed_source_yields_identical_rows(kind, seed, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("fastsae.data.tokens.CHUNK", 3)
    make = sources(tokenizer, tmp_path)[kind]
    whole = Tokens(make(), tokenizer, 16, 5, seed=seed)
    batches = [next(whole) for _ in range(60)]  # several epochs
    for at in (0, 1, 2, 7, 23, 41, 59):
        saved = Tokens(make(), tokenizer, 16, 5, seed=seed)
        for _ in range(at):
            next(saved)
        state = saved.state_dict()
        next(saved)  # what the saved one goes on to do must not matter
        resumed = Tokens(make(), tokenizer, 16, 5, seed=seed)
        resumed.load_state_dict(state)
        for want in batches[at:]:
            assert next(resumed).equal(want)
        saved.load_state_dict(state)  # in place, too
        assert next(saved).equal(batches[at])
    assert not torch.cat(batches[:10]).equal(torch.cat(batches[10:20]))


def test_a_state_is_plain_numbers_and_tensors(tokenizer, tmp_path):
    import json

    tokens = Tokens(sources(tokenizer, tmp_path)["stream"](), tokenizer, 16, 5, seed=1)
    next(tokens)
    state = tokens.state_dict()
    assert state["rows"].dtype == state["partial"].dtype == torch.int32
    rest = {"documents": state["documents"], "plan": state["plan"]}
    assert json.loads(json.dumps(rest)) == rest


def test_after_an_error_of_the_data_set_nothing_is_lost():
    class Flaky:
        broken = True

        def __iter__(self):
            for i in range(12):
                if i == 7 and self.broken:
                    self.broken = False
                    raise OSError("connection lost")
                yield i

    documents, got = Documents(Flaky(), repeat=False), []
    got += documents.take(9)
    with pytest.raises(OSError, match="connection lost"):
        documents.take(9)
    while rows := documents.take(9):
        got += rows
    assert got == list(range(12))


def test_after_an_error_an_iterator_goes_on_where_it_is():
    class Flaky:
        i, broken = 0, True

        def __iter__(self):
            return self

        def __next__(self):
            if self.i == 5 and self.broken:
                self.broken = False
                raise OSError("connection lost")
            if self.i == 12:
                raise StopIteration
            self.i += 1
            return self.i - 1

    documents = Documents(Flaky())
    got = documents.take(9)
    with pytest.raises(OSError, match="connection lost"):
        documents.take(9)
    while rows := documents.take(9):
        got += rows
    assert got == list(range(12))


def test_an_iterator_cannot_go_back_and_says_so():
    tokens = Tokens(iter([[5, 6, 7]] * 30), None, 3, 4)
    state = tokens.state_dict()
    next(tokens)
    with pytest.raises(NotResumable, match="the data set is a plain list_iterator, which cannot go back"):
        tokens.load_state_dict(state)


def test_a_data_set_of_another_length_is_refused():
    state = Tokens(documents_of(9), None, 8, fill="pack").state_dict()
    with pytest.raises(ValueError, match="the saved data set has length 9, this one 10: pass the same one"):
        Tokens(documents_of(10), None, 8, fill="pack").load_state_dict(state)


def test_a_state_of_other_settings_is_refused():
    state = Tokens(documents_of(9), None, 8, fill="pack").state_dict()
    with pytest.raises(ValueError, match="'context': 8.*'context': 16.*make them as the saved ones were"):
        Tokens(documents_of(9), None, 16, fill="pack").load_state_dict(state)


# Opening


def write(folder, kind):
    data = Dataset.from_dict({"text": TEXTS})
    if kind == "save_to_disk":
        data.save_to_disk(folder / "data")
        return folder / "data"
    if kind == "dict":
        DatasetDict(train=data, test=data).save_to_disk(folder / "data")
        return folder / "data"
    if kind == "folder":
        data.select(range(10)).to_parquet(folder / "data" / "a" / "1.parquet")
        data.select(range(10, len(data))).to_parquet(folder / "data" / "b.parquet")
        return folder / "data"
    path = folder / kind
    if kind == "data.txt":
        path.write_text("\n".join(TEXTS))
    elif kind == "data.parquet":
        data.to_parquet(path)
    else:
        data.to_json(path, compression="gzip" if path.suffix == ".gz" else None)
    return path


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "kind", ["save_to_disk", "dict", "folder", "data.txt", "data.jsonl", "data.json", "data.jsonl.gz", "data.parquet"]
)
def test_a_local_path_is_opened(kind, stream, tmp_path):
    opened = open_dataset(write(tmp_path, kind), stream=stream)
    assert isinstance(opened, IterableDataset if stream else Dataset)
    assert [row["text"] for row in opened] == TEXTS


def test_tokens_take_a_path(tokenizer, tmp_path):
    path = write(tmp_path, "data.txt")
    assert rows(Tokens(str(path), tokenizer, 16, repeat=False)) == rows(Tokens(TEXTS, tokenizer, 16, repeat=False))


def test_a_name_is_asked_of_the_hub(monkeypatch):
    asked = {}
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: asked.update(args=args, **kwargs))
    open_dataset("owner/name", split="validation", config="en", stream=True)
    assert asked == {"args": ("owner/name", "en"), "split": "validation", "streaming": True}


def test_what_is_no_data_set_is_refused(tmp_path):
    for path in (tmp_path / "missing.txt", "missing.parquet", tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match="is no data set: pass a file or folder of .txt"):
            open_dataset(path)
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(ValueError, match=r"has files of the formats \['json', 'text'\]: pass a folder of one format"):
        open_dataset(tmp_path)
    Dataset.from_dict({"text": TEXTS}).train_test_split(0.5).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"split='dev' is not in .*, which has \['test', 'train'\]"):
        open_dataset(tmp_path / "saved", split="dev")


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 2}, "context=2, batch=32: pass context >= 3 and batch >= 1"),
        ({"batch": 0}, "context=128, batch=0: pass context >= 3"),
        ({"fill": "fold"}, "fill='fold': pass 'pack', 'pad', 'drop' or 'keep', or None"),
        ({"begin_row": "BOS"}, "'BOS' is no special token: pass 'bos', 'eos', 'sep', an id or None"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Tokens(TEXTS, **arguments)


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (TEXTS, {}, "the data set holds text: pass a tokenizer"),
        ([{"title": "a"}], {}, r"the data set has the columns \['title'\] and none of \['tokens', 'input_ids', 'text'\]"),
        ([[5, 6]], {"fill": "pad"}, "fill='pad' needs a tokenizer with a PAD or EOS token"),
    ],
)
def test_data_that_do_not_fit_are_refused(data, arguments, message):
    with pytest.raises(ValueError, match=message):
        next(Tokens(data, **arguments))


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"^datasets is not installed: pip install 'fastsae\[lm\]'$"):
        open_dataset("owner/name")
