"""Exporting runs: what is written is the run, loads again as a start, and is whole or not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export as jax_export
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer

import sslx
from sslx import finetune, main
from sslx.data.questions import Question
from sslx.data.text import saved_tokenizer
from sslx.errors import UserError
from sslx.export import export
from sslx.inference.verb import whole_document
from sslx.interop.model_card import without_folders
from sslx.interop.stablehlo import INPUTS
from sslx.models.bert import MODERN
from sslx.train.checkpoint import read_variables
from sslx.train.initialise import inherited, load_encoder, objective_class, open_start
from sslx.train.run_folder import read_config
from sslx.train.sharding import unbox

ORIGINAL = {
    "model.norm_position": "post",
    "model.positions": "learned",
    "model.glu": False,
    "model.bias": True,
    "model.norm_eps": 1e-12,
    "data.vocab_size": 500,  # of 512 rows
    "steps": 2,
    "optimizer.warmup_steps": 1,
    "eval.batches": 1,
}
CLASSIFICATION = {"steps": 2, "optimizer.warmup_steps": 1, "task.pool": "first", "checkpoint.best_metric": "eval/loss"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_config):
    """A BERT of the original kind."""
    run = tmp_path_factory.mktemp("runs") / "bert"
    main.main(tiny_config("bert_mlm", ORIGINAL), run)
    return run


@pytest.fixture(scope="module")
def exported(run):
    folder = run.parent / "exported"
    export(str(run), str(folder), "hf")
    return folder


def test_an_exported_run_has_its_weights_with_the_vocabulary_cut(run, exported):
    params = read_variables(run)["params"]
    tensors, config = load_file(exported / "model.safetensors"), json.loads((exported / "config.json").read_text())
    words = saved_tokenizer(run)[1]
    assert config["architectures"] == ["BertForMaskedLM"]
    assert (config["vocab_size"], config["pad_token_id"]) == (words.size, words.pad_id)
    assert words.size < len(params["encoder"]["embeddings"]["word"])
    np.testing.assert_array_equal(
        tensors["bert.embeddings.word_embeddings.weight"], params["encoder"]["embeddings"]["word"][: words.size]
    )
    np.testing.assert_array_equal(tensors["cls.predictions.bias"], params["mlm_head"]["bias"][: words.size])
    np.testing.assert_array_equal(
        tensors["bert.encoder.layer.1.output.dense.weight"],
        params["encoder"]["transformer"]["layers"]["mlp"]["down"]["kernel"][1].T,
    )
    theirs = AutoTokenizer.from_pretrained(exported)
    for text in ("Returns the sum of two numbers.", "Returns the sum of two numbers. " * 9):
        assert theirs(text, truncation=True).input_ids == whole_document(sslx.load(run).run, text).tokens
    assert theirs.model_max_length == read_config(run)["data"]["seq_len"] == 32


def test_the_model_card_tells_data_steps_loss_and_command(run, exported):
    card = (exported / "README.md").read_text()
    (loss,) = {
        f"{record['eval/loss']:.4f}"
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if record["step"] == 2 and "eval/loss" in record
    }
    source = read_config(run)["data"]["source"]
    assert source.startswith("jsonl:/")
    for told in (
        "license: #",
        "BertForMaskedLM",
        f"| data | jsonl:{source.rpartition('/')[2]}, split train[:90%] |",
        "2 of 16 rows",
        f"| held-out loss | {loss} |",
        "| held-out rows | split train[90%:], at step 2 |",
        "python -m sslx.export --run=bert --format=hf --step=2",
        '"mask_ratio": 0.15',
    ):
        assert told in card


def test_nothing_exported_tells_where_it_lay(run, exported, tmp_path):
    # Of a config that leaves the splits to the data, and of an older run that does not say what they were.
    shutil.copytree(run, tmp_path / "copy")
    config = read_config(run) | {"init": f"scratch:{tmp_path}/other run/"}
    config["optimizer"]["freeze"] = ["/bias$"]
    config["data"] |= {
        "train_split": "train",
        "eval_split": "validation",
        "tfds_dir": "~/tfds",
        "cache_dir": str(tmp_path),
    }
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    export(str(tmp_path / "copy"), str(tmp_path / "out"), "hf")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "split train[:90%] |" in card
    assert "| started from | scratch:other run |" in card
    assert '"tfds_dir": "tfds"' in card
    assert '"/bias$"' in card
    (tmp_path / "copy" / "splits.json").unlink()
    export(str(tmp_path / "copy"), str(tmp_path / "older"), "stablehlo")
    assert ", split train |" in (tmp_path / "older" / "README.md").read_text()
    for folder in (exported, tmp_path / "out", tmp_path / "older"):
        for file in (file for file in folder.rglob("*") if file.is_file()):
            content = file.read_bytes()
            for place in (tmp_path.parent, run.parent.parent, Path(sslx.__file__).parent, Path(jax.__file__).parent):
                assert str(place).encode() not in content, file


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("/a/b/c", "c"),
        ("text:/a/my texts/*.txt", "text:*.txt"),
        ("~/data/x/", "x"),
        ("/", ""),
        ("rows:gs://bucket/a", "rows:gs://bucket/a"),
        ("gs://bucket/a", "gs://bucket/a"),
        ("text:corpus/*.txt", "text:corpus/*.txt"),
        ("sslx.pretext.mlm:MaskedLanguageModel", "sslx.pretext.mlm:MaskedLanguageModel"),
        ([{"a": "/a/b"}, 3, None], [{"a": "b"}, 3, None]),
    ],
)
def test_of_local_paths_the_last_part_is_left(written, told):
    assert without_folders(written) == told


def test_training_goes_on_from_an_exported_folder(run, exported, tiny_config, tmp_path):
    settings = ORIGINAL | {"model.layers": 1, "init": str(exported)}  # the folder's architecture counts
    session = main.main(tiny_config("bert_mlm", settings), tmp_path / "run")
    assert session.written["model"] == read_config(run)["model"]
    params, notes = load_encoder(session.trainer.program.abstract.params, open_start(exported))
    assert notes == []
    # All that the run had, but for the rows that no token uses.
    theirs, words = read_variables(run)["params"], saved_tokenizer(run)[1]
    for tree in (theirs["encoder"]["embeddings"]["word"], theirs["mlm_head"]["bias"]):
        tree[words.size :] = 0
    jax.tree.map(np.testing.assert_array_equal, params, theirs)


def test_pretraining_goes_on_from_a_run_with_longer_rows(run, tiny_config):
    # As phase two of BERT does: encoder and head are those of the run, its whole position table included.
    written = tiny_config("bert_mlm", ORIGINAL | {"data.seq_len": 64}).to_dict()
    written, tokenizer = inherited(written | {"init": str(run)})
    objective, _ = objective_class(written).prepare(written, str(tokenizer))
    batch = {name: np.zeros((1, 64), int) for name in ("tokens", "segment_ids", "positions", "row")}
    shapes = jax.eval_shape(lambda: unbox(objective.init(jax.random.key(0), batch)))["params"]
    params, notes = load_encoder(shapes, open_start(run))
    assert notes == []
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    jax.tree.map(np.testing.assert_array_equal, params, read_variables(run)["params"])


def test_a_classifier_goes_out_with_its_labels(exported, tiny_config, tmp_path):
    run = tmp_path / "classifier"
    settings = CLASSIFICATION | {"init": str(exported)}
    finetune.main(tiny_config("finetune/text_classification", settings), run)
    export(str(run), str(tmp_path / "out"), "hf")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    labels = json.loads((run / "labels.json").read_text())
    assert config.architectures == ["BertForSequenceClassification"]
    assert [config.id2label[label] for label in range(len(labels))] == labels
    tensors, params = load_file(tmp_path / "out" / "model.safetensors"), read_variables(run)["params"]
    np.testing.assert_array_equal(tensors["classifier.weight"], params["head"]["kernel"].T)
    np.testing.assert_array_equal(tensors["bert.pooler.dense.bias"], params["pooler"]["dense"]["bias"])
    assert not any(name.startswith("cls.") for name in tensors)


def test_stablehlo_computes_what_the_run_does_for_any_batch(run, tmp_path, packed_rows):
    export(str(run), str(tmp_path / "out"), "stablehlo")
    objective = objective_class(read_config(run)).restored(read_config(run), run)
    variables = read_variables(run)
    params, state = variables["params"], variables["state"]
    loaded = {
        name: jax_export.deserialize((tmp_path / "out" / f"{name}.stablehlo").read_bytes())
        for name in ("features", "logits")
    }
    assert set(loaded["features"].platforms) == {"cpu", "cuda", "tpu"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer").vocab_size == objective.vocabulary.size
    for rows in (1, 3):
        batch = {name: packed_rows(rows, 32)[name] for name in ("tokens", "segment_ids", "positions")}
        features = jax.jit(objective.encode)(objective.encoder(params, state), batch)
        logits = jax.jit(objective.logits)(params, state, batch)
        assert (features.shape, logits.shape) == ((rows, 32), (rows, 32, objective.vocabulary.size))
        np.testing.assert_allclose(loaded["features"].call(batch), features, atol=1e-5)
        np.testing.assert_allclose(loaded["logits"].call(batch), logits, atol=1e-5)


def recipe_run(folder):
    """What the snippet of an exported card finds."""
    recipe = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    scope: dict = {}
    exec(recipe.replace("FOLDER", str(folder)), scope)
    return recipe, scope["found"], scope["rows"]


def test_the_card_says_how_to_get_the_features_of_a_text(trained, tmp_path):
    # Those of a causal model are its last token's, which is the end of the text.
    run = trained("gpt_clm")
    export(str(run), str(tmp_path / "out"), "stablehlo")
    recipe, found, _ = recipe_run(tmp_path / "out")
    assert '"a text"' in recipe
    loaded = sslx.load(run).run
    tokens = np.array([whole_document(loaded, "a text").tokens], np.int32)
    places = np.arange(tokens.shape[1], dtype=np.int32)[None]
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": places}
    variables = loaded.objective.encoder(loaded.variables["params"], loaded.variables["state"])
    np.testing.assert_allclose(found, loaded.objective.encode(variables, batch), atol=1e-5)


@pytest.mark.parametrize("task", ["text_classification", "question_answering", "sentence_order"])
def test_the_card_says_how_to_give_what_tells_two_texts_apart(tiny_config, tmp_path, task):
    run, changes = tmp_path / "run", {"steps": 1, "optimizer.warmup_steps": 0, "eval.batches": 1, "model.layers": 1}
    if task == "sentence_order":
        main.main(tiny_config("bert_mlm", changes | {"pretext.sentence": "sop"}), run)
    else:
        changes |= {"init": "scratch", "checkpoint.best_metric": "eval/loss", "checkpoint.best_mode": "min"}
        words = ["anna", "met", "bob", "in", "rome", "by", "the", "river"]
        if task == "text_classification":
            rows = [{"text": w, "pair": v, "label": "yes" if w == v else "no"} for w in words for v in words]
            (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            changes |= {"data.source": f"jsonl:{tmp_path}/a.jsonl", "data.pair_field": "pair"}
        else:
            asked = [{"question": "who ?", "answers": [{"text": "anna", "answer_start": 0}]}]
            paragraphs = [{"context": f"{' '.join(words)} {i}", "qas": asked} for i in range(40)]
            (tmp_path / "a.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
            changes |= {"data.source": f"squad:{tmp_path}/a.json", "data.max_question_length": 8, "data.doc_stride": 8}
        finetune.main(tiny_config(f"finetune/{task}", changes), run)
    export(str(run), str(tmp_path / "out"), "stablehlo")
    _, found, rows = recipe_run(tmp_path / "out")
    model = sslx.load(run)
    tokens_of = model.run.tokens_of
    texts = {"text_classification": ("a text", "its pair"), "question_answering": ("a question", "its context")}
    if task == "sentence_order":
        variables = model.run.objective.encoder(model.run.variables["params"], model.run.variables["state"])
        rows = {name: np.asarray(array, np.int32) for name, array in rows.items()}
        np.testing.assert_allclose(found, model.run.objective.encode(variables, rows), atol=1e-5)
        assert not rows["token_types"].any()
        np.testing.assert_array_equal(rows["tokens"][0, 1:-1][: len(tokens_of("a text"))], tokens_of("a text"))
        return
    first, second = map(tokens_of, texts[task])
    words, size = model.run.words, len(first) + len(second) + 3
    expected = [words.cls_id, *first, words.sep_id, *second, words.sep_id]
    types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
    for name, values in {"tokens": expected, "token_types": types, "positions": range(size)}.items():
        assert rows[name][0, :size].tolist() == list(values), name
    assert rows["segment_ids"].sum() == size
    if task == "text_classification":
        probabilities = np.exp(np.float64(found[0])) / np.exp(np.float64(found[0])).sum()
        names = json.loads((tmp_path / "out" / "labels.json").read_text())
        assert dict(zip(names, probabilities, strict=True)) == pytest.approx(
            model.classify(texts[task]).probabilities, abs=1e-5
        )
        return
    made = model.run.objective.rows_of([Question(*texts[task])]).fetch(np.zeros(1, np.int64))
    read = {name: made[name] for name in ("tokens", "segment_ids", "positions", "token_types")}
    logits = model.run.objective.logits(model.run.variables["params"], {}, read)
    np.testing.assert_allclose(found, logits, atol=1e-5)


def test_a_tagger_goes_out_with_its_tags_and_its_logits(exported, tiny_config, tmp_path, packed_rows):
    sentence = {"tokens": ["anna", "met", "bob", "in", "rome", "."], "tags": ["PER", "O", "PER", "O", "LOC", "O"]}
    (tmp_path / "tags.jsonl").write_text(f"{json.dumps(sentence)}\n" * 40)
    settings = {"init": str(exported), "data.source": f"jsonl:{tmp_path / 'tags.jsonl'}", "steps": 2}
    settings |= {"optimizer.warmup_steps": 1, "checkpoint.best_metric": "eval/loss"}
    run = tmp_path / "tagger"
    finetune.main(tiny_config("finetune/token_tagging", settings), run)
    export(str(run), str(tmp_path / "hf"), "hf")
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.architectures == ["BertForTokenClassification"]
    assert config.id2label == {0: "LOC", 1: "O", 2: "PER"}
    tensors, params = load_file(tmp_path / "hf" / "model.safetensors"), read_variables(run)["params"]
    np.testing.assert_array_equal(tensors["classifier.weight"], params["head"]["kernel"].T)
    export(str(run), str(tmp_path / "out"), "stablehlo")
    loaded = jax_export.deserialize((tmp_path / "out" / "logits.stablehlo").read_bytes())
    objective = objective_class(read_config(run)).restored(read_config(run), run)
    batch = {name: packed_rows(3, 32)[name] for name in ("tokens", "segment_ids", "positions")}
    expected = jax.jit(lambda batch: objective.module.apply({"params": params}, batch, deterministic=True))(batch)
    assert expected.shape == (3, 32, 3)
    np.testing.assert_allclose(loaded.call(batch), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"),
    {
        "finetune/question_answering": (2, 64, 2),
        "finetune/token_tagging": (2, 64, 3),
        "finetune/text_classification number": (2, 1),
        "finetune/text_classification": (2, 2),
        "electra": (2, 64),
        "gpt_clm": (2, 64, 512),
        "finetune/sentence_embedding": None,
    }.items(),
)
def test_every_head_has_logits_of_rows_without_views(tiny_config, name, shape):
    changes = {"data.seq_len": 64, "data.max_question_length": 16, "data.doc_stride": 16}
    changes = {key: value for key, value in changes.items() if "question" in name or key == "data.seq_len"}
    name, _, number = name.partition(" ")
    written = tiny_config(name, changes).to_dict()
    if number:
        written["task"], written["data"]["label_type"] = {"name": "text_regression"}, "number"
    objective, row = objective_class(written).abstract(written)
    batch = {key: np.zeros((2, *leaf.shape), leaf.dtype) for key, leaf in row.items()} | {"row": np.arange(2)}
    read = {key: batch[key] for key in INPUTS if key in batch}

    def found():
        variables = unbox(objective.init(jax.random.key(0), batch))
        return objective.logits(variables["params"], variables["state"], read)

    logits = jax.eval_shape(found)
    assert (logits is None) if shape is None else (logits.shape, logits.dtype) == (shape, np.float32)


def test_the_entry_writes_a_whole_folder_or_none(entries, run, exported, tmp_path):
    ended = entries.run("export", f"--run={run}", "--format=hf", "--out=made/model", "--encoder_only", folder=tmp_path)
    assert (ended.code, ended.stderr) == (0, "")
    assert "transformers.BertModel.from_pretrained('made/model')" in ended.stdout
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "made" / "model").iterdir()
    }
    before = sorted(path.name for path in (tmp_path / "made").iterdir())
    cases = {
        f"--run={run} --format=hf --out=made/model": "--out=made/model exists; give another, or remove it first",
        f"--run={run} --format=hff --out=b": "unknown --format 'hff'; did you mean 'hf'?",
        f"--run={run} --format=hf": "no --out given",
        f"--run={run}x --format=hf --out=b": "no run in",
        f"--run={exported} --format=hf --out=b": "is a folder of published weights and no run",
        f"--run={run} --format=hf --out=b --step=1": "has no checkpoint of step 1; it has",
        f"--run={run} --format=stablehlo --out=b --encoder_only": "--encoder_only is for --format=hf",
        f"--run={run} --format=hf --out=made/model/config.json/b": "is not a folder that can be written",
    }
    for arguments, expected in cases.items():
        ended = entries.run("export", *arguments.split(), folder=tmp_path)
        assert (ended.code, ended.stderr.count("\n")) == (2, 1), arguments
        assert expected in ended.stderr
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_what_transformers_has_no_counterpart_of(run, tmp_path):
    shutil.copytree(run, tmp_path / "modern")
    config = read_config(run)
    config["model"] |= MODERN
    (tmp_path / "modern" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        export(str(tmp_path / "modern"), str(tmp_path / "out"), "hf")
    said = str(error.value)
    for key in ("norm_position=pre (expected post)", "positions=rope (expected learned)", "glu=True", "bias=False"):
        assert f"config.model.{key}" in said
    assert "configs/bert_mlm.py:base" in said
    assert "--format=stablehlo exports any model" in said
    assert [path.name for path in tmp_path.iterdir()] == ["modern"]
