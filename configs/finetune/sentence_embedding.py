"""Fine-tunes a pretrained text encoder so that texts that mean the same lie near each other (SimCSE).

Command:  python -m sslx.finetune --config=configs/finetune/sentence_embedding.py --config.init=runs/bert_mlm
Data:     docstrings of python_docs, without labels; or data=text:FILES, a text a record (unsupervised).
          Pairs: data=csv:FILE --config.task.pair_field=text2 --config.task.negative_field=hard (supervised)
Scores:   --config.task.sts=csv:FILE with columns text, text2 and score adds eval/sts_spearman
Chance:   ln(batch) = 4.159 for batches of 64
"""

import ml_collections

from sslx.config import experiment, parse_argument
from sslx.data.text import TextConfig
from sslx.models.bert import BertConfig
from sslx.tasks.sentence_embedding import SentenceEmbeddingConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    source = parse_argument(argument, "data", data="python_docs")["data"]
    config = experiment(
        data=TextConfig(source, seq_len=64),
        model=BertConfig(),
        task=SentenceEmbeddingConfig(),
    )
    config.steps = 300
    config.batch_size = 64
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 30
    config.eval.every_steps = 100
    config.eval.examples = 4
    return config
