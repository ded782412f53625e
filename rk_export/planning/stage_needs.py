"""What each stage of a compression takes, from shapes and tokens alone.

Every constant counts copies, passes or calls of the code that it names; `samples/measure/dry_run_truth.py` compares
the sums with what a run really took.
"""

from __future__ import annotations

from collections.abc import Iterator

from rk_export.planning.job import Job, LayerCounts
from rk_export.planning.resources import Place, StageNeeds, Term, Work, added, times, total

# The process with its libraries, before any tensor.
PROCESS_BYTES = 430_000_000
# Tokens of the probe: eight prompts of 32.
PROBE = 256
# Tokens of the text that reparameterizations are chosen on, and that statistics of the table read.
SHORT_TEXT = 2048
# Tokens that pass a layer together, forward only and forward and back, and numbers that logits have together.
CHUNK, BACK_CHUNK, LOGITS = 2048, 512, 1 << 24
# Entries that GPTQ works on together, and sequences that are written together.
ROUNDED_TOGETHER, WRITTEN_TOGETHER = 1 << 25, 64

_FLOAT_BYTES = 4

# --- copies in memory
_PROBE_CHECKED = 2  # logits of the probe while they are compared; those that are kept lie on the disk
_PROBE_LEVELS = 4  # while int8 inputs are judged
_PROBE_VERIFIED = 7  # of PyTorch and of a session, and what compares them
_LOGITS_BACK = 5  # logits with their distribution, labels and gradients
_TABLES_PREPARED = 0.85  # of embedding and head, what they are prepared from beside what they become
_TABLE_ROUNDED = (
    2.5  # bytes of an entry of the embedding: its codes and scales, before and after they are joined
)
_TOKENIZER_READ, _TOKENIZER_WRITTEN = 17, 29  # of the tokenizer's file, as objects of Python
_SWEPT = 6  # what GPTQ holds of its entries: target, error, codes, and of the scales that it tries
_MOMENTS_OF_SWEEP = 4  # the moment, its factor, and what both become
_STATES = {"attention": 4, "other": 2}  # preparations that touch what a matrix reads
_ACTIVATIONS = 6  # of a layer's widths, saved for the way back
_SESSION = 1.4  # memory of a session over the bytes of its model

# --- passes and calls
_LAYER_CALLS, _EXPERT_CALLS = 240, 90  # short operations of a layer's forward pass, and of each expert
_TRACE_CALLS = 3_000  # those of tracing a layer, over its matrices
_START_CALLS, _FILE_CALLS = 4_000_000, 300_000  # imports; tokenizer and configs
_SESSION_CALLS = 2_000_000  # two sessions, and what they generate
_PASSES_LOGITS = 8  # of the float32 logits that are drawn from
_PASSES_SHAKEN = 12  # of the outputs of a module that is shaken
_PASSES_PRICED = 16  # of a matrix that formats are priced for
_PASSES_TRIED = 10  # of a matrix for each state that is tried
_PASSES_DEQUANTIZED = 6  # of a matrix that is unpacked
_PASSES_ROUNDED = 8  # of a matrix that is rounded to nearest
_DECOMPOSED = (
    60  # work of eigenvalues and singular values in float64 over that of a Cholesky factor in float32
)
_VERIFIED_TOKENS = 2_500  # that two sessions run in all tiers
_LEVEL_0 = 3  # time of a product with float inputs over that with int8 inputs
_VERIFIED_PASSES = 12  # of the quantized PyTorch model


def stages_of(job: Job) -> tuple[StageNeeds, ...]:
    """Return the stages of a run in their order, methods that recover left out."""
    opening = (load_needs(job), check_needs(job), calibrate_needs(job))
    return (
        *opening,
        plan_needs(job),
        rewrite_needs(job),
        export_needs(job),
        bundle_needs(job),
        verify_needs(job),
    )


def load_needs(job: Job) -> StageNeeds:
    """Return what opening takes: imports, headers, configs and the tokenizer."""
    memory = (*_process(), *_texts(job, _TOKENIZER_READ))
    return StageNeeds("load", memory, work={"calls": _START_CALLS})


def check_needs(job: Job) -> StageNeeds:
    """Return what the comparison with transformers takes: the probe through one layer at a time, ours and theirs."""
    layers = (*_tables(job), *_layer(job), _probe(job, _PROBE_CHECKED))
    runs = 3
    work = added(
        {"reads": job.stored_bytes, "checksums": job.stored_bytes, "passes": 12.0 * job.parameters},
        times(runs, _forward(job, PROBE, "float_products")),
        times(runs, _logits(job, PROBE, "float_products")),
        {"passes": 4.0 * PROBE * _PASSES_SHAKEN * sum(_outputs(layer) for layer in job.layers)},
    )
    return StageNeeds("check", (*_process(), *layers), work=work)


def calibrate_needs(job: Job) -> StageNeeds:
    """Return what the text, the choice of reparameterizations and the statistics take; the largest step counts."""
    steps = [_writing(job), _forward_step(job), _backward_step(job)]
    steps += [_trial(job), _making(job), _table_step(job)]
    memory = (*_process(), *max(steps, key=total))
    works = [_text_work(job), _preparing_work(job), _statistics_work(job)]
    disk = (*_scratch(job), *_inputs_on_disk(job), *_statistics_on_disk(job), *_written_model(job))
    return StageNeeds("calibrate", memory, _gpu(job), disk, added(*works))


def plan_needs(job: Job) -> StageNeeds:
    """Return what choosing formats and ranks takes."""
    layer = job.largest
    widest = max(layer.reads, default=0)
    largest = max((rows * columns for rows, columns in layer.matrices), default=0)
    pricing: list[Term] = []
    work: Work = {}
    if job.recipe.budget is not None or job.directions:
        pricing = [
            _term("moments and their factors", 8 * widest**2),
            _term("a matrix, its blocks", 12 * largest),
        ]
        factors = sum(width**3 / 3 for layer in job.layers for width in layer.reads)
        work = {"factors": factors, "passes": 4.0 * _PASSES_PRICED * sum(one.entries for one in job.layers)}
        if job.directions:
            pricing.append(_term("metrics in float64", 24 * widest**2 + 24 * largest))
            work = added(work, {"factors": _DECOMPOSED * factors})
    if job.recipe.table_is_open and job.recipe.budget is not None:
        pricing.append(_term("embedding while it is priced", 4 * job.table))
        work = added(work, {"passes": 4.0 * _PASSES_PRICED * job.table})
    memory = (*_process(), *pricing)
    return StageNeeds("plan", memory, _gpu(job), (*_scratch(job), *_statistics_on_disk(job)), work)


def rewrite_needs(job: Job) -> StageNeeds:
    """Return what factorizing and rounding the layers takes, and judging the inputs of the products after it."""
    layer = job.largest
    widest = max((columns for _, columns in layer.matrices), default=0)
    largest = max((rows * columns for rows, columns in layer.matrices), default=0)
    rounding = [
        *_layer(job),
        _term("moments and factors of GPTQ", 4 * _MOMENTS_OF_SWEEP * widest**2),
        _term("entries that GPTQ rounds", 4 * _SWEPT * min(largest, ROUNDED_TOGETHER)),
        _probe(job, 3),
    ]
    table = [
        _term("rows of the embedding that are rounded", 4 * _SWEPT * min(job.table, ROUNDED_TOGETHER)),
        _term("the embedding, rounded", _TABLE_ROUNDED * job.table),
    ]
    peak = max((rounding, table, [_probe(job, _PROBE_LEVELS)]), key=total)
    finished = _term("finished layers", _finished_bytes(job), "output")
    disk = (*_scratch(job), *_statistics_on_disk(job), finished)
    return StageNeeds("rewrite", (*_process(), *peak), _gpu(job), disk, _rewrite_work(job))


def export_needs(job: Job) -> StageNeeds:
    """Return what tracing and writing the graph takes: tensors are converted one at a time."""
    work = added(
        {"writes": job.output_bytes, "passes": 4.0 * job.output_bytes},
        {"calls": float(_TRACE_CALLS * sum(len(layer.matrices) for layer in job.layers))},
    )
    return StageNeeds("export", _process(), disk=_finished(job), work=work)


def bundle_needs(job: Job) -> StageNeeds:
    """Return what the tokenizer and the configs of the runtimes take."""
    memory = (*_process(), *_texts(job, _TOKENIZER_WRITTEN))
    return StageNeeds("bundle", memory, disk=_finished(job), work={"calls": _FILE_CALLS})


def verify_needs(job: Job) -> StageNeeds:
    """Return what the parity tiers take: two sessions in turn, and the quantized PyTorch model."""
    held = [
        _probe(job, _PROBE_VERIFIED),
        _term("a session", round(_SESSION * job.output_bytes)),
    ]
    parameters = job.active_parameters + job.tables
    work = added(
        {"int4_products": 2.0 * _LEVEL_0 * _VERIFIED_TOKENS * parameters, "checksums": job.output_bytes},
        {"float_products": 2.0 * 4 * PROBE * parameters, "writes": 0.0},
        {"passes": 4.0 * _PASSES_DEQUANTIZED * _VERIFIED_PASSES * (job.layer_parameters + job.table)},
        times(_VERIFIED_PASSES, _calls(job)),
        {"calls": float(_SESSION_CALLS)},
    )
    memory = (*_process(), *held)
    return StageNeeds("verify", memory, disk=_finished(job), work=work)


# --- parts of the memory


def _process() -> tuple[Term, ...]:
    return (_term("process and libraries", PROCESS_BYTES),)


def _term(name: str, count: float, place: Place | None = None) -> Term:
    return Term(name, round(count), place)


def _probe(job: Job, copies: int = 1) -> Term:
    return _term("logits of the probe", 4 * copies * PROBE * job.vocabulary)


def _converted(name: str, job: Job, parameters: int) -> tuple[Term, ...]:
    """Return what is read from the files as float32; what is mapped takes nothing."""
    return () if job.is_mapped or not parameters else (_term(name, 4 * parameters),)


def _tables(job: Job) -> tuple[Term, ...]:
    return _converted("embedding and head, in float32", job, job.tables)


def _layer(job: Job) -> tuple[Term, ...]:
    return _converted("a layer, in float32", job, 2 * job.largest.parameters)


def _writing(job: Job) -> list[Term]:
    """Return what writing the text takes."""
    together = min(job.sequences, WRITTEN_TOGETHER)
    logits = _term("logits of the sequences", 16 * together * job.vocabulary)
    if job.writer == "nobody":
        return []
    if job.writer == "dense":
        cache = job.product_bytes * job.cache_row * job.length * together
        model = job.product_bytes * job.parameters
        held = 0 if job.is_mapped and job.product_bytes == 4 else model
        return [_term("the model that writes", held), _term("its keys and values", cache), logits]
    row = 4 * job.cache_row * job.length
    room = max(1 << 29, job.int4_bytes // 2)
    cache = row * max(1, min(together, room // max(row, 1)))
    return [_term("the INT4 model", _SESSION * job.int4_bytes), _term("its keys and values", cache), logits]


def _back_layer(job: Job) -> list[Term]:
    wide = max(map(_outputs, job.layers))
    gradients = sum(rows**2 for rows, _ in job.largest.matrices) if job.directions else 0
    return [
        _term("activations of a layer", 4 * _ACTIVATIONS * BACK_CHUNK * wide),
        _term("moments of a layer's gradients", 8 * gradients),
    ]


def _model(job: Job) -> list[Term]:
    """Return the tables of the dense and of the prepared model; layers are mapped."""
    prepared = [_term("embedding and head, prepared", 4 * job.tables)] if job.prepares else []
    return [_term("embedding and head", 4 * job.tables), *prepared]


def _texts(job: Job, copies: float) -> tuple[Term, ...]:
    """Return what the tokenizer's file takes while it is read or written."""
    return (_term("the tokenizer", copies * job.tokenizer_bytes),)


def _forward_step(job: Job) -> list[Term]:
    """Return what the way forward of the statistics takes: hidden states of all text, one layer and its moments."""
    if not job.sequences:
        return []
    layer = job.largest
    wide = max(map(_outputs, job.layers))
    moments = sum(width**2 for width in layer.reads) if job.has_statistics else 0
    return [
        _term("hidden states of the text", 8 * job.tokens * job.width),
        _term("activations of a chunk", 4 * min(CHUNK, job.tokens) * wide),
        _term("moments of a layer, and their means", 8 * moments),
        _term("the largest moment, mirrored", 8 * max(layer.reads) ** 2 if moments else 0),
    ]


def _backward_step(job: Job) -> list[Term]:
    """Return what the top of the way back takes: logits in slices."""
    if not job.back and not job.prepares:
        return []
    back = _back(job)
    return [
        _term("hidden states and gradients", 8 * (job.tokens + back) * job.width),
        _term("logits of some tokens", 4 * _LOGITS_BACK * min(LOGITS, BACK_CHUNK * job.vocabulary)),
    ]


def _back(job: Job) -> int:
    return max(job.back, min(SHORT_TEXT, job.tokens) if job.prepares else 0)


def _trial(job: Job) -> list[Term]:
    """Return what the trial of the reparameterizations takes: one layer twice, and its moments in each state."""
    if not job.prepares:
        return []
    layer = job.largest
    short = min(SHORT_TEXT, job.tokens)
    return [
        _term("embedding and head", 4 * job.tables),
        _term("a layer twice", 8 * layer.parameters),
        _term("what its matrices read", 8 * short * sum(layer.reads)),
        _term("moments in each state", 4 * sum(_states(job, width) * width**2 for width in layer.reads)),
        _term("a factor", 12 * max(layer.reads) ** 2),
    ]


def _making(job: Job) -> list[Term]:
    """Return what preparing embedding and head takes."""
    if not job.prepares:
        return []
    return [
        _term("embedding and head, prepared", 4 * job.tables),
        _term("what both are prepared from", 4 * _TABLES_PREPARED * job.tables),
    ]


def _table_step(job: Job) -> list[Term]:
    """Return what the statistics of the embedding take: logits of a short text."""
    if not job.has_statistics:
        return []
    return [
        _term("logits of some tokens", 16 * min(LOGITS, SHORT_TEXT * job.vocabulary)),
        _term("moment of the head", 8 * job.width**2),
    ]


def _states(job: Job, width: int) -> int:
    return _STATES["attention" if width == job.width else "other"]


def _gpu(job: Job) -> tuple[Term, ...]:
    """Return what a device holds: one layer, what its text makes, moments, and GPTQ's work."""
    if not job.on_gpu:
        return ()
    layer = job.largest
    widest, largest = max(layer.reads), max(rows * columns for rows, columns in layer.matrices)
    terms = [
        _term("a layer", 4 * layer.parameters),
        _term("moments and factors", 4 * (sum(width**2 for width in layer.reads) + 4 * widest**2)),
        _term("entries that GPTQ rounds", 4 * _SWEPT * min(max(largest, job.table), ROUNDED_TOGETHER)),
    ]
    text = _writing(job) if job.writer == "dense" else []
    top = [_term("head", 4 * job.tables), _term("logits of some tokens", 4 * _LOGITS_BACK * LOGITS)]
    return tuple(max(terms, text, top, key=total))


# --- parts of the disk


def _scratch(job: Job) -> tuple[Term, ...]:
    """Return the mapped model beside its files, in float32."""
    if job.is_mapped and not job.prepares:
        return ()
    return (_term("scratch of the mapped model", 4 * (job.layer_parameters + job.tables), "output"),)


def _inputs_on_disk(job: Job) -> tuple[Term, ...]:
    """Return what the layers read of the text that runs back."""
    return (_term("what the layers read", 4 * _back(job) * job.width * len(job.layers), "output"),)


def _statistics_on_disk(job: Job) -> tuple[Term, ...]:
    place: Place = "cache" if job.statistics_bytes <= job.limit else "output"
    return (_term("statistics", job.statistics_bytes, place),)


def _written_model(job: Job) -> tuple[Term, ...]:
    """Return the INT4 model that writes the text, and its layers before they are exported."""
    if job.writer != "int4":
        return ()
    return (
        _term("the INT4 model that writes", job.int4_bytes, "output"),
        _term("its layers", job.int4_bytes, "cache"),
    )


def _finished_bytes(job: Job) -> int:
    """Return what the finished layers take; the embedding is no layer, but it lies beside them."""
    return job.output_bytes


def _finished(job: Job) -> tuple[Term, ...]:
    return (
        *_statistics_on_disk(job),
        _term("finished layers", _finished_bytes(job), "output"),
        _term("bundle", job.output_bytes, "output"),
    )


# --- parts of the work


def _outputs(layer: LayerCounts) -> float:
    """Return the width of all that a layer's matrices read and put out, for one token."""
    wide = sum(rows for rows, _ in layer.matrices) + sum(layer.reads)
    return wide * layer.active if layer.experts else float(wide)


def _calls(job: Job) -> Work:
    return {"calls": float(sum(_LAYER_CALLS + _EXPERT_CALLS * layer.experts for layer in job.layers))}


def _forward(job: Job, tokens: float, kind: str = "products") -> Work:
    """Return the work of running tokens through all layers, a chunk at a time."""
    work: Work = {
        "float_products" if kind == "float_products" else "products": 2.0 * job.active_parameters * tokens,
        "passes": 8.0 * tokens * sum(_outputs(layer) for layer in job.layers),
    }
    return added(work, times(max(1.0, tokens / CHUNK), _calls(job)))


def _logits(job: Job, tokens: float, kind: str = "products") -> Work:
    """Return the work of the head on tokens, and of what is done with the logits."""
    products = 2.0 * job.table * tokens
    return {
        "float_products" if kind == "float_products" else "products": products,
        "passes": 4.0 * _PASSES_LOGITS * job.vocabulary * tokens,
    }


def _grams(widths: Iterator[tuple[int, float]], tokens: float) -> Work:
    return {"grams": sum(width * (width + 1) * share * tokens for width, share in widths)}


def _read_widths(job: Job) -> Iterator[tuple[int, float]]:
    """Yield the width of every tensor that matrices read, with the share of the tokens that come there."""
    for layer in job.layers:
        for width in layer.reads:
            yield width, layer.active


def _text_work(job: Job) -> Work:
    if job.writer == "nobody":
        return {}
    steps = job.length * -(-job.sequences // WRITTEN_TOGETHER)
    flops = 2.0 * (job.active_parameters + job.table) * job.tokens
    drawn: Work = {"passes": 4.0 * _PASSES_LOGITS * job.vocabulary * job.tokens}
    if job.writer == "dense":
        converted: Work = {"passes": (4.0 + job.product_bytes) * job.parameters}
        return added({"thin_products": flops}, drawn, converted, times(steps, _calls(job)))
    made: Work = {
        "passes": 4.0 * _PASSES_ROUNDED * job.parameters,
        "writes": 2.0 * job.int4_bytes,
        "calls": float(_TRACE_CALLS * sum(len(layer.matrices) for layer in job.layers)),
    }
    return added({"int4_products": flops}, drawn, made)


def _preparing_work(job: Job) -> Work:
    if not job.prepares:
        return {}
    short = min(SHORT_TEXT, job.tokens)
    states = [(_states(job, width), width, share) for width, share in _read_widths(job)]
    moments = ((width, count * share) for count, width, share in states)
    return added(
        times(4, _forward(job, short)),
        times(3, _logits(job, short)),
        _grams(moments, short),
        {
            "factors": sum(count * width**3 / 3 for count, width, _ in states),
            "passes": 4.0 * _PASSES_TRIED * 4 * sum(layer.entries for layer in job.layers),
            "writes": 4.0 * (short * job.width * len(job.layers) + job.layer_parameters + job.tables),
        },
    )


def _statistics_work(job: Job) -> Work:
    if not job.has_statistics:
        return {}
    short = min(SHORT_TEXT, job.tokens)
    written = job.statistics_bytes + 4 * job.back * job.width * len(job.layers)
    outputs = ((rows, layer.active) for layer in job.layers for rows, _ in layer.matrices if job.directions)
    return added(
        _forward(job, job.tokens + 2 * job.back + short),
        _logits(job, 2 * job.back + short),
        _grams(_read_widths(job), job.tokens),
        _grams(outputs, job.back),
        {"writes": float(written)},
    )


def _rewrite_work(job: Job) -> Work:
    """Return the work of GPTQ on layers and embedding, and of the probe that runs alongside."""
    is_gptq = job.recipe.quantizer == "gptq" and job.has_statistics
    matrices = [shape for layer in job.layers for shape in layer.matrices]
    if job.recipe.quant is None and not job.recipe.has_open_formats:
        matrices = []
    if job.recipe.table_quant is not None or job.recipe.table_is_open:
        matrices.append((job.vocabulary, job.width))
    rounding: Work = {"passes": 4.0 * _PASSES_ROUNDED * sum(rows * columns for rows, columns in matrices)}
    if is_gptq:
        rounding = {
            "factors": sum(columns**3 / 3 for _, columns in matrices),
            "float_products": sum(3.0 * rows * columns**2 for rows, columns in matrices),
            "sweeps": float(sum(rows * columns for rows, columns in matrices)),
        }
    unpacked: Work = {"passes": 4.0 * _PASSES_DEQUANTIZED * 3 * (job.layer_parameters + job.table)}
    finished = float(_finished_bytes(job))
    prefix = _forward(job, 2 * job.tokens) if job.recipe.calibration.prefix and job.sequences else {}
    return added(
        rounding,
        times(5, _forward(job, PROBE, "float_products")),
        times(5, _logits(job, PROBE, "float_products")),
        unpacked,
        prefix,
        {"writes": finished, "checksums": finished, "passes": 4.0 * job.parameters},
    )
