"""Self-supervised pretraining in JAX for text, images, audio and pairs of them."""

import os

__version__ = "0.1.0"

# transformers serves for tokenizers and file formats; that it finds no torch is as intended and no news to the user.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
