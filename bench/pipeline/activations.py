"""activations: a language model reads text, and shuffled batches of its activations at one hook come out.

Every text is exactly one context long, so that packing texts into rows, as fastsae and SAELens do, and one text a row, as
dictionary_learning does, are the same tokens. Special tokens are added nowhere.
"""

import json
from collections.abc import Callable
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae import embedded
from fastsae.data import Shuffle
from fastsae.data.language_model import Activations
from fastsae.data.models import LanguageModel, without_bars
from fastsae.data.tokens import Tokens

from ..check import Wrong
from ..providers import DictionaryLearning, SAELens, Unsupported
from .batches import BUFFER, DRAWS, distinct, draw
from .work import Flow, Prepared, Work

CONTEXT = 64


def prepare(layers: int, width: int, block: int, device: torch.device, tiny: bool, folder: Path) -> Prepared:
    """With `layers` and `width` a random GPT-2 of that size, else the one that fastsae ships; read after block `block`."""
    if tiny:
        layers, width = min(layers, 2), min(width, 64)
    contexts = 2 if tiny else 32  # of a batch, and of a forward pass
    batch = contexts * CONTEXT
    hook = f"blocks.{block}.hook_resid_post"

    @cache
    def texts() -> tuple[list[str], Tensor]:
        """Texts of one context each, and their tokens."""
        tokenizer = model()[1]
        found: list[list[int]] = []
        wanted = 1024 if not tiny else 2 * DRAWS * contexts
        for ids in tokenizer(embedded.texts("train"), verbose=False)["input_ids"]:
            pieces = [ids[i : i + CONTEXT] for i in range(0, len(ids) - CONTEXT + 1, CONTEXT)]
            found += [piece for piece in pieces if tokenizer(tokenizer.decode(piece))["input_ids"] == piece]
            if len(found) >= wanted:
                break
        return [tokenizer.decode(piece) for piece in found[:wanted]], torch.tensor(found[:wanted])

    @cache
    def model() -> tuple[Any, Any]:
        """(transformers' GPT-2, its tokenizer)"""
        from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

        tokenizer = AutoTokenizer.from_pretrained(str(embedded.path()))
        if not layers:
            with without_bars():
                gpt2 = AutoModelForCausalLM.from_pretrained(str(embedded.path()), dtype=torch.float32)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                config = GPT2Config(
                    vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=width, n_layer=layers, n_head=width // 64,
                    bos_token_id=0, eos_token_id=0,
                )  # fmt: skip
                gpt2 = GPT2LMHeadModel(config)
        return gpt2.to(device).eval(), tokenizer

    @cache
    def hooked_transformer() -> Any:
        """The same weights in TransformerLens' own class, as its from_pretrained makes it of a model on the Hub."""
        try:
            from transformer_lens import HookedTransformer
        except ImportError as error:
            raise Unsupported(f"no HookedTransformer: {str(error).split('. ')[0]}") from None
        import transformer_lens.loading_from_pretrained as loading

        gpt2, tokenizer = model()
        gpt2.config.n_ctx = CONTEXT  # which it asks for, under GPT-2's old name
        gpt2.save_pretrained(folder / "lm")
        config = loading.get_pretrained_model_config(str(folder / "lm"), device=str(device), dtype=torch.float32)
        lens = HookedTransformer(config, tokenizer=tokenizer)
        weights = loading.get_pretrained_state_dict(str(folder / "lm"), config, hf_model=gpt2)
        options = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
        lens.load_and_process_state_dict(weights, **dict.fromkeys(options, False))
        return lens.eval()

    def fastsae(open_model: Callable[[], LanguageModel], note: str) -> Flow:
        lm = open_model()
        tokens = Tokens(texts()[0], model()[1], CONTEXT, contexts, begin_row=None, separator=None, seed=0)
        shuffled = Shuffle(Activations(lm, tokens, hook), BUFFER * batch, batch, device=device)
        return Flow(lambda: draw(shuffled), lambda: draw(shuffled), note)  # type: ignore[arg-type]

    def sae_lens() -> Flow:
        if reason := SAELens().missing(device):
            raise Unsupported(reason)
        from datasets import Dataset
        from sae_lens.training.activations_store import ActivationsStore

        lens = hooked_transformer()
        store = ActivationsStore(
            lens, Dataset.from_dict({"text": texts()[0]}), streaming=False, hook_name=hook, hook_head_index=None,
            context_size=CONTEXT, d_in=lens.cfg.d_model, n_batches_in_buffer=BUFFER * contexts,
            total_training_tokens=1, store_batch_size_prompts=contexts, train_batch_size_tokens=batch, prepend_bos=False,
            normalize_activations="none", device=device, dtype="float32", sequence_separator_token=None,
        )  # fmt: skip
        return Flow(lambda: draw(store), lambda: draw(store), "ActivationsStore, its mixing buffer")

    def dictionary_learning() -> Flow:
        if reason := DictionaryLearning().missing(device):
            raise Unsupported(reason)
        from dictionary_learning.buffer import ActivationBuffer
        from nnsight import LanguageModel as NNsight

        gpt2, tokenizer = model()
        tokenizer.pad_token = tokenizer.eos_token  # it asks for one, and pads nothing
        lm: Any = NNsight(gpt2, tokenizer=tokenizer)
        buffer = ActivationBuffer(
            cycle(texts()[0]), lm, lm.transformer.h[block], d_submodule=gpt2.config.n_embd,
            n_ctxs=(BUFFER - 1) * contexts, ctx_len=CONTEXT, refresh_batch_size=contexts, out_batch_size=batch,
            device=str(device),
        )  # fmt: skip
        return Flow(lambda: draw(buffer), lambda: draw(buffer), "ActivationBuffer over nnsight")

    def sparsify() -> Flow:
        raise Unsupported("its Trainer calls the language model inside its step: it gives no activations")

    def alone() -> Flow:
        lm = LanguageModel.wrap(*model())
        passes = cycle(texts()[1].split(contexts))

        def read() -> list[Tensor]:
            return [lm.run(tokens, [hook])[hook].flatten(0, 1) for tokens in islice(passes, DRAWS)]

        return Flow(read, read, "tokens at hand, transformers' model up to the hook, not shuffled", ceiling=True)

    @cache
    def expected() -> Tensor:
        """[rows, D] of all texts."""
        lm = LanguageModel.wrap(*model())
        return torch.cat([lm.run(tokens, [hook])[hook].flatten(0, 1) for tokens in texts()[1].split(contexts)]).cpu()

    def check(batches: list[Tensor]) -> None:
        came = [(tuple(x.shape), x.dtype) for x in batches]
        if came != [((batch, expected().shape[1]), torch.float32)] * DRAWS:
            raise Wrong(f"{came[:2]} and so on are not {DRAWS} batches of {batch} rows in fp32")
        some = torch.cat(batches).cpu()[:: max(1, DRAWS * batch // 512)]
        at = torch.cdist(some, expected()).argmin(1)
        off = float(((some - expected()[at]).norm(dim=1) / some.norm(dim=1)).max())
        if not off < 1e-4:
            raise Wrong(f"a row is {off:.3g} of its norm away from every activation of these texts")
        if distinct(at) < 0.5:
            raise Wrong("rows come again and again")

    ways = {
        "fastsae": partial(fastsae, lambda: LanguageModel.wrap(*model()), "a model of transformers"),
        "fastsae TransformerLens": partial(
            fastsae, lambda: LanguageModel.wrap(hooked_transformer(), model()[1]), "a HookedTransformer"
        ),
        "sae-lens": sae_lens,
        "dictionary-learning": dictionary_learning,
        "sparsify": sparsify,
        "forward pass alone": alone,
    }
    shipped = json.loads((embedded.path() / "config.json").read_text())
    depth, D = (layers, width) if layers else (shipped["n_layer"], shipped["n_embd"])
    lm = f"{'a random' if layers else 'the shipped'} GPT-2 of {depth} layers, width {D}"
    said = f"text through {lm}, after block {block}, in shuffled batches of {batch} tokens through a buffer of {BUFFER} of them"
    return Prepared(DRAWS * batch, DRAWS * batch * D * 4, said, ways, check)


WORKS = (
    Work("activations/shipped", "tokens", partial(prepare, 0, 0, 0)),
    Work("activations/4x384", "tokens", partial(prepare, 4, 384, 1), smoke=False),
)
