"""ELECTRA: replaced-token detection (arXiv 2003.10555).

Command:   python -m sslx.main --config=configs/electra.py
Argument:  [SIZE][,data=SOURCE], for example configs/electra.py:small,data=text:corpus/*.jsonl
Default:   a small real job on python_docs with the discriminator of configs/bert_mlm.py's: 2 layers x 192 of the modern
           kind (pre-LN, RoPE, GeGLU, no biases), a generator a quarter as wide, rows of 64 tokens.
           Held-out loss 19.90 of a chance of 27.01 (seed 0); discriminator_gain 0.064 nats a token, recall 0.14, still
           rising: it is short for ELECTRA.
Sizes:     small base large are the published ones (post-LN, learned positions, GELU, dropout 0.1): small has embeddings
           of 128 under a width of 256; generators are 1/4, 1/3 and 1/4 as wide. AdamW at 5e-4 (small) or 2e-4, 10,000
           steps of warm-up, linear decay, weight decay 0.01: small takes 128 rows of 128 tokens for 1 M steps, base 256
           rows of 512 for 766,000, large 2,048 rows of 512 for 400,000 with 25 % masked; the original has no bias
           correction in Adam. They are meant for an accelerator and a large corpus.
"""

import ml_collections

from sslx.config import experiment, parse_argument
from sslx.data.text import TextConfig
from sslx.errors import choose
from sslx.models.bert import ELECTRA_SIZES, MODERN, BertConfig
from sslx.pretext.electra import ElectraConfig

# What else the published recipes differ in.
RECIPES = {
    "small": dict(length=128, rows=128, steps=1_000_000, rate=5e-4, generator=1 / 4, masked=0.15),
    "base": dict(length=512, rows=256, steps=766_000, rate=2e-4, generator=1 / 3, masked=0.15),
    "large": dict(length=512, rows=2048, steps=400_000, rate=2e-4, generator=1 / 4, masked=0.25),
}


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one corpus."""
    arguments = parse_argument(argument, "size", size="default", data="python_docs")
    size = choose(arguments["size"], ("default", *RECIPES), "size of configs/electra.py")
    if size == "default":
        return small_job(arguments["data"])
    return published(size, arguments["data"])


def small_job(source: str) -> ml_collections.ConfigDict:
    """A few minutes on two CPU cores."""
    config = experiment(
        data=TextConfig(source, seq_len=64),
        model=BertConfig(layers=2, width=192, heads=3, mlp_width=384, dropout=0.0, attention_dropout=0.0, **MODERN),
        pretext=ElectraConfig(),
    )
    config.steps = 1500
    config.batch_size = 32
    config.optimizer.learning_rate = 1e-3  # at MLM's 3e-3 the discriminator hardly learns
    config.optimizer.beta2 = 0.98
    config.optimizer.warmup_steps = 100
    config.eval.every_steps = 250
    config.checkpoint.every_steps = 250
    return config


def published(size: str, source: str) -> ml_collections.ConfigDict:
    """The original ELECTRA of a published size."""
    recipe = RECIPES[size]
    config = experiment(
        data=TextConfig(source, seq_len=recipe["length"], vocab_size=30522),
        model=BertConfig(**ELECTRA_SIZES[size]),
        pretext=ElectraConfig(mask_ratio=recipe["masked"], generator_width=recipe["generator"]),
    )
    config.steps = recipe["steps"]
    config.batch_size = recipe["rows"]
    config.optimizer.learning_rate = recipe["rate"]
    config.optimizer.warmup_steps = 10_000
    config.optimizer.eps = 1e-6
    config.eval.every_steps = 10_000
    config.checkpoint.every_steps = 10_000
    config.log.every_steps = 100
    return config
