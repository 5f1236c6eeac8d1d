"""No step has become several times slower: its arithmetic as a share of a matrix product's rate, measured beside it.

Never absolute times: a loaded or slow machine slows both, and the share stays. On two cores it was 0.62 and 0.64 while
other programs left this one a tenth of them. The band is wide enough for another machine, and three times slower is
outside of it. Unlike the other tests' programs, this one is compiled as users' are.
"""

from __future__ import annotations

import json

import pytest

LEAST, MOST = 0.25, 1.2  # above 1 the FLOPs would be counted wrong
ATTEMPTS = 3

CONFIG = """
from sslx.config import experiment
from sslx.data.text import TextConfig
from sslx.models.bert import BertConfig
from sslx.pretext.mlm import MaskedLanguageModelConfig

def get_config():
    config = experiment(
        data=TextConfig(source="jsonl:corpus.jsonl", seq_len=64, vocab_size=600),
        model=BertConfig(layers=2, width=256, heads=4, mlp_width=1024, max_length=64),
        pretext=MaskedLanguageModelConfig(),
    )
    config.batch_size = 16
    return config
"""


@pytest.fixture(scope="module")
def share(entries, tmp_path_factory, made_up_texts):
    """Measures the step's share of a product's rate."""
    folder = tmp_path_factory.mktemp("speed")
    lines = (json.dumps({"text": text}) + "\n" for text in made_up_texts * 4)
    (folder / "corpus.jsonl").write_text("".join(lines))
    (folder / "config.py").write_text(CONFIG)

    def measure() -> float:
        arguments = ("--config=config.py", "--steps=15", "--json")
        ended = entries.run(
            "bench", *arguments, folder=folder, environment={"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
        )
        assert ended.code == 0, ended.stderr
        return json.loads(ended.stdout)["of_product"]

    return measure


def test_a_step_of_bert_does_its_arithmetic_at_a_fair_share_of_a_products_rate(share):
    found = []
    while len(found) < ATTEMPTS:  # something that starts in the middle of a measurement may spoil one, hardly three
        found.append(share())
        if LEAST < found[-1] < MOST:
            return
    pytest.fail(f"shares of {found}; expected {LEAST} to {MOST}")
