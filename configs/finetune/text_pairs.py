"""Fine-tunes a pretrained text encoder to sort pairs of texts: entailment, paraphrase, an answer to its question.

Command:  python -m sslx.finetune --config=configs/finetune/text_pairs.py:data=csv:pairs.csv --config.init=runs/bert_mlm
Baseline: the same with --config.init=scratch:runs/bert_mlm --workdir=runs/scratch
Data:     csv:, jsonl:, parquet: or tfds: with fields text, pair and label; others by name, for example
          --config.data.text_field=premise --config.data.pair_field=hypothesis. A row is [CLS] text [SEP] pair [SEP], or
          with two separators where the tokenizer has it so; of too long ones the longer text loses its end.
Numbers:  labels that are numbers (a similarity from 0 to 5) are the argument labels=number:
          configs/finetune/text_pairs.py:data=csv:pairs.csv,labels=number. For GLUE itself see python -m sslx.glue.
"""

import ml_collections

from sslx.config import experiment, parse_argument
from sslx.data.text import TextConfig
from sslx.errors import choose
from sslx.models.bert import BertConfig
from sslx.tasks.text_classification import TextClassificationConfig
from sslx.tasks.text_regression import TextRegressionConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config for one source of labelled pairs."""
    given = parse_argument(argument, "data", data="csv:pairs.csv", labels="classes")
    numbers = choose(given["labels"], ("classes", "number"), "labels") == "number"
    config = experiment(
        data=TextConfig(given["data"], pair_field="pair", seq_len=128, label_type="number" if numbers else "class"),
        model=BertConfig(),
        task=TextRegressionConfig(pool="first") if numbers else TextClassificationConfig(pool="first"),
    )
    config.steps = 1000
    config.batch_size = 32
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 100
    config.checkpoint.best_metric = "eval/spearman" if numbers else "eval/accuracy"
    config.checkpoint.best_mode = "max"
    config.eval.every_steps = 200
    config.eval.examples = 4
    return config
