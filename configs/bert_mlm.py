"""BERT masked language modelling (arXiv 1810.04805).

Command:   python -m sslx.main --config=configs/bert_mlm.py
Argument:  [SIZE][,data=SOURCE][,phase=1|2], for example configs/bert_mlm.py:base,data=text:corpus/*.jsonl
Default:   a small real job on python_docs: 2 layers x 192 of the modern kind (pre-LN, RoPE, GeGLU, no biases), rows of
           64 tokens, 3 M tokens. On two CPU cores (AMD EPYC, AVX2): about 5 minutes
           (three quarters of the 6:43 that 2,000 steps took), held-out loss 3.69 nats at 15 %
           masked, 2.2 below the unigram entropy of 5.89 (seed 0).
Sizes:     tiny mini small base large are the published ones of the original BERT (post-LN, learned positions, GELU,
           dropout 0.1), with its phase-one recipe: rows of 128 tokens, batch 256, AdamW at 1e-4, 10,000 steps of
           warm-up, linear decay, weight decay 0.01; for all of its 1 M steps unless a phase is given, with Adam's bias
           correction, and with its sentence loss only on --config.pretext.sentence=nsp.
           They are meant for an accelerator and a large corpus.
Phases:    the original takes rows of 512 for the last tenth of its steps (appendix A.2). phase=1 is the first 900,000
           steps of the same schedule; phase=2 is the other 100,000 on rows of 512, at the rate that phase=1 ends with
           and with moments that begin anew, and needs the run of phase=1:
           --config=configs/bert_mlm.py:base,phase=1 --workdir=runs/base_128
           --config=configs/bert_mlm.py:base,phase=2 --config.init=runs/base_128 --workdir=runs/base_512
"""

import ml_collections

from sslx.config import experiment, parse_argument, to_be_given
from sslx.data.text import TextConfig
from sslx.errors import UserError, choose
from sslx.models.bert import MODERN, SIZES, BertConfig
from sslx.pretext.mlm import MaskedLanguageModelConfig

STEPS, WARMUP_STEPS, LEARNING_RATE = 1_000_000, 10_000, 1e-4
PHASE_TWO_STEPS = STEPS // 10


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config of one size on one corpus."""
    arguments = parse_argument(argument, "size", size="default", data="python_docs", phase="")
    size = choose(arguments["size"], ("default", *SIZES), "size of configs/bert_mlm.py")
    phase = choose(arguments["phase"], ("", "1", "2"), "phase of configs/bert_mlm.py")
    if size == "default":
        if phase:
            raise UserError(f"phase={phase} needs one of the published sizes: {', '.join(SIZES)}")
        return small_job(arguments["data"])
    config = published(size, arguments["data"])
    if phase == "1":
        config.steps = STEPS - PHASE_TWO_STEPS
        config.optimizer.schedule_steps = STEPS
    if phase == "2":
        config.init = to_be_given("the run of phase=1")
        config.data.seq_len = 512
        config.steps = PHASE_TWO_STEPS
        config.optimizer.warmup_steps = 0
        config.optimizer.learning_rate = LEARNING_RATE * PHASE_TWO_STEPS / (STEPS - WARMUP_STEPS)
    return config


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
    config.steps = STEPS
    config.batch_size = 256
    config.optimizer.learning_rate = LEARNING_RATE
    config.optimizer.warmup_steps = WARMUP_STEPS
    config.optimizer.eps = 1e-6
    config.eval.every_steps = 10_000
    config.checkpoint.every_steps = 10_000
    config.log.every_steps = 100
    return config
