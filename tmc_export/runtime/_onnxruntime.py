"""Graphs on onnxruntime's CPU provider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from tmc_export.bundle.read import path_in
from tmc_export.core.errors import BundleError, ResourceError
from tmc_export.runtime._backend import BackendOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["OnnxRuntimeBackend"]


class _OrtGraph:
    def __init__(self, session: ort.InferenceSession, file: str) -> None:
        self._session, self._file = session, file
        self.inputs = tuple(i.name for i in session.get_inputs())
        self._outputs = [o.name for o in session.get_outputs()]

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; arrays are read in place.

        Raises:
            ResourceError: not enough memory to run it.
            BundleError: onnxruntime gives up on it for another reason.
        """
        wanted = {name: feed[name] for name in self.inputs}
        try:
            values = self._session.run(self._outputs, wanted)
        except Exception as error:  # onnxruntime raises classes of its own C++ module that share no documented base
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            if isinstance(error, MemoryError) or "alloc" in said.lower():
                raise ResourceError(f"not enough memory to run {self._file}: {said}; free memory or build smaller inputs") from error
            raise BundleError(f"onnxruntime {ort.__version__} failed in {self._file}: {said}; verify the bundle") from error
        return dict(zip(self._outputs, values, strict=True))


class OnnxRuntimeBackend:
    """Opens one session per graph, at first use.

    Args:
        folder: the bundle.
        options: see `BackendOptions`.
    """

    name = "onnxruntime"

    def __init__(self, folder: Path, options: BackendOptions) -> None:
        self._folder = folder
        self._options = options
        self._graphs: dict[str, _OrtGraph] = {}

    def graph(self, file: str) -> _OrtGraph:
        """Return the graph of a bundle file.

        Raises:
            BundleError: onnxruntime refuses the file.
            ResourceError: not enough memory to load it.
        """
        if file not in self._graphs:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            # A session's threads go on spinning after a run and would take the cores from the next session's: 20 % of a compressed prefill.
            options.add_session_config_entry("session.force_spinning_stop", "1")
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(self._options.int4_accuracy))
            if self._options.memory_tight:
                options.add_session_config_entry("session.disable_prepacking", "1")
            if self._options.threads is not None:
                options.intra_op_num_threads = self._options.threads
            path = path_in(self._folder, file)
            try:
                session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            except MemoryError as error:
                raise ResourceError(f"not enough memory to load {path}; free memory or compress and quantize more") from error
            except Exception as error:  # onnxruntime raises classes of its own C++ module that share no documented base
                raise BundleError(f"onnxruntime {ort.__version__} cannot load {path}: {str(error).splitlines()[0]}") from error
            self._graphs[file] = _OrtGraph(session, file)
        return self._graphs[file]
