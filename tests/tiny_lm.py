"""A random GPT-2 of 3 layers with a byte-level tokenizer of its own, as a folder that every loader of language models reads."""

from pathlib import Path
from typing import Any

import torch

TEXTS = [
    f"{number} {animal}s {verb} the {thing}, and then {'very ' * (number % 7)}slowly they sleep."
    for number, (animal, verb, thing) in enumerate(
        (animal, verb, thing)
        for animal in ("cat", "dog", "owl", "fox")
        for verb in ("watch", "eat", "chase", "like")
        for thing in ("moon", "cake", "river", "old stone wall")
    )
]


def save(folder: Path, n_layer: int = 3) -> Path:
    """Write the model and its tokenizer to the folder; the same numbers each time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")  # noqa: S106
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=n_layer, n_head=4,
                bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.3,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    return folder


def hooked_transformer(folder: Path) -> Any:
    """The saved model as the HookedTransformer of TransformerLens 3, which reads no folders itself."""
    import transformer_lens.loading_from_pretrained as loading
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    c = model.config
    config = HookedTransformerConfig(
        n_layers=c.n_layer, d_model=c.n_embd, n_ctx=c.n_positions, d_head=c.n_embd // c.n_head, n_heads=c.n_head,
        d_mlp=4 * c.n_embd, d_vocab=c.vocab_size, act_fn="gelu_new", normalization_type="LN", device="cpu",
    )  # fmt: skip
    lens = HookedTransformer(config, AutoTokenizer.from_pretrained(folder))
    weights = loading.convert_gpt2_weights(model, config)
    plain = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    lens.load_and_process_state_dict(weights, **dict.fromkeys(plain, False))
    return lens.eval()
