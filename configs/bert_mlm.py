"""BERT masked language modelling (arXiv 1810.04805).

Command:   python -m sslx.main --config=configs/bert_mlm.py
Argument:  [SIZE][,data=SOURCE], for example configs/bert_mlm.py:base,data=text:corpus/*.jsonl
Default:   a small real job on python_docs: 2 layers x 192 of the modern kind (pre-LN, RoPE, GeGLU, no biases), rows of
           64 tokens, 3 M tokens. On two CPU cores (AMD EPYC, AVX2): about 5 minutes
           (three quarters of the 6:43 that 2,000 steps took), held-out loss 3.69 nats at 15 %
           masked, 2.2 below the unigram entropy of 5.89 (seed 0).
Sizes:     tiny mini small base large are the published ones of the original BERT (post-LN, learned positions, GELU,
           dropout 0.1), with its phase-one recipe: rows of 128 tokens, batch 256, AdamW at 1e-4, 10,000 steps of
           warm-up, linear decay, weight decay 0.01; for all of its 1 M steps (the original takes rows of 512 for the
           last tenth), with Adam's bias correction, and with its sentence loss only on --config.pretext.sentence=nsp.
           They are meant for an accelerator and a large corpus.
"""

import ml_collections

from sslx.config import experiment, parse_argument
from sslx.data.text import TextConfig
from sslx.errors import choose
from sslx.models.bert import MODERN, SIZES, BertConfig
from sslx.pretext.mlm import MaskedLanguageModelConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one corpus."""
    arguments = parse_argument(argument, "size", size="default", data="python_docs")
    size = choose(arguments["size"], ("default", *SIZES), "size of configs/bert_mlm.py")
    if size == "default":
        return small_job(arguments["data"])
    return published(size, arguments["data"])


def small_job(source: str) -> ml_collections.ConfigDict:
    """A few minutes on two CPU cores."""
    config = experiment(
        data=TextConfig(source, seq_len=64),
        model=BertConfig(layers=2, width=192, heads=3, mlp_width=384, dropout=0.0, attention_dropout=0.0, **MODERN),
        pretext=MaskedLanguageModelConfig(),
    )
    config.steps = 1500
    config.batch_size = 32
    config.optimizer.learning_rate = 3e-3
    config.optimizer.beta2 = 0.98
    config.optimizer.warmup_steps = 100
    config.eval.every_steps = 250
    config.checkpoint.every_steps = 250
    return config


def published(size: str, source: str) -> ml_collections.ConfigDict:
    """The original BERT of a published size."""
    config = experiment(
        data=TextConfig(source, seq_len=128, vocab_size=30522),
        model=BertConfig(**SIZES[size]),
        pretext=MaskedLanguageModelConfig(),
    )
    config.steps = 1_000_000
    config.batch_size = 256
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 10_000
    config.optimizer.eps = 1e-6
    config.eval.every_steps = 10_000
    config.checkpoint.every_steps = 10_000
    config.log.every_steps = 100
    return config
