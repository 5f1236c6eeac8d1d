"""Self-supervised pretraining in JAX for text, images, audio and pairs of them."""

import os

__version__ = "0.1.0"

# transformers serves for tokenizers and file formats; that it finds no torch is as intended and no news to the user.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def __getattr__(name: str) -> object:
    # `sslx.load` needs JAX, Flax and Orbax; importing the package needs none of them.
    if name == "load":
        from sslx.inference.model import load

        return load
    raise AttributeError(f"module 'sslx' has no attribute {name!r}")
