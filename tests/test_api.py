"""The public names and their arguments are those of `api_snapshot.txt`: a change of them is seen in review."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "scripts"))
import api_snapshot  # noqa: E402


def test_public_names_and_signatures():
    expected = (HERE / "api_snapshot.txt").read_text().splitlines()
    found = api_snapshot.lines()
    gone = [line for line in expected if line not in set(found)]
    new = [line for line in found if line not in set(expected)]
    assert found == expected, (
        "The public names or their arguments have changed. If this is meant, run `make api` and commit the file.\n"
        + "\n".join([f"- {line}" for line in gone] + [f"+ {line}" for line in new])
    )
