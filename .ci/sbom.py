"""Says what a bill of materials has: `python .ci/sbom.py FILE`, where FILE is CycloneDX in JSON (`make sbom`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def summary(bill: dict[str, Any]) -> str:
    """One line for a bill. Raises ValueError if it is not one of this project, or a component lacks a version."""
    about = bill.get("metadata", {}).get("component", {})
    if bill.get("bomFormat") != "CycloneDX" or about.get("name") != "search-r3":
        raise ValueError("not a CycloneDX bill of search-r3")
    components = bill.get("components", [])
    if bare := [one.get("name", "?") for one in components if not one.get("version")]:
        raise ValueError(f"without a version: {', '.join(bare)}")
    unlicensed = sum(not one.get("licenses") for one in components)
    return f"CycloneDX {bill['specVersion']}: {len(components)} components, {unlicensed} of them state no license"


if __name__ == "__main__":
    try:
        print(f"{sys.argv[1]}: {summary(json.loads(Path(sys.argv[1]).read_text(encoding='utf-8')))}")
    except ValueError as error:
        sys.exit(f"error: {sys.argv[1]}: {error}")
