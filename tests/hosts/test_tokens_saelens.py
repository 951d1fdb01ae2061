"""Rows of tokens are those of SAELens: its packing function, its store, its pre-tokenised data sets."""

import os
import random
from itertools import islice

import pytest
import tiny_lm
import torch
from datasets import Dataset
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from sae_lens.util import get_special_token_ids
from tiny_lm import TEXTS
from transformers import AutoTokenizer

from fastsae.data.tokens import Tokens, special_token_ids

HOOK = "blocks.1.hook_resid_post"
EXAMPLES = 20 * int(os.environ.get("FASTSAE_EXAMPLES", "25"))


def examples():
    """Documents of few different tokens, a context, and three special tokens among those or none."""
    draw = random.Random(0)  # noqa: S311
    for _ in range(EXAMPLES):
        lengths = draw.choices(range(41), k=draw.randint(1, 15))
        special = draw.choices([None, 0, 1, 2], k=3)
        yield [draw.choices(range(6), k=length) for length in lengths], draw.randint(3, 12), special


def iterator(documents):
    return (torch.tensor(document, dtype=torch.long) for document in documents)


def test_packed_rows_are_those_of_concat_and_batch_sequences():
    for documents, context, special in examples():
        documents = [*documents, [5] * context]
        names = dict(zip(("begin_row", "begin_document", "separator"), special, strict=True))
        ours = Tokens(documents, None, context, 1, fill="pack", repeat=False, **names)
        theirs = concat_and_batch_sequences(iterator(documents), context, *special)
        assert [row[0].tolist() for row in ours] == [row.tolist() for row in theirs], (documents, context, special)


def test_one_document_a_row_is_their_disable_concat_sequences():
    for documents, context, (begin, *_) in examples():
        documents = [*documents, [5] * context]
        theirs = concat_and_batch_sequences(iterator(documents), context, begin, disable_concat_sequences=True)
        ours = Tokens(documents, None, context, 1, fill="drop", begin_row=begin, separator=None, repeat=False)
        assert [row[0].tolist() for row in ours] == [row.tolist() for row in theirs], (documents, context, begin)


@pytest.fixture(scope="module")
def store(lens):
    from sae_lens.training.activations_store import ActivationsStore

    def make(dataset, **kwargs):
        settings = {
            "streaming": False, "hook_name": HOOK, "hook_head_index": None, "context_size": 16, "d_in": 32,
            "n_batches_in_buffer": 4, "total_training_tokens": 10, "store_batch_size_prompts": 4, "train_batch_size_tokens": 8,
            "prepend_bos": True, "normalize_activations": "none", "device": torch.device("cpu"), "dtype": "float32",
        }  # fmt: skip
        return ActivationsStore(lens, dataset, **{**settings, **kwargs})

    return make


@pytest.mark.filterwarnings("ignore")
def test_our_defaults_are_the_batches_of_their_store(store, lens):
    theirs = store(Dataset.from_dict({"text": TEXTS}))
    ours = Tokens(TEXTS, lens.tokenizer, 16, 4)
    for batch in islice(ours, 15):
        assert batch.equal(theirs.get_batch_tokens())


@pytest.mark.filterwarnings("ignore")
def test_pretokenised_rows_are_those_of_their_store(store, lens):
    data = Dataset.from_dict({"tokens": torch.randint(3, 300, (40, 20)).tolist()})
    theirs, ours = store(data), Tokens(data, lens.tokenizer, 16, 4)
    for batch in islice(ours, 15):  # more than an epoch
        assert batch.equal(theirs.get_batch_tokens())


@pytest.mark.filterwarnings("ignore")
def test_activations_without_special_tokens_are_those_of_their_store(store, lens):
    from fastsae.data.language_model import Activations
    from fastsae.data.models import LanguageModel

    excluded = special_token_ids(lens.tokenizer)
    assert excluded == sorted(get_special_token_ids(lens.tokenizer))
    for hook, d_in in ((HOOK, 32), ("blocks.1.attn.hook_z", 32), ("blocks.1.mlp.hook_post", 128)):
        theirs = store(
            Dataset.from_dict({"text": TEXTS}), hook_name=hook, d_in=d_in, exclude_special_tokens=torch.tensor(excluded)
        )
        ours = Activations(LanguageModel.wrap(lens), Tokens(TEXTS, lens.tokenizer, 16, 4), hook, exclude_tokens=excluded)
        for rows in islice(ours, 5):
            assert rows.equal(theirs.get_filtered_llm_batch())


def test_special_token_ids_are_theirs(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm.save(tmp_path))
    tokenizer.sep_token = "?"  # noqa: S105
    assert special_token_ids(tokenizer) == sorted(get_special_token_ids(tokenizer)) and len(special_token_ids(tokenizer)) == 4
