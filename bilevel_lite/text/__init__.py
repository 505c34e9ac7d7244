r"""Hugging Face encoders: texts to token ids, a classifier on top, frozen layers computed once.

    logits = W pool(h_L) + c,     h_k = layer_k(h_{k-1}; theta_k),     h_0 = embeddings(ids)

theta are the last layers and (W, c). What lies below does not move, so its output h_k is computed
once for every text (`TextClassifier.remember`) and a batch is a tensor of positions into that
table. Needs the extra ``text`` (transformers); `import bilevel_lite` does not.
"""

from bilevel_lite.text.classifier import POOLINGS, Logits, TextClassifier
from bilevel_lite.text.encoders import Encoder, EncoderError, encoder, tiny, transformers
from bilevel_lite.text.masked import MaskedTexts, MaskedWords, hide

__all__ = [
    "POOLINGS", "Encoder", "EncoderError", "Logits", "MaskedTexts", "MaskedWords", "TextClassifier",
    "encoder", "hide", "tiny", "transformers",
]  # fmt: skip
