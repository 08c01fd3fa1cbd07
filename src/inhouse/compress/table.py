"""The table of methods: every technique under the name that recipes use. Add a row here and its page in `methods`."""

import difflib
from collections.abc import Mapping

from inhouse.compress.auto import AutoOptions, auto
from inhouse.compress.drift import DriftOptions
from inhouse.compress.feedback import GptqOptions
from inhouse.compress.gradual import GradualOptions, gradual
from inhouse.compress.method import Method
from inhouse.compress.methods.awq import AwqOptions, awq
from inhouse.compress.methods.cores import (
    TrainOptions,
    TuckerOptions,
    tensor_train_embedding,
    train_check,
    tucker_check,
    tucker_experts,
)
from inhouse.compress.methods.distill import DistillOptions, check_options, distill, learns_nothing
from inhouse.compress.methods.finetune import FinetuneOptions, finetune
from inhouse.compress.methods.fixed import FixedOptions, fixed
from inhouse.compress.methods.ggufmix import GgufMixOptions, ggufmix
from inhouse.compress.methods.gptaq import gptaq
from inhouse.compress.methods.gptq import gptq
from inhouse.compress.methods.hadamard import HadamardOptions, hadamard
from inhouse.compress.methods.hqq import HqqOptions, hqq
from inhouse.compress.methods.kv import KvOptions, kv, kv_check
from inhouse.compress.methods.logcodes import LogOptions, logcodes
from inhouse.compress.methods.lowrank import LowRank, lowrank, lowrank_check
from inhouse.compress.methods.magnitude import MagnitudeOptions, magnitude
from inhouse.compress.methods.merging import MERGES, MergeStage, merge_stage, merges_nothing
from inhouse.compress.methods.neurons import NeuronOptions, neurons
from inhouse.compress.methods.qat import QatOptions, qat
from inhouse.compress.methods.rank_budget import RankBudget, rank_budget
from inhouse.compress.methods.repair import Repair, repaired
from inhouse.compress.methods.rounding import RoundingOptions, rounding
from inhouse.compress.methods.rtn import RtnOptions, rtn
from inhouse.compress.methods.signround import SignRoundOptions, signround_block
from inhouse.compress.methods.smoothquant import SmoothQuantOptions, smoothquant
from inhouse.compress.methods.sparsegpt import SparseGptOptions, sparse_gpt
from inhouse.compress.methods.structured import StructuredOptions, structured, takes_nothing
from inhouse.compress.methods.vector import VectorMethod, vector, vector_shared
from inhouse.compress.methods.wanda import WandaOptions, wanda, wanda_needs
from inhouse.compress.methods.window import WindowOptions, window
from inhouse.core.errors import UsageError

METHODS: Mapping[str, Method] = {
    row.name: row
    for row in (
        *(
            Method(
                name, "merge", "model", merge_stage, MergeStage, defaults={"method": name}, idle=merges_nothing,
                paper="mergekit, Goddard et al. 2024, arXiv 2403.13257", summary="other models merged into this one",
            )
            for name in MERGES
        ),
        Method(
            "round", "quantize", "matrix", rounding, RoundingOptions, paper="Frantar et al. 2022, arXiv 2210.17323",
            rows_apart=True, summary="nearest code; the baseline",
        ),
        Method(
            "rtn", "quantize", "matrix", rtn, RtnOptions, rows_apart=True,
            needs=lambda options: "moments" if options.importance else "nothing",
            paper="Frantar et al. 2022, arXiv 2210.17323", summary="nearest code, scales by weighted least squares",
        ),
        Method(
            "gptq", "quantize", "matrix", gptq, GptqOptions, needs="gram", rows_apart=True, fallback="rtn",
            paper="Frantar et al. 2022, arXiv 2210.17323", summary="errors fed back column by column, static act-order",
        ),
        Method(
            "gptaq", "quantize", "block", gptaq, DriftOptions, needs="gram", paper="Li et al. 2025, arXiv 2504.02692",
            summary="GPTQ towards the first model's layers, the residual stream's loss and norms made up for",
        ),
        Method(
            "auto", "quantize", "model", auto, AutoOptions, needs="gram",
            paper="Frantar et al. 2022, arXiv 2210.17323; Li et al. 2025, arXiv 2504.02692",
            summary="formats under a budget of bytes: measured losses, knapsack, local search, then gptaq",
        ),
        Method(
            "hqq", "quantize", "matrix", hqq, HqqOptions, rows_apart=True,
            paper="Badri and Shaji 2023, Half-Quadratic Quantization", summary="zero points by an l_p norm, no text",
        ),
        Method(
            "ggufmix", "quantize", "model", ggufmix, GgufMixOptions, needs="moments",
            paper="llama.cpp's quantize tool", summary="K-quant mixtures by llama.cpp's rules, with importance",
        ),
        Method(
            "awq", "smooth", "model", awq, AwqOptions, needs="gram", paper="Lin et al. 2023, arXiv 2306.00978",
            summary="columns of active inputs scaled up, ranges clipped, before rounding",
        ),
        Method(
            "smoothquant", "smooth", "model", smoothquant, SmoothQuantOptions, needs="moments",
            paper="Xiao et al. 2022, arXiv 2211.10438", summary="outliers of activations moved into weights, for int8",
        ),
        Method(
            "hadamard", "smooth", "model", hadamard, HadamardOptions,
            idle=lambda o: None if o.stream or o.heads else ("stream and heads are both off", "Turn one of them on"),
            paper="Ashkboos et al. 2024, arXiv 2404.00456",
            summary="residual stream and value heads rotated; outliers spread",
        ),
        Method(
            "vector", "quantize", "matrix", vector, VectorMethod, needs="gram",
            paper="Egiazarian et al. 2024, arXiv 2401.06118", summary="sums of codebook entries of 8 inputs",
        ),
        Method(
            "vector-shared", "quantize", "model", vector_shared, VectorMethod, needs="gram",
            paper="Egiazarian et al. 2024, arXiv 2401.06118", summary="vector codes, one set of codebooks for all",
        ),
        Method(
            "log", "quantize", "matrix", logcodes, LogOptions, needs="moments", rows_apart=True,
            paper="Miyashita et al. 2016, arXiv 1603.01025", summary="signs and powers of two, four bits",
        ),
        Method(
            "fixed", "quantize", "matrix", fixed, FixedOptions,
            paper="Courbariaux et al. 2014, arXiv 1412.7024",
            summary="int8 or int4 mantissas, one power of two a tensor",
        ),
        Method(
            "svd", "lowrank", "matrix", lowrank, LowRank, defaults={"method": "svd"}, check=lowrank_check,
            paper="Eckart and Young 1936", summary="truncated SVD",
        ),
        Method(
            "asvd", "lowrank", "matrix", lowrank, LowRank, needs="moments", defaults={"method": "asvd"}, fallback="svd",
            check=lowrank_check,
            paper="Yuan et al. 2023, arXiv 2312.05821", summary="SVD of columns scaled by their inputs' size",
        ),
        Method(
            "svd-llm", "lowrank", "matrix", lowrank, LowRank, needs="gram", defaults={"method": "whitened"},
            fallback="svd", check=lowrank_check,
            paper="Wang et al. 2024, arXiv 2403.07378", summary="whitened SVD: least output error of a rank",
        ),
        Method(
            "rank-budget", "lowrank", "model", rank_budget, RankBudget, needs="gram",
            paper="Wang et al. 2025, arXiv 2503.12340", summary="whitened SVD, ranks shared out by measured loss",
        ),
        Method(
            "tensor-train", "lowrank", "model", tensor_train_embedding, TrainOptions, check=train_check,
            paper="Hrinchuk et al. 2020, arXiv 1901.10787", summary="embedding as tables of a tensor train",
        ),
        Method(
            "tucker", "lowrank", "model", tucker_experts, TuckerOptions, check=tucker_check,
            paper="De Lathauwer et al. 2000", summary="experts as cores between two matrices that they share",
        ),
        Method(
            "eora", "repair", "matrix", repaired, Repair, needs="gram", takes_form=True,
            defaults={"method": "whitened"},
            paper="Liu et al. 2024, arXiv 2410.21271", summary="low-rank branch beside codes: least output error",
        ),
        Method(
            "lqer", "repair", "matrix", repaired, Repair, needs="moments", takes_form=True,
            defaults={"method": "asvd"}, paper="Zhang et al. 2024, arXiv 2402.02446",
            summary="the same with the inputs' mean sizes alone",
        ),
        Method(
            "magnitude", "prune", "matrix", magnitude, MagnitudeOptions, paper="Han et al. 2015, arXiv 1506.02626",
            summary="the smallest weights become 0; a share or N:M; needs no text",
        ),
        Method(
            "wanda", "prune", "matrix", wanda, WandaOptions, needs=wanda_needs,
            paper="Sun et al. 2023, arXiv 2306.11695",
            summary="weight times norm of its input, by row; a share or N:M; may fit what stays (refit)",
        ),
        Method(
            "sparsegpt", "prune", "matrix", sparse_gpt, SparseGptOptions, needs="gram",
            paper="Frantar and Alistarh 2023, arXiv 2301.00774",
            summary="optimal brain surgeon by columns; a share or N:M; with a format it rounds in the same sweep",
        ),
        Method(
            "gradual", "prune", "model", gradual, GradualOptions, needs="gram",
            paper="Zhu and Gupta 2017, arXiv 1710.01878",
            summary="prune, heal, score anew, in rounds until the target or the gate; the last good round stays",
        ),
        Method(
            "neurons", "prune", "model", neurons, NeuronOptions, needs="moments", place="structured",
            paper="Srinivas and Babu 2015, arXiv 1507.06149", summary="constant and duplicate FFN channels are folded",
        ),
        Method(
            "structured", "prune", "model", structured, StructuredOptions, needs="gram", place="structured",
            idle=takes_nothing,
            paper="Muralidharan et al. 2024, arXiv 2407.14679; Men et al. 2024, arXiv 2403.03853",
            summary="FFN channels, heads with their key-value groups, layers, width; what stays is fitted",
        ),
        Method(
            "signround", "quantize", "block", signround_block, SignRoundOptions, needs="gradients",
            paper="Cheng et al. 2023, arXiv 2309.05516", summary="rounding and clipping learned layer by layer",
        ),
        Method(
            "window", "attention", "model", window, WindowOptions, paper="Xiao et al. 2023, arXiv 2309.17453",
            summary="a sliding window, first positions, every so many blocks: what is masked is skipped and freed",
        ),
        Method(
            "kv", "kv", "model", kv, KvOptions, plain=("k", "v"), check=kv_check,
            paper="Liu et al. 2024, arXiv 2402.02750",
            summary="K and V cached as int8 by token and head, or as int4 codes but for the last 128 positions; "
            "weights stay, a token of context takes less",
        ),
        Method(
            "qat", "qat", "model", qat, QatOptions, needs="gradients", paper="Liu et al. 2023, arXiv 2305.17888",
            summary="trained in the stored values, the float model as teacher; scales and zero points learned",
        ),
        Method(
            "distill", "distill", "model", distill, DistillOptions, needs="gradients", idle=learns_nothing,
            check=check_options,
            paper="Hinton et al. 2015, arXiv 1503.02531",
            summary="towards a teacher: response, features, relations; masks, factors and codes are kept",
        ),
        Method(
            "finetune", "finetune", "model", finetune, FinetuneOptions, needs="gradients",
            paper="Han et al. 2015, arXiv 1506.02626",
            summary="towards the text alone; masks, factors and codes are kept",
        ),
    )
}  # fmt: skip


def method(name: str, family: str | None = None) -> Method:
    """The row of that name (of that family). Raises UsageError with the nearest right one."""
    rows = {row.name: row for row in METHODS.values() if family is None or row.family == family}
    if name not in rows:
        near = difflib.get_close_matches(name, rows, 1)
        remedy = f"Did you mean {near[0]}?" if near else f"There are {', '.join(sorted(rows))}"
        raise UsageError(f"there is no method {name!r}{f' for {family}' if family else ''}", remedy=remedy, param=name)
    return rows[name]
