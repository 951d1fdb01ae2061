"""The sparse core: tensors in, tensors out. Import it as `fastsae.kernels`.

`kernels` is also the name of an unrelated Hugging Face package that transformers probes for by importing it, which from
this checkout finds this folder. Under its bare name this module therefore says "version 0.0.0", defines nothing else and
never raises, and the probe answers "not available".
"""

if __name__ == "kernels":
    __version__ = "0.0.0"
else:
    from .backend import describe
    from .batch_topk import select_batch_topk, select_batch_topk_reference
    from .by_latent import sort_by_latent
    from .decode import decode, decode_reference
    from .dense_encode import dense_encode, dense_encode_reference
    from .encode import encode, encode_reference
    from .gather import gather_latents, gather_latents_reference
    from .latent_backward import latent_backward, latent_backward_reference
    from .loss import decode_loss, decode_loss_reference
    from .threshold import select_threshold, select_threshold_reference
    from .topk import select_topk, select_topk_reference

    __all__ = [
        "decode",
        "decode_loss",
        "decode_loss_reference",
        "decode_reference",
        "dense_encode",
        "dense_encode_reference",
        "describe",
        "encode",
        "encode_reference",
        "gather_latents",
        "gather_latents_reference",
        "latent_backward",
        "latent_backward_reference",
        "select_batch_topk",
        "select_batch_topk_reference",
        "select_threshold",
        "select_threshold_reference",
        "select_topk",
        "select_topk_reference",
        "sort_by_latent",
    ]
