"""Bad input to the command line entries: exit code 2, one line on stderr, and a run folder as it was before.

Every case is a process of its own, in a folder with a tiny corpus and two config files.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
from entries import simulated

REPOSITORY = Path(__file__).resolve().parent.parent

CONFIG = """
from sslx.config import experiment
from sslx.data.text import TextConfig
from sslx.models.bert import BertConfig
from {module} import {cls}

def get_config():
    config = experiment(
        data=TextConfig(source="{source}", seq_len=16, vocab_size=200),
        model=BertConfig(layers=1, width=16, heads=2, mlp_width=32, max_length=32),
        {part}={cls}(),
    )
    config.steps, config.batch_size, config.optimizer.warmup_steps, config.eval.examples = 4, 8, 1, 0
    config.log.every_steps = 1
    return config
"""

CONFIGS = {
    "pretrain.py": CONFIG.format(
        module="sslx.pretext.mlm", cls="MaskedLanguageModelConfig", part="pretext", source="jsonl:corpus.jsonl"
    ),
    "classify.py": CONFIG.format(
        module="sslx.tasks.text_classification", cls="TextClassificationConfig", part="task", source="csv:labels.csv"
    ),
    "syntax.py": "def get_config(:\n",
    "fails.py": "def get_config():\n    return {}['size']\n",
    "nothing.py": "x = 1\n",
    "number.py": "def get_config():\n    return 3\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, made_up_texts):
    """A folder to start in: configs, corpora good and bad, and some files in the way."""
    folder, texts = tmp_path_factory.mktemp("errors"), made_up_texts
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "labels.csv").write_text("text,label\n" + "".join(f"{t},{'ab'[i % 2]}\n" for i, t in enumerate(texts)))
    (folder / "few.jsonl").write_text('{"text": "a few words"}\n' * 5)
    (folder / "with spaces").mkdir()
    (folder / "with spaces" / "my few.jsonl").write_text((folder / "few.jsonl").read_text())
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "body.jsonl").write_text('{"body": "a"}\n{"body": "b"}\n')
    (folder / "empty.txt").write_text("")
    (folder / "latin").mkdir()
    for name in "ab":
        (folder / "latin" / f"{name}.txt").write_bytes("café".encode("latin-1"))
    (folder / "file").write_text("in the way")
    (folder / "no_run").mkdir()
    (folder / "damaged").mkdir()
    (folder / "damaged" / "config.json").write_text('{"steps": ')
    for name, text in CONFIGS.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def entry(entries, folder):
    """Runs an entry in the folder: ``entry("main", "--config=pretrain.py", ...)``."""
    return functools.partial(entries.run, folder=folder)


@pytest.fixture
def refused(entry, folder):
    """Runs an entry that has to refuse, into ``run`` unless told otherwise; returns its one line."""

    def run(module: str, *arguments: str, **more) -> str:
        if module not in ("preview", "bench") and not any(argument.startswith("--workdir") for argument in arguments):
            arguments = (*arguments, "--workdir=run")
        before = everything_in(folder)
        ended = entry(module, *arguments, **more)
        assert ended.stderr.startswith("error: "), ended.stderr
        assert ended.stderr.count("\n") == 1, ended.stderr
        assert ended.code == 2
        assert everything_in(folder) == before
        return ended.stderr.removeprefix("error: ").strip()

    return run


def everything_in(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def check_all(refused, module: str, cases: dict[str, str], *first: str) -> None:
    """Runs a case a line: arguments (separated by two spaces) and a part of the answer; tells of all that fail."""
    failures = []
    for arguments, expected in cases.items():
        try:
            said = refused(module, *first, *filter(None, arguments.split("  ")))
            if expected not in said:
                failures.append(f"{arguments}\n  said:     {said}\n  expected: {expected}")
        except AssertionError as error:
            failures.append(f"{arguments}\n  {error}")
    assert not failures, "\n".join(failures)


def test_arguments_that_name_no_config(refused, folder):
    cases = {
        "": "no config given; expected --config=FILE.py",
        "--config=": "no config file ''",
        "--config=pretrian.py": "no config file 'pretrian.py' in " + f"{folder}; did you mean 'pretrain.py'?",
        "--config  nowhere/a.py": f"no config file 'nowhere/a.py' in {folder}",
        f"--config={folder}/pretrian.py": f"no config file '{folder}/pretrian.py'; did you mean",
        "--config=pretrain.py:base": "pretrain.py takes no argument; given 'base'",
        f"--config={REPOSITORY}/configs/bert_mlm.py:siez=base": "unknown config argument 'siez'",
        "--config=syntax.py": "config file syntax.py: SyntaxError: invalid syntax (syntax.py, line 1)",
        "--config=fails.py": "config file fails.py, line 2: KeyError: 'size'",
        "--config=nothing.py": "nothing.py defines no get_config",
        "--config=number.py": "get_config of number.py returned int; expected a ConfigDict",
        "--config=labels.csv": "config file labels.csv: SyntaxError",
    }
    check_all(refused, "main", cases)


def test_keys_and_values_that_cannot_be(refused):
    cases = {
        "--config.optimiser.name=lamb": "unknown key config.optimiser; did you mean 'optimizer'?",
        "--config.optimizer.learning_rat=1": "unknown key config.optimizer.learning_rat; did you mean 'learning_rate'?",
        "--noconfig.data.lowercas": "unknown key config.data.lowercas; did you mean 'lowercase'?",
        "--config.steps.x=1": "unknown key config.steps.x; config.steps is a single value, 4",
        "--config.optimizer=lamb": "config.optimizer is a group; give one of its values: config.optimizer.beta1",
        "--wrkdir=run": "Unknown command line flag 'wrkdir'. Did you mean: workdir",
        "more": "unexpected argument 'more'",
        "--config.steps=many": "flag --config.steps=many: expected a whole number",
        "--config.steps=1.5": "expected a whole number",
        "--config.steps=None": "config.steps is None; expected int",
        "--config.steps=0": "config.steps is 0; expected at least 1",
        "--workdir=run  --config.steps": "Missing value for flag --config.steps",
        "--config.data.lowercase=maybe": "expected true or false",
        "--config.optimizer.clip_norm=None  --config.steps  0": "config.steps is 0",  # the None alone is welcome
        "--config.optimizer.learning_rate=-1": "learning_rate is -1.0; expected more than 0",
        "--config.optimizer.warmup_steps=-1": "warmup_steps is -1; expected at least 0",
        "--config.optimizer.warmup_steps=4": "warmup_steps 4 is not below the schedule's 4 steps",
        "--config.optimizer.name=adam": "unknown config.optimizer.name 'adam'; did you mean 'adamw'?",
        "--config.optimizer.schedule=cosin": "did you mean 'cosine'?",
        "--config.optimizer.freeze=nope": "freeze pattern 'nope' matches no parameter",
        "--config.optimizer.freeze=(": "is no regular expression",
        "--config.checkpoint.best_metric=eval/acc": "did you mean 'eval/accuracy'?",
        "--config.checkpoint.best_mode=least": "valid: max, min",
        "--config.pretext.name=mlmm": "unknown config.pretext.name 'mlmm'; did you mean 'mlm'?",
        "--config.pretext.name=nowhere:Class": "no module named 'nowhere'",
        "--config.pretext.name=json:JSONDecode": "json has no 'JSONDecode'; did you mean 'JSONDecoder'?",
        "--config.pretext.name=json:JSONDecoder": "is no sslx.objective.Objective",
        "--config.pretext.mask_ratio=1.5": "mask_ratio is 1.5",
        "--config.model.name=brt": "unknown config.model.name 'brt'; did you mean 'bert'?",
        "--config.model.norm=layer": "unknown config.model.norm 'layer'",
        "--config.model.heads=3": "width 16 is not divisible by config.model.heads 3; nearest that divide it: 2, 4",
        "--config.model.heads=0": "config.model.heads is 0; expected at least 1",
        "--config.model.dropout=2": "config.model.dropout is 2.0",
        "--config.data.seq_len=64": "seq_len 64 is longer than config.model.max_length 32",
        "--config.init=nowhere": "no run in 'nowhere'",
    }
    check_all(refused, "main", cases, "--config=pretrain.py")
    for file in (["--config=pretrain.py"], ["--config", "pretrain.py"]):
        for value in ("--config.steps=1", "--noconfig.data.lowercase"):
            order = f"{value} stands before --config; put --config=pretrain.py first"
            assert refused("main", value, *file) == order


def test_data_that_cannot_be_read(refused, folder):
    cases = {
        "text:missing.txt": "no file matches text:missing.txt",
        "text:nowhere/*.txt": "no file matches text:nowhere/*.txt",
        "csv:label.csv": "did you mean 'labels.csv'?",
        "text:file": "reads only .txt, .jsonl, .parquet files",
        "txt:few.jsonl": "unknown data source 'txt:few.jsonl'; did you mean 'text:GLOB'?",
        "text:empty.txt": "empty.txt is an empty file",
        "text:latin/*.txt": "latin/a.txt: not UTF-8 at byte 3",
        "jsonl:broken.jsonl": "broken.jsonl:2: not JSON",
        "jsonl:body.jsonl": "body.jsonl:1: no field 'text'; valid: body",
        "jsonl:few.jsonl": "smaller batch, or a smaller config.data.seq_len, which makes more rows",
        "jsonl:with spaces/my few.jsonl": "rows, fewer than one batch of config.batch_size=8",
        "jsonl:corpus.jsonl  --config.data.train_split=trian": "no split 'trian'; did you mean 'train'?",
        "jsonl:corpus.jsonl  --config.data.tokenizer=wordpice": "did you mean 'wordpiece'?",
        "jsonl:corpus.jsonl  --config.data.vocab_size=5": "vocab_size=5 is too small",
        "jsonl:corpus.jsonl  --config.data.cache_dir=file": "cannot write the data cache file: ",
    }
    cases = {f"--config.data.source={arguments}": expected for arguments, expected in cases.items()}
    check_all(refused, "main", cases, "--config=pretrain.py")
    argument = f"--config={REPOSITORY}/configs/bert_mlm.py:data=text:{folder}/nowhere/*.txt"
    assert f"no file matches text:{folder}/nowhere/*.txt" in refused("main", argument)


def test_what_the_config_alone_tells_is_told_before_the_data_are_opened(refused):
    cases = {
        "--config.optimizer.warmup_steps=4": "warmup_steps 4 is not below the schedule's 4 steps",
        "--config.optimizer.name=adam": "unknown config.optimizer.name 'adam'",
        "--config.optimizer.freeze=(": "is no regular expression",
        "--config.mesh.data=3": "3 devices; there are 1",
    }
    check_all(refused, "main", cases, "--config=pretrain.py", "--config.data.source=text:missing.txt")
    argument = "--config.batch_size=12"
    more = {"environment": simulated(8)}
    said = refused("main", "--config=pretrain.py", "--config.data.source=text:missing.txt", argument, **more)
    assert "12 does not divide over 8 devices" in said


def test_meshes_and_batches_that_do_not_fit_eight_devices(refused):
    cases = {
        "--config.mesh.data=3": "3 devices; there are 8",
        "--config.mesh.fsdp=3": "8 devices do not divide by 3",
        "--config.mesh.data=0": "expected positive sizes and at most one -1",
        "--config.batch_size=12": "12 does not divide over 8 devices (mesh data x fsdp); nearest that does: 8 or 16",
        "--config.micro_batches=3": "batch_size 8 does not divide into config.micro_batches 3",
        "--config.micro_batches=4": "4 micro-batches of 2 does not divide over 8 devices",
    }

    check_all(functools.partial(refused, environment=simulated(8)), "main", cases, "--config=pretrain.py")


def test_the_wrong_config_or_start_for_an_entry(refused):
    assert "is it one for python -m sslx.finetune?" in refused("main", "--config=classify.py")
    assert "no run in 'no_run'" in refused("preview", "--config=classify.py", "--config.init=no_run")
    assert "empty.txt is an empty file" in refused(
        "preview", "--config=pretrain.py", "--config.data.source=text:empty.txt"
    )
    cases = {
        "--config=pretrain.py  --config.init=scratch": "is it one for python -m sslx.main?",
        "--config=classify.py": "config.init is empty; expected a run folder",
        "--config=classify.py  --config.init=no_run": "no run in 'no_run'",
        "--config=classify.py  --config.init=damaged": "damaged/config.json is damaged",
        "--config=classify.py  --config.init=scratchy": "expected a run folder, 'scratch' or 'scratch:RUN'",
        "--config=classify.py  --config.init=scratch  --config.data.source=jsonl:corpus.jsonl": "has no labels",
        "--config=classify.py  --config.init=scratch  --config.data.label_field=lable": "no field 'lable'",
    }
    check_all(refused, "finetune", cases)
    # A document a row: shorter rows are as few.
    few = "--config.data.train_split=train[:4]  --config.data.eval_split=train[4:]"
    said = refused("finetune", "--config=classify.py", "--config.init=scratch", *few.split("  "))
    assert said.endswith(
        "has 4 rows, fewer than one batch of config.batch_size=8; expected more data or a smaller batch"
    )


def test_flags_of_a_bench_that_cannot_be(refused):
    cases = {
        "--step=3": "Unknown command line flag 'step'. Did you mean: steps",
        "--steps=few": "flag --steps=few: expected a whole number",
        "--warmup=1": "flag --warmup=1: 1 is not integer >= 3",
        "--json=nowhere/a.json": "cannot write nowhere/a.json: no folder nowhere",
        "--json=with spaces": "it is a folder; expected a file, such as with spaces/bench.json",
        "--profile=file": "--profile=file is a file; expected a folder",
        "--compare=missing.json": "cannot read missing.json: No such file or directory",
        "--compare=labels.csv": "labels.csv is no JSON; expected a file that --json has written",
        "--config.model.attention=splsh": "unknown config.model.attention 'splsh'; did you mean 'splash'?",
    }
    check_all(refused, "bench", cases, "--config=pretrain.py")


def test_folders_that_cannot_be_written(refused):
    cases = {
        "--workdir=file": "--workdir=file is a file, expected a folder",
        "--workdir=file/run": "cannot write the run folder file/run: Not a directory",
        "--workdir=/proc/run": "cannot write the run folder /proc/run: ",
    }
    check_all(refused, "main", cases, "--config=pretrain.py")


def test_wandb_that_is_not_installed(refused, folder):
    hidden = "\nimport sys\nsys.modules['wandb'] = None\n"
    (folder / "no_wandb.py").write_text(CONFIGS["pretrain.py"] + hidden)
    assert "pip install 'sslx[wandb]'" in refused("main", "--config=no_wandb.py", "--config.log.wandb=project")


def test_help_tells_the_flags_and_the_values_of_a_config(entry):
    ended = entry("main", "--help")
    assert (ended.code, ended.stderr) == (0, "")
    assert "python -m sslx.main --config=" in ended.stdout
    assert "--workdir=FOLDER" in ended.stdout
    ended = entry("finetune", "--config=classify.py", "--help")
    assert ended.code == 0
    assert "  --config.optimizer.clip_norm=1.0\n" in ended.stdout


def test_a_run_that_another_process_holds(refused, folder):
    (folder / "held").mkdir()
    with filelock.FileLock(folder / "held" / ".lock"):
        said = refused("main", "--config=pretrain.py", "--workdir=held")
    assert said == "another process is training in held; stop it or give another --workdir"


@pytest.fixture
def small_disk(folder):
    """A disk that holds the small files of a run and not its checkpoint."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_that_is_full_in_the_middle_of_training(entry, small_disk):
    ended = entry("main", "--config=pretrain.py", "--workdir=disk/run")
    assert ended.stderr == (
        f"error: cannot write a checkpoint in {small_disk}/run/checkpoints: No space left on device; "
        "no earlier checkpoint\n"
    )
    assert ended.code == 2
    assert list((small_disk / "run" / "checkpoints").iterdir()) == []


def test_a_closed_stdout_changes_no_error():
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "sslx.main", "--config=nowhere.py"]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: no config file 'nowhere.py'")
    assert ended.stderr.count("\n") == 1
