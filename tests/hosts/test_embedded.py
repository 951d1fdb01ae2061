"""The shipped language model in TransformerLens 3, whose HookedTransformer is gone from 4."""

import torch
import transformer_lens.loading_from_pretrained as loading
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastsae import embedded


def test_hooked_transformer_loads_the_folder_and_computes_the_same():
    path = str(embedded.path())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    # from_pretrained takes only the names it knows; these are its own steps, which take a folder
    cfg = loading.get_pretrained_model_config(path, device="cpu", dtype=torch.float32)
    theirs = HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(path))
    weights = loading.get_pretrained_state_dict(path, cfg, hf_model=model)
    theirs.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    tokens = theirs.to_tokens(embedded.texts("held_out")[0][:400])
    with torch.no_grad():
        ours = model(tokens, output_hidden_states=True)
        logits, cache = theirs.run_with_cache(tokens)
    torch.testing.assert_close(logits, ours.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(cache["blocks.1.hook_resid_post"], ours.hidden_states[2], rtol=0, atol=1e-4)
