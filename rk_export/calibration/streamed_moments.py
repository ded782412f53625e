"""Second moments of what each matrix reads, gathered layer by layer beside the rewriting of the model.

Two versions of the model carry the calibration text: the dense one, and the compressed one with every layer
before the present one rewritten. The present layer, still dense, runs on the hidden states of both.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.calibration.dense_statistics import READS_PER_INPUT
from rk_export.calibration.moments import InputSum, common_reader, readers, recorded_inputs
from rk_export.calibration.self_text import LENGTH, Writer, self_text
from rk_export.calibration.streams import Streams
from rk_export.calibration.uniform_text import uniform_text
from rk_export.device import matmul_dtype, matmuls_in
from rk_export.errors import InputError
from rk_export.model.architecture import Architecture
from rk_export.model.context import own_context
from rk_export.options.calibration import CalibrationOptions
from rk_export.passes.base import Layer
from rk_export.passes.numerics.curvature import Curvature, Inputs
from rk_export.plan import SitePlan
from rk_export.source.protocol import Source
from rk_export.text import known_tokens

logger = logging.getLogger(__name__)

DENSE, COMPRESSED = "dense", "compressed"
CHUNK = 2048  # tokens that run through a layer together


def calibration_tokens(
    source: Source, options: CalibrationOptions, device: torch.device, other: Writer | None = None
) -> Tensor:
    """Return the calibration text of a metric that uses one.

    Args:
        source: The dense model.
        options: `self` samples from the model, or from an encoder's vocabulary; `corpus` reads a text file with the
            model's tokenizer.
        device: Where the model runs while sampling.
        other: Writes instead of a model that is too large, as in `self_text`.

    Returns:
        int64 (sequences, length): `LENGTH` tokens each, fewer if the model's context is shorter.

    Raises:
        InputError: If the text cannot be read, is too short or does not fit the model's vocabulary, or the model
            cannot write one.
        ValueError: If the metric uses no text.
    """
    if options.metric == "self" and source.architecture.is_encoder:
        return uniform_text(source, options.tokens, options.seed)
    if options.metric == "self":
        return self_text(source, options.tokens, options.seed, device, other=other)
    if options.corpus is None:
        raise ValueError(f"the metric {options.metric!r} uses no text")
    path, rows = options.corpus.place(), int(source.config.vocab_size)
    ids = torch.from_numpy(known_tokens(path, source.folder, rows, limit=options.tokens))
    if len(ids) < options.tokens:
        raise InputError(
            f"the text has {len(ids)} tokens, {options.tokens} were asked for",
            where=str(path),
            fix="give a longer text, or set calibration.tokens to fewer",
        )
    length = min(LENGTH, own_context(source.config))
    return ids[: options.tokens // length * length].view(-1, length)


class CalibrationStreams:
    """Calibration tokens carried through the dense and the compressed model; statistics on the way.

    Make it while the embedding is dense, call `start` once it is final, then for each layer `observe` while the
    layer is dense and `advance` after it was rewritten. Layers run where they are; moments come to the CPU.

    Args:
        model: The model; its embedding is filled, its layers need not be.
        architecture: Its family.
        tokens: int64 (sequences, length), without padding.
        cross: Also gather cross moments. Without them the dense version is not carried at all, which saves half
            of the work.
        dtype: What matrices multiply in, float32 or bfloat16; None takes `matmul_dtype` of the model's device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        tokens: Tensor,
        *,
        cross: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        layers = model.get_submodule(architecture.layers)
        if not isinstance(layers, nn.ModuleList):
            raise TypeError(f"{architecture.layers} is no list of layers")
        rows = max(1, CHUNK // tokens.shape[1])
        self._chunks = [Streams(model, layers, chunk) for chunk in torch.split(tokens, rows)]
        self._layers, self._cross, self._dtype = layers, cross, dtype
        if cross:
            for chunk in self._chunks:
                chunk.start(DENSE)

    def start(self) -> None:
        """Begin the compressed version with the embedding as it is now."""
        for chunk in self._chunks:
            chunk.start(COMPRESSED)
            if self._cross and torch.equal(chunk.hidden[DENSE], chunk.hidden[COMPRESSED]):
                chunk.hidden[COMPRESSED] = chunk.hidden[DENSE]  # one run serves both

    def observe(self, index: int, layer: Layer, sites: Sequence[SitePlan]) -> dict[str, Curvature]:
        """Run a layer that is still dense on both versions' hidden states, and advance the dense version.

        Experts get moments of the compressed version only: the two versions may route a token differently.

        Returns:
            Curvatures by site name, those of experts by the matrix' name. A site whose matrices read different
            inputs, or no token at all, has none, which is logged; neither has an expert that read too few tokens.
        """
        modules = {path: layer.at(path) for site in sites for path in site.paths}
        mixed = [site for site in sites if "expert" in site.members]
        experts = [path for site in mixed for path in site.paths]
        sums: defaultdict[str, InputSum] = defaultdict(InputSum)
        reader_of: dict[str, str] = {}
        for chunk in self._chunks:
            with self._matmuls(index):
                inputs, dense = self._inputs(chunk, index, modules)
            here = readers(inputs)
            reader_of |= here
            for reader in {here[path] for path in experts if path in here}:
                sums[reader].add(inputs[reader], None)
            for common in {common_reader(site.paths, here) for site in sites if site not in mixed}:
                if common is not None:
                    sums[common].add(inputs[common], dense.get(common))
        moments = {reader: total.moments() for reader, total in sums.items()}
        return _by_site(sites, reader_of, moments) | _by_expert(mixed, reader_of, moments)

    def advance(self, index: int) -> None:
        """Run the compressed version through a layer that has been rewritten."""
        with self._matmuls(index):
            for chunk in self._chunks:
                chunk.advance(COMPRESSED, index)

    def _inputs(
        self, chunk: Streams, index: int, modules: Mapping[str, nn.Module]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what a layer's matrices read in the compressed and in the dense version, which is advanced.

        The second is empty where the two agree, or where the dense version is not carried.
        """
        with recorded_inputs(modules) as inputs:
            output = chunk.run(COMPRESSED, index)
        if not self._cross:
            return inputs, {}
        if chunk.hidden[DENSE] is chunk.hidden[COMPRESSED]:
            chunk.hidden[DENSE] = output
            return inputs, {}
        with recorded_inputs(modules) as dense:
            chunk.advance(DENSE, index)
        return inputs, dense

    def _matmuls(self, index: int) -> AbstractContextManager[object]:
        device = next(self._layers[index].parameters()).device
        return matmuls_in(self._dtype or matmul_dtype(device), device)


def _by_expert(
    sites: Sequence[SitePlan], reader_of: Mapping[str, str], moments: Mapping[str, Inputs]
) -> dict[str, Curvature]:
    found = {}
    apart = (site for site in sites if common_reader(site.paths, reader_of) is None)
    for place in (place for site in apart for place in site.matrices):
        own = moments.get(reader_of.get(place.path, ""))
        if own is not None and own.tokens >= READS_PER_INPUT * len(own.second):
            found[place.name] = Curvature(own)
    return found


def _by_site(
    sites: Sequence[SitePlan], reader_of: Mapping[str, str], moments: Mapping[str, Inputs]
) -> dict[str, Curvature]:
    found = {}
    for site in sites:
        shared = moments.get(common_reader(site.paths, reader_of) or "")
        if shared is not None:
            found[site.site] = Curvature(shared)
            continue
        reached = any(path in reader_of for path in site.paths)
        if reached and "expert" in site.members:
            continue  # what is known of them is known one by one
        reason = "its matrices read different inputs" if reached else "no token reached it"
        logger.info("%s: no statistics, %s", site.site, reason)
    return found
