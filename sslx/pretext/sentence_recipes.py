"""What the experiments of joint embedding on texts in ``configs/`` share, beside each method's own settings."""

from __future__ import annotations

from typing import Any

import ml_collections

from sslx.config import experiment
from sslx.data.text import TextConfig
from sslx.models.bert import MODERN, BertConfig


def sentence_job(pretext: Any, *, steps: int = 200, batch_size: int = 64) -> ml_collections.ConfigDict:
    """Docstrings, in some two minutes on two CPU cores.

    The encoder is that of ``configs/bert_mlm.py``, but for its dropout: a run of it may be the start (``config.init``),
    as SimCSE starts from BERT.
    """
    config = experiment(
        data=TextConfig(seq_len=64),
        model=BertConfig(layers=2, width=192, heads=3, mlp_width=384, **MODERN),
        pretext=pretext,
    )
    config.steps = steps
    config.batch_size = batch_size
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_steps = 15  # below the steps of a short trial
    config.optimizer.schedule = "cosine"
    config.eval.every_steps = config.checkpoint.every_steps = steps // 4
    config.eval.examples = 0
    return config
