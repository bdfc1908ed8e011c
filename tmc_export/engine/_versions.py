"""What each standard TensorRT takes: one row per release that a JetPack brings. From NVIDIA's documents and sources; not run."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tmc_export.core.errors import LegalityError
from tmc_export.engine._proto import GraphFacts

__all__ = ["DIFFERENCES", "VERSIONS", "Difference", "TensorRTVersion", "check_graph", "parse_version", "version_for"]

_ONNX_23 = frozenset({"Attention", "RMSNormalization", "RotaryEmbedding", "Swish", "TensorScatter"})

_MARKED_UNSUPPORTED = frozenset(
    "AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow CenterCropPad Col2Im Compress "
    "ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear HammingWindow HannWindow ImageDecoder MatMulInteger MaxRoiPool "
    "MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QLinearConv "
    "QLinearMatMul RegexFullMatch STFT SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength "
    "SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer StringSplit TfIdfVectorizer Unique".split()
)
"""Marked N in docs/operators.md of onnx/onnx-tensorrt@96e78110 (10.1 GA), the newest table that was read; later releases may take some."""
_DOMAINS = ("trt",)
"""Domains besides ONNX's own whose operators TensorRT's parser knows."""


@dataclass(frozen=True)
class TensorRTVersion:
    """One release line.

    Attributes:
        minimum: (major, minor) from which the row holds, until the next row.
        jetpack: JetPack releases that bring it.
        opset: highest default-domain opset taken as safe; a higher one is a warning, the device decides.
        strongly_typed_flag: `STRONGLY_TYPED` must be given to `create_network` and `--stronglyTyped` to trtexec (11 has no other kind).
        stream_writer: Python has `build_serialized_network_to_stream` (since 10.13); before, the whole plan is held in memory.
        decompose: operators its parser lacks, to be written in simpler ones before.
    """

    minimum: tuple[int, int]
    jetpack: str
    opset: int
    strongly_typed_flag: bool
    stream_writer: bool
    decompose: frozenset[str]

    @property
    def name(self) -> str:
        """`"10.3"`."""
        return f"{self.minimum[0]}.{self.minimum[1]}"


VERSIONS = (
    TensorRTVersion((10, 3), "6.1, 6.2", 20, True, False, _ONNX_23),
    TensorRTVersion((10, 13), "7.0, 7.1", 20, True, True, _ONNX_23),
    TensorRTVersion((10, 14), "none", 24, True, True, _ONNX_23),
    TensorRTVersion((10, 15), "7.2 (10.16)", 24, True, True, frozenset()),
    TensorRTVersion((11, 0), "7.2.2 and later (11.4)", 24, False, True, frozenset()),
)


@dataclass(frozen=True)
class Difference:
    """A name that is used and that not every TensorRT has.

    Attributes:
        name: dotted, from the module on.
        stubs: `tensorrt-stubs` (10.13) has it; else `_types` declares it.
        rtx: TensorRT-RTX 1.7 has it.
        standard: releases of standard TensorRT that have it, as far as known.
    """

    name: str
    stubs: bool
    rtx: bool
    standard: str


DIFFERENCES = (
    Difference("ComputeCapability", False, True, "none"),
    Difference("IBuilderConfig.num_compute_capabilities", False, True, "none"),
    Difference("IBuilderConfig.set_compute_capability", False, True, "none"),
    Difference("DynamicShapesKernelSpecializationStrategy", False, True, "none"),
    Difference("IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy", False, True, "none"),
    Difference("IExecutionContext.is_stream_capturable", False, True, "none"),
    Difference("ICudaEngine.create_runtime_config", True, True, "not 10.3"),
    Difference("Builder.build_serialized_network_to_stream", True, True, "10.13 on"),
    Difference("NetworkDefinitionCreationFlag.STRONGLY_TYPED", True, True, "below 11"),
)
"""Looked for before they are used, or used only where they are. `tests/engine/test_types.py` compares the table with code, stubs and
TensorRT-RTX."""


def parse_version(text: str) -> tuple[int, int]:
    """Read major and minor: `"10.3.0.30"` and trtexec's `"100300"` are both `(10, 3)`.

    Raises:
        LegalityError: the text holds no version.
    """
    if re.fullmatch(r"\d{6}", text):
        return int(text[:2]), int(text[2:4])
    found = re.match(r"(\d+)\.(\d+)", text)
    if not found:
        raise LegalityError(f"'{text}' is no TensorRT version; write it as 10.3 or 10.13.2")
    return int(found[1]), int(found[2])


def version_for(text: str) -> TensorRTVersion:
    """Return the row for an exact version.

    Raises:
        LegalityError: older than the oldest row (JetPack 5 and before), or no version.
    """
    wanted = parse_version(text)
    rows = [row for row in VERSIONS if row.minimum <= wanted]
    if not rows:
        raise LegalityError(f"TensorRT {text} is older than {VERSIONS[0].name} (JetPack {VERSIONS[0].jetpack}); update JetPack")
    return rows[-1]


def check_graph(name: str, facts: GraphFacts, row: TensorRTVersion) -> tuple[str, ...]:
    """Return warnings for one graph on one TensorRT.

    Raises:
        LegalityError: the graph holds an operator that this parser lacks, or one of onnxruntime's own.
    """
    lacking = sorted(row.decompose.intersection(facts.operators))
    if lacking:
        raise LegalityError(
            f"{name}: TensorRT {row.name} (JetPack {row.jetpack}) has no {', '.join(lacking)}; "
            "build the bundle for this device, so that these operators are decomposed, or update JetPack"
        )
    if foreign := [op for op in facts.operators if "::" in op and op.partition("::")[0] not in _DOMAINS]:
        raise LegalityError(
            f"{name}: TensorRT has no {', '.join(foreign)}; build the bundle with target.runtime: tensorrt, for which no such operator "
            "is written"
        )
    found = []
    if marked := sorted(_MARKED_UNSUPPORTED.intersection(facts.operators)):
        found.append(
            f"{name}: {', '.join(marked)}: not supported by the parser of TensorRT 10.1, whose table is the newest read; the device decides"
        )
    if facts.opset > row.opset:
        found.append(
            f"{name}: opset {facts.opset} is above {row.opset}, the highest taken as safe for TensorRT {row.name}; the device decides"
        )
    return tuple(found)
