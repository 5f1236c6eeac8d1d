"""What the tests of planning share."""

import pytest

SMALL = {
    "model.layers": 2,
    "model.dropout": 0.0,
    "model.attention_dropout": 0.0,
    "model.width": 32,
    "model.heads": 2,
    "model.mlp_width": 64,
    "model.max_length": 16,
    "data.seq_len": 16,
    "data.vocab_size": 256,
    "optimizer.warmup_steps": 1,
}


@pytest.fixture(scope="session")
def small(tiny_config):
    """A written config of a step that compiles in seconds: ``small({"batch_size": 16})``; MLM takes far longer."""

    def make(changes=None, name="finetune/text_classification"):
        config = tiny_config(name, {**SMALL, **(changes or {})})
        return config.to_dict()

    return make
