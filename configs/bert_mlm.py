"""BERT masked language modelling."""

import ml_collections

from sslx.config import experiment, parse_argument
from sslx.data.text import TextConfig
from sslx.errors import choose
from sslx.models.bert import MODERN, SIZES, BertConfig
from sslx.pretext.mlm import MaskedLanguageModelConfig


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    arguments = parse_argument(argument, "size", size="default", data="python_docs")
    config = experiment(
        data=TextConfig(source=arguments["data"], seq_len=64),
        model=BertConfig(layers=2, width=256, heads=4, mlp_width=1024, dropout=0.0, attention_dropout=0.0),
        pretext=MaskedLanguageModelConfig(),
    )
    return config
