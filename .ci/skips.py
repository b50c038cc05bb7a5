"""Fail if a test was skipped for a reason that should not exist where everything is installed.

Prints nothing when all is well, so that the test runner's own summary closes the log.
"""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def unexpected(results: Path, *, has_data: bool) -> list[str]:
    """The skipped tests of a JUnit file, with their reasons, but for those that are allowed to be skipped.

    Args:
        has_data: whether the published items lie beside the repository; else their tests may be skipped.
    """
    allowed = ["needs a GPU"] if has_data else ["needs a GPU", "RLCausal items", "Cranfield"]
    found = []
    for case in ET.parse(results).iter("testcase"):
        for skip in case.findall("skipped"):
            reason = skip.get("message") or ""
            if skip.get("type") != "pytest.xfail" and not any(text in reason for text in allowed):
                found.append(f"{case.get('classname')}.{case.get('name')}: {reason}")
    return found


if __name__ == "__main__":
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    problems = unexpected(Path(sys.argv[1]), has_data=data.is_dir())
    for problem in problems:
        print(f"skipped here, and should not be: {problem}", file=sys.stderr)
    raise SystemExit(bool(problems))
