"""Fine-tunes a pretrained text encoder to sort pairs of texts: entailment, paraphrase, an answer to its question.

Command:  python -m sslx.finetune --config=configs/finetune/text_pairs.py:data=csv:pairs.csv --config.init=runs/bert_mlm
Baseline: the same with --config.init=scratch:runs/bert_mlm --workdir=runs/scratch
Data:     csv:, jsonl:, parquet: or tfds: with fields text, pair and label; others by name, for example
          --config.data.text_field=premise --config.data.pair_field=hypothesis. A row is [CLS] text [SEP] pair [SEP], or
          with two separators where the tokenizer has it so; of too long ones the longer text loses its end.
Numbers:  labels that are numbers (a similarity from 0 to 5) are --config.data.label_type=number; see
          configs/finetune/glue.py:stsb for such a config. For GLUE itself see python -m sslx.glue.
"""

import ml_collections

from sslx.config import experiment, parse_argument
from sslx.data.text import TextConfig
from sslx.models.bert import BertConfig
from sslx.tasks.text_classification import TextClassificationConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config for one source of labelled pairs."""
    source = parse_argument(argument, "data", data="csv:pairs.csv")["data"]
    config = experiment(
        data=TextConfig(source, pair_field="pair", seq_len=128),
        model=BertConfig(),
        task=TextClassificationConfig(pool="first"),
    )
    config.steps = 1000
    config.batch_size = 32
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 100
    config.checkpoint.best_metric = "eval/accuracy"
    config.checkpoint.best_mode = "max"
    config.eval.every_steps = 200
    config.eval.examples = 4
    return config
