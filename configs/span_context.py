"""Context prediction: regress a teacher's view of masked spans (data2vec's text recipe, arXiv 2202.03555).

Command:   python -m sslx.main --config=configs/span_context.py
Argument:  [SIZE][,data=SOURCE], for example configs/span_context.py:base,data=text:corpus/*.jsonl
Default:   a small real job on python_docs with the encoder of configs/bert_mlm.py's: 2 layers x 192 of the modern kind
           (pre-LN, RoPE, GeGLU, no biases), rows of 64 tokens, both layers as targets. eval/explained, which is 0 by
           chance, is 0.245 at its end.
Sizes:     base is data2vec's text model, a BERT base: rows of 512 tokens, 256 a step, 35 % masked in spans of 4, the
           mean of the top 10 layers as targets, smooth L1 with beta 4, teacher momentum 0.999 to 0.9999 over 300,000
           steps, AdamW at 2e-4 with betas 0.9 and 0.98, 10,000 steps of warm-up, cosine decay, 1 M steps. It is meant
           for an accelerator and a large corpus.
"""

import ml_collections

from sslx.config import experiment, parse_argument
from sslx.data.text import TextConfig
from sslx.errors import choose
from sslx.models.bert import MODERN, SIZES, BertConfig
from sslx.pretext.span_context import SpanContextConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one corpus."""
    arguments = parse_argument(argument, "size", size="default", data="python_docs")
    size = choose(arguments["size"], ("default", "base"), "size of configs/span_context.py")
    if size == "default":
        return small_job(arguments["data"])
    return published(size, arguments["data"])


def small_job(source: str) -> ml_collections.ConfigDict:
    """A few minutes on two CPU cores."""
    config = experiment(
        data=TextConfig(source, seq_len=64),
        model=BertConfig(layers=2, width=192, heads=3, mlp_width=384, dropout=0.0, attention_dropout=0.0, **MODERN),
        pretext=SpanContextConfig(top_layers=2, target_norm="instance", ema_start=0.99, ema_end=0.999, ema_steps=1000),
    )
    config.steps = 1500
    config.batch_size = 32
    config.optimizer.learning_rate = 1e-3
    config.optimizer.beta2 = 0.98
    config.optimizer.warmup_steps = 100
    config.eval.every_steps = 250
    config.eval.examples = 0
    config.checkpoint.every_steps = 250
    return config


def published(size: str, source: str) -> ml_collections.ConfigDict:
    """data2vec's text model of a published size."""
    config = experiment(
        data=TextConfig(source, seq_len=512, vocab_size=30522),
        model=BertConfig(**SIZES[size]),
        pretext=SpanContextConfig(smooth_beta=4.0),
    )
    config.steps = 1_000_000
    config.batch_size = 256
    config.optimizer.learning_rate = 2e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 10_000
    config.optimizer.beta2 = 0.98
    # Published as 1e-6 and 5 for a loss that is summed over the width. Here it is the mean, and so are its gradients.
    config.optimizer.eps = 1e-6 / config.model.width
    config.optimizer.clip_norm = 5.0 / config.model.width
    config.eval.every_steps = 10_000
    config.eval.examples = 0
    config.checkpoint.every_steps = 10_000
    config.log.every_steps = 100
    return config
