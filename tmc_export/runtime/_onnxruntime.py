"""Graphs on onnxruntime: on its CPU provider, or wholly on a GPU with another one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from operator import is_not, itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import onnxruntime as ort

from tmc_export.bundle.read import path_in
from tmc_export.core.errors import BundleError, ResourceError, RuntimeInputError
from tmc_export.runtime._backend import PROVIDERS, BackendOptions, Graph, Held, Outputs
from tmc_export.runtime._fp8 import FP8, as_fp8
from tmc_export.runtime._fp8 import run as run_codes
from tmc_export.runtime._host import HostMemory
from tmc_export.runtime._malloc import give_back_large_blocks, large_blocks_apart
from tmc_export.runtime._mapped import MappedWeights, SharedWeights
from tmc_export.runtime._token_rows import TokenRows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["OnnxRuntimeBackend"]


_Given = TypeVar("_Given")

_FILLED = "slots."
"""Outputs of this prefix are inputs `past_key_values.*` with a row written; they may have their memory."""


class _OrtGraph:
    """A session.

    Args:
        session: the session.
        file: its file below the bundle, for messages.
        weights: what the session reads in place, which must live as long, and what it holds itself.
        after: called after each run.
    """

    def __init__(
        self, session: ort.InferenceSession, file: str, weights: SharedWeights | None = None, after: Callable[[], None] | None = None
    ) -> None:
        self._session, self._file, self._weights, self._after = session, file, weights, after
        self.inputs = tuple(i.name for i in session.get_inputs())
        outputs = [o.name for o in session.get_outputs()]
        self._codes = any(value.type == FP8 for value in (*session.get_inputs(), *session.get_outputs()))
        self._outputs = [name for name in outputs if not name.startswith(_FILLED)]
        self._filled = {name.replace(_FILLED, "past_key_values.", 1): name for name in outputs if name.startswith(_FILLED)}
        self._read: Callable[[Mapping[str, Held]], Sequence[Held]] = (
            itemgetter(*self.inputs) if len(self.inputs) > 1 else lambda feed: [feed[name] for name in self.inputs]
        )
        self._step: _Step | None = None

    def run(self, feed: Mapping[str, Held]) -> dict[str, Array]:
        """Run once; arrays are read in place.

        Raises:
            ResourceError: not enough memory to run it.
            BundleError: onnxruntime gives up on it for another reason.
        """
        wanted = {name: feed[name] for name in self.inputs}
        names = [*self._outputs, *self._filled.values()]
        found = self._guarded(self._run, names, wanted)
        for name in self._filled.values():  # the row that was written, as the other phases return it
            row = int(np.asarray(feed["past_valid"]).sum())
            found[name.replace(_FILLED, "present.", 1)] = found.pop(name)[:, :, row : row + 1]
        return found

    def relay(self, feed: Mapping[str, Held], fetch: Collection[str]) -> Outputs:
        """Run once; all outputs are arrays. See `Graph.relay` and `run`."""
        found = self.run(feed)
        return Outputs(found, found)

    def step(self, feed: Mapping[str, Held], fetch: Collection[str]) -> Outputs:
        """Run once, with the new rows written into the feed's `past_key_values.*` where the graph can; see `Graph.step`.

        Raises:
            ResourceError: not enough memory to run it.
            BundleError: onnxruntime gives up on it for another reason.
        """
        return self._guarded(self._advance, self._read(feed))

    def _run(self, names: Sequence[str], feed: Mapping[str, Any]) -> dict[str, Array]:
        if self._codes:
            return run_codes(self._session, names, feed)
        return dict(zip(names, self._session.run(names, feed), strict=True))

    def _advance(self, arrays: Sequence[Any]) -> Outputs:
        if self._step is None:
            self._step = _Step(self._session, self._filled, self._outputs)
        self._step.run(arrays)
        return self._step.given

    @property
    def copies(self) -> bool:
        """Whether the session, made where memory is tight, holds weights of its own."""
        return self._weights is not None and self._weights.others > 0

    def _guarded(self, work: Callable[..., _Given], *given: Any) -> _Given:
        """Do what onnxruntime does, then what follows a run; a function, because a generator is felt between two tokens."""
        try:
            found = work(*given)
            if self._after is not None:
                self._after()
        except BundleError:
            raise
        except Exception as error:  # onnxruntime raises classes of its own C++ module that share no documented base
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            if isinstance(error, MemoryError) or "alloc" in said.lower():
                raise ResourceError(f"not enough memory to run {self._file}: {said}; free memory or build smaller inputs") from error
            raise BundleError(f"onnxruntime {ort.__version__} failed in {self._file}: {said}; verify the bundle") from error
        return found


_TYPES = {"float": np.float32, "float16": np.float16, "int64": np.int64, "bool": np.bool_, "float8e4m3fn": np.uint8}


class _Step:
    """A binding that stays from token to token.

    Inputs that are the same array are bound once; filled slots have their inputs' memory; other outputs have arrays of the binding, which
    the next run overwrites. On a GPU onnxruntime copies an input when it is bound, so that all are bound before each run. *Not run.*

    Attributes:
        given: these arrays.
    """

    def __init__(self, session: ort.InferenceSession, filled: Mapping[str, str], outputs: Sequence[str]) -> None:
        self._session, self._filled = session, filled
        self._copies = session.get_providers() != [PROVIDERS["cpu"]]
        self._inputs = [value.name for value in session.get_inputs()]
        self._codes = frozenset(i.name for i in session.get_inputs() if i.type == FP8)
        self._binding = session.io_binding()
        self._bound: list[object] = [None] * len(self._inputs)
        arrays: dict[str, Array] = {}
        for output in session.get_outputs():
            if output.name in outputs:
                array = np.zeros(output.shape, _TYPES[output.type.removeprefix("tensor(").removesuffix(")")])
                self._binding.bind_ortvalue_output(output.name, _in_place(output.name, array, output.type == FP8))
                arrays[output.name] = array
        self.given = Outputs(arrays, arrays)

    def run(self, arrays: Sequence[Any]) -> None:
        """Run with the session's inputs in their order."""
        if self._copies or any(map(is_not, arrays, self._bound)):
            for index, array in enumerate(arrays):
                if self._copies or self._bound[index] is not array:
                    self._bind(index, array)
        self._session.run_with_iobinding(self._binding)

    def _bind(self, index: int, array: Array) -> None:
        name = self._inputs[index]
        value = _in_place(name, array, name in self._codes)
        self._bound[index] = None
        self._binding.bind_ortvalue_input(name, value)
        if name in self._filled:
            self._binding.bind_ortvalue_output(self._filled[name], value)
        self._bound[index] = array  # last: an interrupt leaves it to be bound again


def _in_place(name: str, array: Array, fp8: bool = False) -> ort.OrtValue:
    """The array as onnxruntime sees it, in the same memory."""
    value = as_fp8(name, array) if fp8 else ort.OrtValue.ortvalue_from_numpy(array)
    if value.data_ptr() != array.ctypes.data:
        raise ValueError(f"{name} was copied, so that what changes in place would not be seen")
    return value


class OnnxRuntimeBackend(HostMemory):
    """Opens one session per graph, at first use.

    Args:
        folder: the bundle.
        options: see `BackendOptions`.

    Raises:
        RuntimeInputError: the installed onnxruntime lacks the provider.
    """

    name = "onnxruntime"

    def __init__(self, folder: Path, options: BackendOptions) -> None:
        self._folder = folder
        self._options = options
        self._provider = PROVIDERS[options.provider]
        if self._provider not in (here := ort.get_available_providers()):
            raise RuntimeInputError(
                f"onnxruntime {ort.__version__} has no {self._provider} (it has {', '.join(here)}); "
                "install an onnxruntime that has it, such as onnxruntime-gpu, or use --provider cpu"
            )
        self._graphs: dict[str, _OrtGraph] = {}
        self._tables: dict[str, TokenRows] = {}
        self._mapped = MappedWeights()
        self._phase: str | None = None
        if options.memory_tight and options.provider == "cpu":
            give_back_large_blocks()

    def graph(self, file: str) -> Graph:
        """Return the graph of a bundle file.

        Raises:
            BundleError: onnxruntime refuses the file, or the provider cannot run all of it.
            ResourceError: not enough memory to load it, or the provider does not start.
        """
        self._enter(file)
        if file not in self._graphs and file not in self._tables and (rows := self._token_rows(file)) is not None:
            self._tables[file] = rows
        return self._tables[file] if file in self._tables else self._session(file)

    def _token_rows(self, file: str) -> TokenRows | None:
        """The token table of a decode step without a session; None where the graph is another, or does more than read a row."""
        if file not in self._options.host or self._options.phases.get(file) != "decode":
            return None
        path = path_in(self._folder, file)
        if (table := self._mapped.table(path)) is None:
            return None
        after = partial(self._mapped.give_back, path) if self._options.memory_tight else None
        return TokenRows(table, file, partial(self._session, file), after)

    def _session(self, file: str) -> _OrtGraph:
        if file not in self._graphs:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            if file not in self._options.spin:
                options.add_session_config_entry("session.force_spinning_stop", "1")
            if self._options.phases.get(file) == "decode":
                # A product and its bias as Gemm, for which one row is flattened and shaped back; of int4 weights the bias joins the product
                options.add_session_config_entry("optimization.disable_specified_optimizers", "MatMulAddFusion")
            if self._options.threads is not None:
                options.intra_op_num_threads = self._options.threads
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(self._options.int4_accuracy))
            path = path_in(self._folder, file)
            weights = self._share(file, path, options)
            model = str(path) if weights is None or weights.model is None else weights.model
            try:
                with large_blocks_apart():
                    session = ort.InferenceSession(model, options, providers=self._providers(file, options))
            except MemoryError as error:
                raise ResourceError(f"not enough memory to load {path}; free memory or compress and quantize more") from error
            except Exception as error:  # onnxruntime raises classes of its own C++ module that share no documented base
                raise BundleError(f"onnxruntime {ort.__version__} cannot load {path}: {str(error).splitlines()[0]}{self._hint}") from error
            self._expect_provider(session, file)
            self._graphs[file] = _OrtGraph(session, file, weights, self._after(file, path, weights))
        return self._graphs[file]

    def _share(self, file: str, path: Path, options: ort.SessionOptions) -> SharedWeights | None:
        """Where memory is tight, let a session read its weights where the file is mapped and keep no memory between runs.

        Codes are packed all the same; see `_mapped.py`.
        """
        if not self._options.memory_tight or self._options.provider != "cpu":
            return None
        shared = self._mapped.of(path, file in self._options.host)
        for name, value in shared.values.items():
            options.add_initializer(name, value)
        if not shared.others:
            options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.qdq_matmulnbits_block_size", "128")  # else a scale per 32 of int8 codes, twice
        if shared.widens:
            # In onnxruntime's own order most weights are widened before the first product. By priority, weights come in the order of their
            # products, unless its fusions, which would be ready after all weights, stand between. Beside codes they must stay: without
            # them codes are widened in every run, and what is float16 there is the head, whose product is the last.
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
            if not shared.codes:
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        if shared.model is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        return shared

    def _after(self, file: str, path: Path, weights: SharedWeights | None) -> Callable[[], None] | None:
        """What follows each run of a graph: of the token table, where memory is tight, no more than its rows is kept."""
        return partial(self._mapped.give_back, path) if weights is not None and file in self._options.host else None

    def _enter(self, file: str) -> None:
        """Where memory is tight, make room for a run.

        Sessions of other phases that hold weights themselves are given back, and loaded when they are needed again. Before many rows the
        pages of mapped files leave, too: activations are largest then, and the head, which an earlier prompt has read, is read last.
        """
        if not self._options.memory_tight:
            return
        phase = self._options.phases.get(file, self._phase)  # a picture, a cut: of none
        if phase != self._phase:
            for other in [f for f, g in self._graphs.items() if g.copies and self._options.phases.get(f, phase) != phase]:
                del self._graphs[other]
        self._phase = phase
        if phase != "decode" or file not in self._options.phases:
            self._mapped.leave()

    def _providers(self, file: str, options: ort.SessionOptions) -> list[str]:
        """Name the providers of a session. But for the token table nothing may be left to the CPU, where it would be slow in silence."""
        if self._options.provider == "cpu" or file in self._options.host:
            return [PROVIDERS["cpu"]]
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        return [self._provider, PROVIDERS["cuda"]] if self._options.provider == "tensorrt" else [self._provider]

    @property
    def _hint(self) -> str:
        if self._options.provider == "cpu":
            return ""
        return f"; {self._provider} must run all of a graph (graphs for runtime: onnxruntime hold its own operators): use --provider cpu"

    def _expect_provider(self, session: ort.InferenceSession, file: str) -> None:
        """Refuse a session that onnxruntime, with no more than a line in its log, made without the provider."""
        if self._options.provider != "cpu" and file not in self._options.host and self._provider not in (has := session.get_providers()):
            raise ResourceError(
                f"{self._provider} does not start here (onnxruntime would use {', '.join(has)}); install its CUDA libraries and a driver, "
                "or use --provider cpu"
            )
