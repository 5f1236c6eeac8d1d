"""GPT causal language modelling (GPT-2: Radford et al. 2019).

Command:   python -m sslx.main --config=configs/gpt_clm.py
Argument:  [SIZE][,data=SOURCE], for example configs/gpt_clm.py:small,data=text:corpus/*.jsonl
Default:   a small real job on python_docs: 4 layers x 128 of the modern kind (RoPE, RMSNorm, SwiGLU, query-key norm, no
           biases), byte-level BPE of 2,048 tokens, rows of 128. 1,500 steps of 2,048 tokens: held-out loss 3.34 nats,
           3.03 below the unigram entropy of 6.37 (seed 0; some ten minutes on two CPU cores busy with other work).
Sizes:     small medium large xl are GPT-2's (learned positions, tanh GELU, dropout 0.1), rows of 1,024 tokens, 512 rows
           a step, AdamW at 6e-4 with betas 0.9 and 0.95, weight decay 0.1, 2,000 steps of warm-up, cosine decay to a
           tenth: the settings of nanoGPT's reproduction (val loss 2.85 of small on OpenWebText after 600,000 steps of
           0.5 M tokens). They are meant for accelerators. --config.data.tokenizer=FOLDER takes GPT-2's own tokenizer.
           shakespeare_char is nanoGPT's CPU setting: 4 layers x 128, characters, block 64, batch 12, 2,000 steps,
           dropout 0; nanoGPT reports a validation loss of 1.88 on tiny Shakespeare (and 1.4697 of 6 x 384 on a GPU):
           configs/gpt_clm.py:shakespeare_char,data=text:input.txt
           One file is one document, of which the last tenth is held out.
"""

import ml_collections

from sslx.config import experiment, parse_argument
from sslx.data.text import TextConfig
from sslx.errors import choose
from sslx.models.gpt import MODERN, SIZES, GptConfig
from sslx.pretext.clm import CausalLanguageModelConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one corpus."""
    arguments = parse_argument(argument, "size", size="default", data="python_docs")
    size = choose(arguments["size"], ("default", *SIZES), "size of configs/gpt_clm.py")
    make = {"default": small_job, "shakespeare_char": shakespeare_char}.get(size)
    return make(arguments["data"]) if make else published(size, arguments["data"])


def small_job(source: str) -> ml_collections.ConfigDict:
    """A few minutes on two CPU cores."""
    config = experiment(
        data=TextConfig(source, tokenizer="bpe", vocab_size=2048, seq_len=128),
        model=GptConfig(layers=4, width=128, heads=4, mlp_width=256, dropout=0.0, attention_dropout=0.0, **MODERN),
        pretext=CausalLanguageModelConfig(),
    )
    config.steps = 1500
    config.batch_size = 16
    config.optimizer.learning_rate = 3e-3
    config.optimizer.beta2 = 0.98
    config.optimizer.weight_decay = 0.1
    config.optimizer.warmup_steps = 100
    config.eval.every_steps = 250
    config.checkpoint.every_steps = 250
    return config


def shakespeare_char(source: str) -> ml_collections.ConfigDict:
    """nanoGPT's ``train_shakespeare_char`` as its README runs it on a laptop's CPU."""
    config = experiment(
        data=TextConfig(source, tokenizer="char", seq_len=64, train_split="train", eval_split="validation"),
        model=GptConfig(
            **SIZES["shakespeare_char"],
            dropout=0.0,
            attention_dropout=0.0,
            bias=False,
            max_length=64,
            activation="gelu",
        ),
        pretext=CausalLanguageModelConfig(),
    )
    config.steps = 2000
    config.batch_size = 12
    optimizer = config.optimizer
    optimizer.learning_rate, optimizer.warmup_steps, optimizer.schedule = 1e-3, 100, "cosine"
    optimizer.final_scale, optimizer.beta2, optimizer.weight_decay = 0.1, 0.99, 0.1
    config.eval.every_steps = 250
    config.checkpoint.every_steps = 1000
    return config


def published(size: str, source: str) -> ml_collections.ConfigDict:
    """GPT-2 of a published size."""
    config = experiment(
        data=TextConfig(source, tokenizer="bpe", vocab_size=50257, seq_len=1024),
        model=GptConfig(**SIZES[size]),
        pretext=CausalLanguageModelConfig(),
    )
    config.steps = 600_000
    config.batch_size = 512
    optimizer = config.optimizer
    optimizer.learning_rate, optimizer.warmup_steps, optimizer.schedule = 6e-4, 2000, "cosine"
    optimizer.final_scale, optimizer.beta2, optimizer.weight_decay = 0.1, 0.95, 0.1
    config.eval.every_steps = 10_000
    config.checkpoint.every_steps = 10_000
    config.log.every_steps = 100
    return config
