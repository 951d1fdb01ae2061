"""The language model that fastsae ships: it is what its card says, and the libraries load it from its folder."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import embedded_lm
from fastsae import embedded

WORDS = 12  # a run of words that two passages can share by chance is shorter


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded.path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(embedded.path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def card():
    """The table of the card: what is measured -> the numbers that stand beside it."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", (embedded.path() / "README.md").read_text("utf-8"), re.MULTILINE)
    return {name: [float(number) for number in re.findall(r"\d+(?:\.\d+)?", value)] for name, value in rows}


def test_the_folder_is_at_most_4_mb_and_readable_by_all():
    files = list(embedded.path().iterdir())
    assert sum(file.stat().st_size for file in files) <= 4_000_000
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in files)


def test_the_weights_are_bf16():
    with safe_open(embedded.path() / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_reading_the_text_needs_no_torch():
    code = "import sys; from fastsae import embedded; embedded.texts('train'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_unknown_split_is_refused_by_name():
    with pytest.raises(ValueError, match="split='test' is not a split .*'held_out', 'train'"):
        embedded.texts("test")  # pyright: ignore[reportArgumentType]


def test_no_held_out_passage_shares_a_run_of_words_with_the_training_text():
    def runs(passages):
        for passage in passages:
            words = re.findall(r"\w+", passage.lower())
            yield from zip(*(words[start:] for start in range(WORDS)), strict=False)

    held_out = set(runs(embedded.texts("held_out")))
    assert len(held_out) > 10_000
    assert held_out.isdisjoint(runs(embedded.texts("train")))


def test_the_tokenizer_gives_the_held_out_text_back(tokenizer):
    for passage in [*embedded.texts("held_out"), "naïve 中文 🙂\t\r\n  x"]:
        assert tokenizer.decode(tokenizer(passage, verbose=False)["input_ids"]) == passage


def test_the_card_tells_the_truth_and_the_model_is_far_below_the_unigram(model, tokenizer, card):
    context = model.config.n_positions

    def stream(split):
        """Every passage and the separator behind it, cut to whole windows."""
        tokens = [token for passage in embedded.texts(split) for token in (*tokenizer(passage, verbose=False)["input_ids"], 0)]
        return torch.tensor(tokens[: len(tokens) // context * context])

    train, held_out = stream("train"), stream("held_out")
    frequencies = torch.bincount(train, minlength=len(tokenizer)).double() + 1
    unigram = (frequencies.sum().log() - frequencies.log())[held_out].mean().item()
    total = 0.0
    for targets in held_out.view(-1, context).split(8):
        seen = torch.cat([torch.zeros(len(targets), 1, dtype=torch.int64), targets[:, :-1]], 1)
        with torch.no_grad():
            likelihoods = model(seen).logits.log_softmax(-1).gather(2, targets[..., None])
        total -= likelihoods.sum().item()
    loss = total / len(held_out)

    assert unigram - loss >= 2.2
    assert card["held-out loss, nats per token"] == [pytest.approx(loss, abs=1e-3)]
    assert card["held-out unigram loss, nats per token"] == [pytest.approx(unigram, abs=1e-3)]
    assert card["below the unigram, nats per token"] == [pytest.approx(unigram - loss, abs=1e-3)]
    assert card["tokens: training, held out"] == [len(train), len(held_out)]
    assert card["passages: training, held out"] == [len(embedded.texts("train")), len(embedded.texts("held_out"))]
    assert card["vocabulary"] == [len(tokenizer)]
    shape = model.config
    assert card["layers, width, heads, context"] == [shape.n_layer, shape.n_embd, shape.n_head, context]


def test_transformer_lens_loads_the_folder_and_computes_the_same(model, tokenizer):
    theirs = TransformerBridge.boot_transformers(str(embedded.path()), device="cpu", dtype=torch.float32)
    text = embedded.texts("held_out")[0][:400]
    tokens = theirs.to_tokens(text)
    assert tokens[0].tolist() == [0, *tokenizer(text)["input_ids"]]
    with torch.no_grad():
        ours = model(tokens, output_hidden_states=True)
        logits, cache = theirs.run_with_cache(tokens)
    torch.testing.assert_close(logits, ours.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(cache["blocks.1.hook_resid_post"], ours.hidden_states[2], rtol=0, atol=1e-4)


def test_a_repeated_training_gives_the_same_bits():
    passages = embedded.texts("train")[:8]
    settings = embedded_lm.Settings(vocabulary=300, context=32, width=16, layers=1, heads=2, dropout=0.1, epochs=1)
    tokens = embedded_lm.encode(embedded_lm.train_tokenizer(passages, settings), passages)
    held_out = embedded_lm.windows(tokens, settings.context)

    def weights(seed):
        model = embedded_lm.train(tokens, held_out, replace(settings, seed=seed))
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    first = weights(seed=0)
    assert first.equal(weights(seed=0)) and not first.equal(weights(seed=1))


def test_a_passage_that_repeats_part_of_another_is_never_held_out():
    shared = " ".join(f"shared{i}" for i in range(embedded_lm.SHARED_WORDS))
    passages = [" ".join(f"w{p}x{i}" for i in range(30)) + (f" {shared} end{p}" if p % 2 else "") for p in range(60)]
    sides = embedded_lm.split(passages, seed=3)
    assert sorted(sides["train"] + sides["held_out"]) == sorted(passages)
    assert sides["held_out"] and not any(shared in passage for passage in sides["held_out"])
