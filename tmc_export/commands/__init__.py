"""The verbs of the command line, one per file; each exposes a click command named `command`.

The verb's file may import only the standard library, click and `tmc_export.core` at module level: `tmc-export --help` reads all of them.
"""

from __future__ import annotations

__all__: list[str] = []
