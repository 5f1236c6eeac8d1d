"""The Python API: its answers against the objectives themselves, without padding, buckets or other texts."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sslx
from sslx.errors import UserError
from sslx.inference.verb import InputError
from sslx.models.generation import Sampling, generate, right_aligned
from sslx.objective import row_keys
from sslx.train.checkpoint import read_variables, saved_steps
from sslx.train.initialise import load_encoder, open_start

TEXTS = [
    "Return the sum of the values.",
    "a",
    "The file is closed when the archive is not open for reading, and every member has been added to it.",
    "Raise an error if the argument is not a number.",
    "Return a new message with the headers of the old one. The body is None.",
]
MASKED = ["Return the [MASK] of the file.", "[MASK] is [MASK] if the value [MASK] not given, else the default value"]


@pytest.fixture(scope="module")
def masked(trained):
    return sslx.load(trained("bert_mlm"))


@pytest.fixture(scope="module")
def causal(trained):
    return sslx.load(trained("gpt_clm"))


@pytest.fixture(scope="module")
def classifier(trained):
    return sslx.load(trained("finetune/text_classification"))


def alone(tokens, **more):
    """A batch of one row without padding."""
    tokens = np.array([tokens], np.int32)
    places = np.arange(tokens.shape[1], dtype=np.int32)[None]
    return {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": places, "row": np.zeros(1, int)} | more


def test_importing_the_package_stays_light():
    code = "import sys, sslx; sys.exit(bool({'jax', 'flax', 'orbax', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        sslx.lod  # noqa: B018


def test_fill_gives_what_the_objective_predicts(masked, trained):
    run = masked.run
    variables, predict = read_variables(trained("bert_mlm")), jax.jit(run.objective.predict)
    for text, found in zip(MASKED, masked.fill(MASKED), strict=True):
        tokens = run.tokenizer(text)["input_ids"]
        picked = np.flatnonzero(np.array(tokens) == run.tokenizer.mask_token_id)
        zeros = np.zeros((1, len(picked)), np.int32)
        batch = alone(tokens, picked=picked[None].astype(np.int32), targets=zeros, weights={"mlm": zeros})
        expected = jax.device_get(predict(variables["params"], {}, batch))
        assert len(found.masks) == len(picked) == text.count("[MASK]")
        for guesses, ids, probabilities in zip(
            found.masks, expected["ids"][0], expected["probabilities"][0], strict=True
        ):
            assert [guess.token for guess in guesses] == [run.tokenizer.decode([token]) for token in ids]
            np.testing.assert_allclose([guess.probability for guess in guesses], probabilities, rtol=1e-4)
        best = [guesses[0].token for guesses in found.masks]
        pieces = [token.removeprefix("##") for token in best]
        assert found.filled == "".join(itertools.chain(*zip(text.split("[MASK]"), [*pieces, ""], strict=True)))


def test_filled_is_the_text_with_nothing_but_its_masks_replaced(masked):
    text = "  An UNKNOWN \u0bb5\u0ba3 wORD,Don't[MASK]touch\tit \ud800 : [MASK]\n[MASK] ."
    found = masked.fill(text)
    assert masked.run.words.unk_id in masked.run.tokens_of(text)  # which decoding would leave out
    first, second, third = (guesses[0].token.removeprefix("##") for guesses in found.masks)
    start = "  An UNKNOWN \u0bb5\u0ba3 wORD,Don't"
    assert found.filled == f"{start}{first}touch\tit \ufffd : {second}\n{third} ."


def test_fill_gives_as_many_guesses_as_asked_for(masked):
    (guesses,) = masked.fill(MASKED[0], top=40).masks
    probabilities = [guess.probability for guess in guesses]
    assert len(guesses) == 40
    assert probabilities == sorted(probabilities, reverse=True)
    everything = masked.fill(MASKED[0], top=masked.run.words.size).masks[0]
    assert sum(guess.probability for guess in everything) == pytest.approx(1, abs=1e-5)
    assert everything[:40] == guesses


@pytest.mark.filterwarnings("ignore:1 of 5 texts are longer")
@pytest.mark.parametrize("model", ["masked", "causal"])
def test_embeddings_depend_on_neither_padding_nor_neighbours(request, model):
    model = request.getfixturevalue(model)
    run = model.run
    encoder = run.objective.encoder(run.variables["params"], run.variables["state"])
    module = run.objective.model.encoder(run.words.size)
    apply = jax.jit(lambda batch: module.apply(encoder, batch, deterministic=True))
    hidden = []
    for text in TEXTS:
        tokens = run.tokenizer(text, add_special_tokens=False)["input_ids"][:30]
        batch = alone([run.words.cls_id, *tokens, run.words.sep_id])
        hidden.append(np.asarray(apply(batch))[0])
    expected = {
        "mean": np.stack([x.mean(0) for x in hidden]),
        "first": np.stack([x[0] for x in hidden]),
        "last": np.stack([x[-1] for x in hidden]),
    }
    expected["own"] = expected["mean" if model.verbs[0] == "fill" else "last"]
    if model.verbs[0] == "generate":
        del expected["first"]  # sees nothing of the text
        with pytest.raises(UserError, match=r"^pool is 'first', but the first token of a causal model sees no other"):
            model.embed(TEXTS, pool="first")
    for pool, vectors in expected.items():
        found = model.embed(TEXTS, pool=pool, normalise=False)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, vectors, atol=1e-5)
    again = model.embed(TEXTS[::-1], normalise=False, batch_size=2)[::-1]
    np.testing.assert_allclose(again, expected["mean"], atol=1e-5)
    unit = expected["mean"] / np.linalg.norm(expected["mean"], axis=1, keepdims=True)
    np.testing.assert_allclose(model.embed(TEXTS), unit, atol=1e-5)
    np.testing.assert_allclose(model.embed(TEXTS[1]), unit[1], atol=1e-5)


def test_few_shapes_are_compiled(trained):
    from sslx.inference.embed import Embed

    model = sslx.load(trained("bert_mlm"))
    draw = np.random.default_rng(0)
    for _ in range(12):
        size = int(draw.integers(1, 9))
        model.embed(["a " * int(count) for count in draw.integers(1, 30, size)], batch_size=8)
    # 16 or 32 tokens; 1, 2, 4 or 8 rows.
    assert model._answerer.compiled(Embed())._cache_size() <= 8


def test_texts_that_are_too_long_are_cut_and_counted(masked):
    long = "Return the value. " * 30
    with pytest.warns(UserWarning, match="1 of 3 texts are longer than the 32 tokens"):
        found = masked.embed([long, *TEXTS[:2]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masked.embed(TEXTS[:2])
    ids = masked.run.tokens_of(long)[:30]
    np.testing.assert_allclose(masked.embed(masked.run.tokenizer.decode(ids)), found[0], atol=1e-5)
    with pytest.warns(UserWarning, match="1 of 1"):
        assert masked.fill("[MASK] " + long).tokens_left_out == len(masked.run.tokens_of(long)) + 1 - 30
    with pytest.raises(InputError, match="1 of 2 masks stand beyond the 30 tokens it can see"):
        masked.fill("[MASK] " + long + " [MASK]")


@pytest.mark.filterwarnings("ignore:1 of . continuations")
def test_greedy_generation_is_that_of_the_sampler_without_padding(causal):
    run = causal.run
    found = causal.generate([*TEXTS[:3], ""], new_tokens=12, temperature=0.0)
    for text, one in zip([*TEXTS[:3], ""], found, strict=True):
        tokens = [run.words.cls_id, *run.tokenizer(text, add_special_tokens=False)["input_ids"]]
        new = generate(
            run.objective.model,
            run.words.size,
            run.variables["params"]["encoder"],
            right_aligned(jnp.array([tokens]), jnp.array([len(tokens)]), len(tokens)),
            row_keys(jax.random.key(0), jnp.zeros(1, int)),
            new_tokens=12,
            sampling=Sampling(temperature=0.0),
            end_id=run.words.sep_id,
            forbidden=run.objective.never_drawn,
        )[0].tolist()
        assert one.ended == (run.words.sep_id in new)
        end = new.index(run.words.sep_id) if one.ended else None
        assert one.generated == run.tokenizer.decode(new[:end])


@pytest.mark.filterwarnings("ignore:1 of . continuations")
def test_samples_depend_on_the_seed_and_not_on_the_batch(causal):
    options = dict(new_tokens=8, temperature=1.0)
    together = causal.generate(TEXTS[:3], **options)
    assert causal.generate(TEXTS[:3], batch_size=1, **options) == together
    assert causal.generate(TEXTS[:3], seed=1, **options) != together
    same = causal.generate(["a", "a"], **options)
    assert same[0] != same[1]


def test_prompts_beyond_the_positions_are_refused(trained, causal, tmp_path):
    from dataclasses import replace

    from sslx.inference.model import Model

    model = replace(causal.run.objective.model, positions="learned", max_length=64)
    learned = Model(replace(causal.run, objective=replace(causal.run.objective, model=model)))
    prompt = "a " * 10
    count = 1 + len(causal.run.tokens_of(prompt))
    new = 32 - count + 1  # of rows of 32, which no training goes beyond, though there are 64 positions
    with pytest.raises(InputError, match=f"a prompt of {count} tokens and new_tokens={new} are 33 .* at most 32, "):
        learned.generate(["", prompt], new_tokens=new)


def test_rotated_positions_beyond_the_rows_are_told(causal):
    prompt = "a " * 10
    count = 1 + len(causal.run.tokens_of(prompt))
    options = dict(new_tokens=33 - count, temperature=0.0)
    with pytest.warns(UserWarning, match="^1 of 2 continuations go beyond the 32 tokens of the rows"):
        found = causal.generate(["", prompt * 3], **options)
    assert not found[1].ended
    long = 1 + len(causal.run.tokens_of(prompt * 3))
    assert [one.tokens_beyond for one in found] == [0, long + options["new_tokens"] - 32]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert causal.generate(prompt, new_tokens=32 - count).tokens_beyond == 0


def test_classify_gives_the_softmax_of_the_logits(classifier, trained):
    run = classifier.run
    params = read_variables(trained("finetune/text_classification"), run.step)["params"]
    names = json.loads((trained("finetune/text_classification") / "labels.json").read_text())
    for text, found in zip(TEXTS[:2], classifier.classify(TEXTS[:2]), strict=True):
        tokens = run.tokenizer(text)["input_ids"]
        logits = np.float64(run.objective.module.apply({"params": params}, alone(tokens), deterministic=True))[0]
        expected = np.exp(logits) / np.exp(logits).sum()
        assert sorted(found.probabilities) == sorted(names)
        np.testing.assert_allclose([found.probabilities[name] for name in names], expected, rtol=1e-4)
        assert found.label == names[int(expected.argmax())] == next(iter(found.probabilities))


def test_a_task_answers_with_its_best_checkpoint(tiny_config, tmp_path):
    from sslx.session import train

    changes = {
        "init": "scratch",
        "steps": 6,
        "eval.every_steps": 2,
        "checkpoint.every_steps": 2,
        "optimizer.name": "adamw",
    }
    # Falling weights would be worse at every step: with so high a rate the first evaluation stays best.
    changes |= {"checkpoint.best_metric": "eval/loss", "checkpoint.best_mode": "max", "checkpoint.keep": 2}
    written = tiny_config("finetune/text_classification", changes).to_dict()
    train(written, tmp_path / "run", part="task", tokenizer=None, title="test")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    best = max(losses, key=losses.get)
    before = sorted(tmp_path.rglob("*"))
    assert sslx.load(tmp_path / "run").run.step == best
    assert best != 6
    newest = sslx.load(tmp_path / "run", step=6)
    assert newest.run.step == 6
    expected = read_variables(tmp_path / "run", 6)["params"]["head"]["kernel"]
    np.testing.assert_array_equal(newest.run.variables["params"]["head"]["kernel"], expected)
    params = read_variables(tmp_path / "run", best)["params"]
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), params)
    taken, notes = load_encoder(shapes, open_start(tmp_path / "run"))  # config.init of another run takes the same
    jax.tree.map(np.testing.assert_array_equal, taken["encoder"], params["encoder"])
    assert notes == [f"config.init {tmp_path / 'run'}: a run of a task; its checkpoint of step {best} is taken"]
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="no checkpoint of step 5; it has "):
        sslx.load(tmp_path / "run", step=5)


def test_pretraining_answers_with_its_newest_checkpoint(masked, trained):
    assert masked.run.step == saved_steps(trained("bert_mlm") / "checkpoints")[-1] == 8


def test_what_cannot_be_is_said_in_a_line(masked, causal, classifier, tmp_path):
    assert masked.verbs == ("fill", "embed")
    assert causal.verbs == ("generate", "embed")
    assert classifier.verbs == ("classify", "embed")
    cases = {
        r"bert_mlm is a run of mlm and cannot generate; it can fill, embed": lambda: masked.generate("a"),
        r"a run of clm and cannot fill; it can generate, embed": lambda: causal.fill("[MASK]"),
        r"input 1: no \[MASK\] in the text 'nothing'": lambda: masked.fill(["[MASK]", "nothing"]),
        r"input 0: there is no token in the text ''": lambda: masked.embed(""),
        r"input 1: there is no token in the text ' '": lambda: classifier.classify(["a", " "]),
        r"input 1: expected a text, got int": lambda: masked.embed(["a", 3]),
        r"unknown pool 'men'; did you mean 'mean'": lambda: masked.embed("a", pool="men"),
        r"top is 0": lambda: masked.fill("[MASK]", top=0),
        r"top is 99999; expected at most 512": lambda: masked.fill("[MASK]", top=99999),
        r"new_tokens is 0": lambda: causal.generate("a", new_tokens=0),
        r"temperature is -1": lambda: causal.generate("a", temperature=-1.0),
        r"temperature is nan; expected 0 \(greedy\) or a": lambda: causal.generate("a", temperature=float("nan")),
        r"temperature is inf": lambda: causal.generate("a", temperature=float("inf")),
        r"top_p is nan": lambda: causal.generate("a", top_p=float("nan")),
        r"batch_size is 0": lambda: masked.embed("a", batch_size=0),
        r"no run in": lambda: sslx.load(tmp_path / "nothing"),
        # Of another type.
        r"^expected a text or a list of them, got None$": lambda: masked.fill(None),
        r"^expected a text or a list of them, got int$": lambda: masked.embed(3),
        r"^expected a text or a list of them, got dict$": lambda: masked.embed({"text": "a"}),
        r"^expected a text or a list of them, got bytes$": lambda: classifier.classify(b"a"),
        r"^input 1: expected a text, got None$": lambda: classifier.classify(["a", None]),
        r"^input 0: expected a text or a pair of texts, got a list of 3$": lambda: classifier.classify([["a"] * 3]),
        r"^input 0: expected a text or a pair of texts, got a tuple of 1$": lambda: classifier.classify(("a",)),
        r"^top is 2.5; expected int$": lambda: masked.fill("[MASK]", top=2.5),
        r"^top is True; expected int$": lambda: masked.fill("[MASK]", top=True),
        r"^new_tokens is None; expected int$": lambda: causal.generate("a", new_tokens=None),
        r"^temperature is 'warm'; expected float$": lambda: causal.generate("a", temperature="warm"),
        r"^pool is 1; expected str$": lambda: masked.embed("a", pool=1),
        r"^normalise is 'no'; expected bool$": lambda: masked.embed("a", normalise="no"),
        r"^batch_size is '8'; expected int$": lambda: masked.embed("a", batch_size="8"),
        r"^run is None; expected the folder of a run": lambda: sslx.load(None),
        r"^run is 3; expected the folder of a run": lambda: sslx.load(3),
        r"^step is 'best'; expected int$": lambda: sslx.load(tmp_path, step="best"),
    }
    for expected, call in cases.items():
        with pytest.raises(UserError, match=expected):
            call()


def test_many_texts_may_be_any_list(masked, causal, classifier):
    expected = masked.embed(TEXTS[:2])
    for texts in (tuple(TEXTS[:2]), np.array(TEXTS[:2]), iter(TEXTS[:2])):
        np.testing.assert_array_equal(masked.embed(texts), expected)
    assert masked.fill([]) == masked.fill(()) == classifier.classify([]) == classifier.classify(()) == []
    assert masked.fill(MASKED[0], top=np.int64(3)) == masked.fill(MASKED[0], top=3)
    with warnings.catch_warnings(action="ignore"):
        assert causal.generate("a", temperature=0) == causal.generate("a", temperature=0.0)


@pytest.mark.parametrize(("model", "pools"), {"masked": ("mean", "first", "last", "own"), "causal": ("own",)}.items())
def test_no_texts_are_no_vectors_of_the_width(request, model, pools):
    for pool in pools:
        found = request.getfixturevalue(model).embed([], pool=pool)
        assert (found.shape, found.dtype) == ((0, 32), np.float32)


def test_a_run_without_what_it_needs_is_refused(trained, tmp_path):
    config = (trained("bert_mlm") / "config.json").read_text()
    for name, change in {"fresh": {}, "outside": {"name": "outside_the_tree:Objective"}, "bare": {}}.items():
        written = json.loads(config)
        written["pretext"] |= change
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"no checkpoint in .*fresh"):
        sslx.load(tmp_path / "fresh")
    for name in ("outside", "bare"):
        (tmp_path / name / "checkpoints").symlink_to(trained("bert_mlm") / "checkpoints")
    with pytest.raises(UserError, match="no module named 'outside_the_tree'"):
        sslx.load(tmp_path / "outside")
    with pytest.raises(UserError, match="has no tokenizer/; expected the folder of a run on text"):
        sslx.load(tmp_path / "bare")


def test_a_run_of_an_objective_from_outside_the_tree(trained, tmp_path, monkeypatch):
    (tmp_path / "own_objective.py").write_text(
        "from sslx.objective import Objective\n"
        "from sslx.pretext.mlm import MaskedLanguageModel\n\n"
        "class Own(MaskedLanguageModel):\n"
        "    pass\n\n"
        "class NeedsItsData(MaskedLanguageModel):\n"
        "    restored = classmethod(Objective.restored.__func__)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for cls in ("Own", "NeedsItsData"):
        run = tmp_path / cls
        run.mkdir()
        for name in ("checkpoints", "tokenizer"):
            (run / name).symlink_to(trained("bert_mlm") / name)
        written = json.loads((trained("bert_mlm") / "config.json").read_text())
        written["pretext"]["name"] = f"own_objective:{cls}"
        (run / "config.json").write_text(json.dumps(written))
    own = sslx.load(tmp_path / "Own")
    assert own.fill(MASKED[0]) == sslx.load(trained("bert_mlm")).fill(MASKED[0])
    with pytest.raises(UserError, match="NeedsItsData cannot be used without its data"):
        sslx.load(tmp_path / "NeedsItsData")
