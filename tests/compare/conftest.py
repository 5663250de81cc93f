"""One finished compare for all tests that read it."""

import pytest

from recbole_mm.cli import main

QUICK = ["--epochs=1", "--MAX_ITEM_LIST_LENGTH=10", "--train_batch_size=512"]


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """Two rows that finish and one that fails; MUFASA needs features, and two items have none."""
    out = tmp_path_factory.mktemp("compare")
    file = out / "v.yaml"
    file.write_text("greedy: {min_coverage: 1.0}\n")
    arguments = [
        *("compare", "--models=Pop,SASRecMM,MUFASA+greedy", "--datasets=tiny", "--seeds=1"),
        *(f"--out={out}", f"--variants={file}", "--jobs=2", *QUICK),
        "--missing_modality=text:0,100",
    ]
    assert main(arguments) == 1  # a cell failed
    return out, arguments
