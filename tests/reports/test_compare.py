"""`report --compare`: where two runs part."""

import json

import pytest

from gpt2_jax import report
from gpt2_jax.config import TrainConfig
from gpt2_jax.config.toml import to_toml
from gpt2_jax.errors import UserError


def write(directory, *rows, **keys):
    directory.mkdir()
    config = TrainConfig(**{"out": str(directory), "steps": 9, "batch_size": 4, **keys})
    (directory / "config.toml").write_text(to_toml(config))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(directory)


def row(step, **values):
    return {"step": step, "tokens": 4 * step, **values}


ROWS = (row(1, loss=3.0), row(2, loss=2.5), row(2, val_loss=2.6, fingerprint="0000000a"), row(3, loss=2.25))


@pytest.mark.parametrize(
    ("others", "line"),
    [
        (
            {},
            "equal     all 5 values of the rows that both have; the whole state is equal, bit for bit, up to update 2",
        ),
        ({3: row(3, loss=2.26)}, "differ    at update 3: loss 2.25 in A, 2.26 in B; the whole state is equal, bit for"),
        (
            {2: row(2, val_loss=2.6, fingerprint="0000000b")},
            "differ    at update 2: fingerprint 0000000a in A, 0000000b in B; no fingerprint is in both before",
        ),
        ({3: row(3, skipped="by skip_updates")}, "differ    at update 3: skipped in B only"),
    ],
)
def test_the_first_difference_is_named(tmp_path, capsys, others, line):
    a = write(tmp_path / "a", *ROWS)
    changed = [others.get(index, old) for index, old in enumerate(ROWS)]
    b = write(tmp_path / "b", *({**one, "tokens_per_second": 5.0} for one in changed), seed=8)
    assert report.main(["--compare", a, b]) == 0
    output = capsys.readouterr().out
    assert line in output
    assert "config    seed: 1337 in A, 8 in B\n" in output


def test_rows_that_no_update_has_in_common_say_nothing(tmp_path, capsys):
    a, b = write(tmp_path / "a", row(1, loss=3.0)), write(tmp_path / "b", row(2, loss=3.0))
    assert report.main(["--compare", a, b]) == 0
    assert "unknown   no update has a row in both\n" in capsys.readouterr().out


def test_a_directory_without_rows_is_one_clear_line(tmp_path):
    a = write(tmp_path / "a", *ROWS)
    with pytest.raises(UserError, match=r"nothing has no metrics.jsonl with rows"):
        report.main(["--compare", a, str(tmp_path / "nothing")])
