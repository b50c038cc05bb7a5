"""Fail if CI skipped a test because of a missing dependency.

Prints nothing on success, so that pytest's summary is the last line of the log.
"""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def unexpected(results: Path, *, has_data: bool) -> list[str]:
    """Return the tests that must not be skipped but were, with the reasons.

    Args:
        results: JUnit XML file of the test run.
        has_data: whether the published items are next to the repository. If not, their tests may be skipped.
    """
    allowed_reasons = ["needs a GPU"]
    if not has_data:
        allowed_reasons += ["RLCausal items", "Cranfield", "../shared/data"]
    problems = []
    for case in ET.parse(results).iter("testcase"):
        for skip in case.findall("skipped"):
            reason = skip.get("message") or ""
            is_allowed = any(allowed in reason for allowed in allowed_reasons)
            if skip.get("type") != "pytest.xfail" and not is_allowed:
                problems.append(f"{case.get('classname')}.{case.get('name')}: {reason}")
    return problems


if __name__ == "__main__":
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    problems = unexpected(Path(sys.argv[1]), has_data=data.is_dir())
    for problem in problems:
        print(f"unexpectedly skipped: {problem}", file=sys.stderr)
    raise SystemExit(bool(problems))
