"""Fine-tunes a pretrained text encoder to tag words: named entities or parts of speech.

Command:  python -m sslx.finetune --config=configs/finetune/token_tagging.py --config.init=runs/bert_mlm
Baseline: the same with --config.init=scratch:runs/bert_mlm --workdir=runs/scratch
Data:     python_names, the functions of Python's standard library with each name tagged as what it is (B-PARAMETER,
          B-CLASS, ...), a few minutes on two CPU cores; or data=conll:FOLDER, columns as CoNLL's (word first, tag last,
          a blank line between sentences); data=jsonl:FILES with lists ``tokens`` and ``tags``; or
          data=tfds:conll2003 --config.data.tags_field=ner
Chance:   entity F1 0.657 on python_names, of each word's most frequent tag; a run of bert_mlm.py comes to 0.91
Tags:     entities (B-PER, I-PER, O), selected by their F1; tags=pos selects by accuracy
Files named train*, dev* or valid*, and test* are the splits of these names; others are one, and 2 % are held out.
"""

import ml_collections

from sslx.config import experiment, parse_argument
from sslx.data.tagged_words import TaggedWordsConfig
from sslx.errors import choose
from sslx.models.bert import BertConfig
from sslx.tasks.token_tagging import TokenTaggingConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    given = parse_argument(argument, "data", data="python_names", tags="entities")
    entities = choose(given["tags"], ("entities", "pos"), "tags") == "entities"
    embedded = given["data"] == "python_names"
    splits = dict(test_split="test") if embedded else {}
    config = experiment(
        data=TaggedWordsConfig(given["data"], seq_len=96 if embedded else 128, **splits),
        model=BertConfig(),
        task=TokenTaggingConfig(),
    )
    config.steps = 300 if embedded else 1000
    config.batch_size = 32
    config.optimizer.learning_rate = 1e-3 if embedded else 3e-4
    config.optimizer.warmup_steps = config.steps // 10
    config.optimizer.layer_decay = 0.9
    config.checkpoint.best_metric = "eval/entity_f1" if entities else "eval/accuracy"
    config.checkpoint.best_mode = "max"
    config.eval.every_steps = 100 if embedded else 200
    config.eval.examples = 4
    return config
