"""Make tests/goldens/data from a full folder of goldens: `python tests/goldens/_make_subset.py FOLDER`.

Takes only what came out of official code under the Apache or MIT licence; see data/README.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

# file -> (repositories whose results may be carried, beginnings of their cases; "" is all)
TAKEN = {
    "pooling": ({"mu-cai/matryoshka-mm", "LLaVA-VL/LLaVA-NeXT"}, ("m3_", "llava_")),
    "pyramiddrop": ({"Cooperx521/PyramidDrop"}, ("",)),
    "tokencarve": ({"ShawnTan86/TokenCarve"}, ("",)),
    "visionzip": ({"dvlab-research/VisionZip"}, ("",)),
}


def main(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for name, (repositories, beginnings) in TAKEN.items():
        meta = json.loads((source / f"{name}.json").read_text())
        meta["official"] = [entry for entry in meta["official"] if entry["repo"] in repositories]
        meta["cases"] = {case: about for case, about in meta["cases"].items() if case.startswith(beginnings)}
        with np.load(source / f"{name}.npz", allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files if key.split("/")[0] in meta["cases"]}
        (target / f"{name}.json").write_text(json.dumps(meta, indent=1) + "\n")
        np.savez_compressed(target / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent / "data")
