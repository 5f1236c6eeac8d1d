"""Small TFDS datasets on disk, with the features of the real ones, written without TensorFlow and without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds


def write_tfds(
    root: Path, name: str, features: Mapping[str, Any], splits: Mapping[str, Sequence[dict]], version: str = "1.0.0"
) -> None:
    """Writes ``tfds:NAME`` (``dataset`` or ``dataset/config``) under ``root`` as ArrayRecord files."""
    dataset, _, config = name.partition("/")
    folder = Path(root) / name / version
    folder.mkdir(parents=True)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=dataset,
        version=tfds.core.Version(version),
        data_dir=str(folder),
        module_name="none",
        config_name=config or None,
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=8, file_format="array_record")
    writer.initialize_splits(list(splits))
    for split, examples in splits.items():
        writer.add_examples({split: list(examples)})
    writer.close_all()
