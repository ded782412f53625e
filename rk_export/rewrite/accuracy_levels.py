"""Which quantized matrices keep float inputs: those where rounding inputs to int8 would cost too much.

At accuracy level 4 MatMulNBits rounds what it reads to int8, block by block, which is what makes it fast. One massive
input makes its whole block coarse. What that costs is predicted to second order: with E the error of a product and g
the gradient of the loss by it, the loss grows by half the mean of (g · E)² (Fisher information, 1503.05671). Where
that is too much, the product is exported at level 1, which computes in floats.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from rk_export.calibration.objectives import output_error
from rk_export.calibration.text_run import Objective, TextRun
from rk_export.model.canonical import Experts
from rk_export.model.grouped_experts import matrices_of
from rk_export.passes.modules.quantized import QuantizedLinear
from rk_export.passes.numerics.int8_inputs import int8_inputs
from rk_export.passes.numerics.threads import total
from rk_export.passes.weights.factorize import factors_path
from rk_export.report.records import Finding, Outcome
from rk_export.rewrite.apply import Rewritten
from rk_export.rewrite.expert_groups import grouped_layers

logger = logging.getLogger(__name__)

# Nats a token, or half the squared relative error of an encoder's output, that int8 inputs of the matrices which read
# one tensor may cost. SmolLM2-135M in INT4: 3e-3 for all 122 such tensors together, 2e-4 for the largest; rounding its
# weights costs 0.12.
LARGEST_LOSS = 1e-3
SECOND_FACTORS = ".ups."


def choose_levels(rewritten: Rewritten, probe: Tensor) -> Rewritten:
    """Let matrices read their inputs in floats where int8 inputs would cost more than `LARGEST_LOSS`.

    The model runs once on the probe, forward and back, a layer at a time. Matrices that read the same input are decided
    together, since the exported graph may pack them into one product.

    Args:
        rewritten: A quantized model; `reads_floats` of its matrices is set in place.
        probe: Token ids, int64 (batch, length).

    Returns:
        The same with a finding for every site with a matrix that reads floats.
    """
    options = rewritten.plan.recipe
    names = {
        module: name
        for name, module in rewritten.model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    if options.target.ep != "cpu" or options.target.accuracy_level != 4 or not names:
        return rewritten
    in_one_node = {
        matrix: experts
        for experts in grouped_layers(rewritten).values()
        for matrix in matrices_of(experts)
        if isinstance(matrix, QuantizedLinear)
    }
    groups = _by_input(rewritten, names, probe, in_one_node)
    sites: dict[str, float] = {}
    for group in groups:
        loss = sum(group.values()) / probe.numel()
        for module in group:
            module.reads_floats = loss > LARGEST_LOSS
            if module.reads_floats:
                site = _site_of(rewritten, names[module])
                sites[site] = max(loss, sites.get(site, 0.0))
    _agree(in_one_node)
    if sites:
        logger.info("inputs stay in floats at %s: int8 would cost too much", ", ".join(sites))
    findings = [_finding(site, loss, rewritten.architecture.is_encoder) for site, loss in sites.items()]
    return replace(rewritten, findings=(*rewritten.findings, *findings))


def _agree(in_one_node: Mapping[QuantizedLinear, Experts]) -> None:
    """Let experts that the probe did not reach read what the others of their node read."""
    floats = {experts for matrix, experts in in_one_node.items() if matrix.reads_floats}
    for matrix, experts in in_one_node.items():
        matrix.reads_floats = experts in floats


def _site_of(rewritten: Rewritten, name: str) -> str:
    """Return the site that a module stands for or in, by its name in the model; the head's own name elsewhere."""
    inside = f"{rewritten.architecture.layers}."
    if not name.startswith(inside):
        return "lm_head"
    index, _, path = name.removeprefix(inside).partition(".")
    for site in rewritten.plan.of_layer(int(index)):
        if any(f"{path}.".startswith(f"{own}.") for own in (*site.paths, factors_path(site))):
            return site.site
    raise ValueError(f"{name} is part of no site")


def _finding(site: str, loss: float, is_encoder: bool) -> Finding:
    unit = "of half the squared relative error" if is_encoder else "nats a token"
    reason = (
        f"int8 inputs would cost {loss:.2g} {unit}, at most {LARGEST_LOSS} is taken: "
        "it computes in floats, more slowly"
    )
    details = {"pass": "accuracy level", "level": 1, "predicted_loss": loss}
    return Finding(site, Outcome.APPLIED, reason, details=details)


def _by_input(
    rewritten: Rewritten,
    names: Mapping[QuantizedLinear, str],
    probe: Tensor,
    in_one_node: Mapping[QuantizedLinear, Experts],
) -> list[dict[QuantizedLinear, float]]:
    """Return the predicted loss of int8 inputs by matrix, summed over tokens, those that read the same together.

    So are the experts of a layer that one node computes: it has one level.
    """
    model, architecture = rewritten.model, rewritten.architecture
    layers = cast(nn.ModuleList, model.get_submodule(architecture.layers))
    inside = {module for layer in layers for module in layer.modules()}
    groups: list[dict[QuantizedLinear, float]] = []

    @contextmanager
    def watching(modules: Iterable[nn.Module]) -> Iterator[None]:
        costs = _Costs()
        with _watched(modules, costs):
            yield
        groups.extend(costs.by_input(names, in_one_node))
        costs.reads.clear()  # hooks of the graph hold it: its tensors would hold the graph

    run = TextRun(model, architecture, [probe], back=1, dtype=torch.float32)
    run.forward("running the model for accuracy levels, layers")
    with watching(module for module in names if module not in inside):
        run.backward(
            "judging int8 inputs, layers",
            output_error(run) if architecture.is_encoder else _sampled_loss(),
            lambda index: watching(layers[index].modules()),
        )
    return groups


def _sampled_loss() -> Objective:
    """Return the objective of a decoder: the loss of labels that are drawn from its own distribution."""
    generator = torch.Generator().manual_seed(0)

    def loss(logits: Tensor, where: slice) -> Tensor:
        labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        return nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum")

    return loss


@dataclass
class _Costs:
    """Predicted loss of int8 inputs by matrix, summed over tokens, and which tensor each matrix reads."""

    losses: defaultdict[QuantizedLinear, float] = field(default_factory=lambda: defaultdict(float))
    reads: dict[QuantizedLinear, Tensor] = field(default_factory=dict)

    def note(self, module: QuantizedLinear, x: Tensor, output: Tensor) -> None:
        """Look at a product once the gradient by its output flows back."""
        self.reads[module] = x

        @torch.no_grad()
        def add(gradient: Tensor) -> None:
            seen = x.detach()
            error = module.product(int8_inputs(seen, module.spec) - seen)
            felt = (error * gradient).flatten(0, -2).double().sum(1)
            self.losses[module] += 0.5 * float(total(felt.square()))

        output.register_hook(add)  # type: ignore[no-untyped-call]

    def by_input(
        self, names: Mapping[QuantizedLinear, str], in_one_node: Mapping[QuantizedLinear, Experts]
    ) -> list[dict[QuantizedLinear, float]]:
        """Return the losses of the matrices, those that read the same tensor together.

        The second factors of a pair read one tensor in the graph, which PyTorch computes once for each of them.
        """
        groups: defaultdict[object, dict[QuantizedLinear, float]] = defaultdict(dict)
        for module, x in self.reads.items():
            pair, seconds, _ = names[module].rpartition(SECOND_FACTORS)
            read: object = pair if seconds else id(x)
            groups[in_one_node.get(module, read)][module] = self.losses[module]
        return list(groups.values())


@contextmanager
def _watched(modules: Iterable[nn.Module], costs: _Costs) -> Iterator[None]:
    def note(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(module, QuantizedLinear) and output.requires_grad:
            costs.note(module, arguments[0], output)

    watched = [module for module in modules if isinstance(module, QuantizedLinear)]
    handles = [module.register_forward_hook(note) for module in watched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
